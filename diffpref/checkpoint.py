"""Checkpoints that are never half there: written beside, flushed to the disk, then renamed.

    checkpoint-{step}/trainable.safetensors          the weights that train, whole, under the model's own names
                      optimizer.safetensors          the optimiser's tensors, "{parameter}/{name}"
                      average.safetensors            with train.ema_decay
                      buffers.safetensors            what a model notes beside its weights, if it does
                      random_{rank}.safetensors      random generators of each process
                      pytorch_lora_weights.safetensors   with a LoRA: loads into stock diffusers pipelines
                      state.json                     step, configuration, schedule, alarm, position in the data

Weights are stored whole, so a run may go on with another number of processes or another engine. There is no pickle,
except where DeepSpeed writes its own optimiser files (`engine/` in the place of optimizer.safetensors).
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpref.engines import full, like
from diffpref.stability import Average

WEIGHTS, OPTIMIZER, AVERAGE, BUFFERS, STATE = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "buffers.safetensors",
    "state.json",
)
NAME = re.compile(r"checkpoint-(\d+)")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- optimiser states by parameter name -------------------------------------------------------------------------------


def flatten(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Nested dicts of tensors and whole numbers -> paths and tensors; bitsandbytes keeps such states."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}/{key}")
    else:
        yield path, torch.tensor(tree) if isinstance(tree, int) else full(tree).clone()  # some share a table


def optimizer_tensors(optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state, whole, as "{parameter}/{name}". Every process must call it."""
    state = optimizer.state_dict()["state"]
    return {path: value for i, values in state.items() for path, value in flatten(values, names[i])}


def load_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Put stored state back, sharded as the parameters are; learning rates come from the schedule."""
    state: dict[int, dict[str, Any]] = {i: {} for i in range(len(parameters))}
    index = {name: i for i, name in enumerate(parameters)}
    for path, value in tensors.items():
        name, *inner, key = path.split("/")
        place = state[index[name]]
        for step in inner:
            place = place.setdefault(step, {})
        whole_number = value.ndim == 0 and value.dtype == torch.int64
        moment = value.ndim > 0 and value.shape == parameters[name].shape
        place[key] = value.item() if whole_number else like(value, parameters[name]) if moment else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# --- random generators ------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Tensor]:
    """torch's global generators of this process: only dropout draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put them back."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --- the folder -------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(run_dir: Path, which: str) -> Path | None:
    """'latest' -> the newest checkpoint of the run, or None when there is none yet; a path -> itself.

    Raises ValueError for a folder that is none.
    """
    if which == "latest":
        return max(checkpoints(run_dir), key=lambda path: int(path.name.split("-")[1]), default=None)
    folder = Path(which)
    if not NAME.fullmatch(folder.name) or not (folder / STATE).is_file():
        raise ValueError(
            f"train.resume_from_checkpoint: {folder} is not a checkpoint; give 'latest' or a folder checkpoint-<step>"
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError when it is damaged, or not the one of this folder's step."""
    with damage_named(folder):
        state = json.loads((folder / STATE).read_text())
        if state["step"] != int(folder.name.split("-")[1]):
            raise KeyError(f"it was written at step {state['step']}")
        return state


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Errors of reading, in words that say which checkpoint and what to do."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}); go on from another checkpoint of the run"
        ) from error


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file, by its name."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()}


def verify(folder: Path, files: dict[str, int]) -> None:
    """Raise KeyError for a file that is missing or not what was written: it would go on as another run, unnoticed."""
    now = checksums(folder)
    for name, checksum in files.items():
        if now.get(name) != checksum:
            raise KeyError(f"{name} is {'not what was written' if name in now else 'missing'}")


def refuse_no_numbers(what: str, tensors: dict[str, Tensor]) -> None:
    """Raise FloatingPointError for weights that are NaN or infinite."""
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{what} are NaN or infinite ({bad[0]} and {len(bad) - 1} more): lower train.learning_rate, set"
            " train.skip_grad_norm, or compute in bf16, not fp16 (train.mixed_precision); checkpoints are from before"
        )


def flush(*paths: Path) -> None:
    """To the disk itself: a rename that outlives a power cut must not find files that did not."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def discard(folder: Path) -> None:
    """Remove a checkpoint so that at no moment half of it looks whole."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".discarded-{folder.name}")))


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for left in (*run_dir.glob(".checkpoint-*"), *run_dir.glob(".discarded-*")):
        shutil.rmtree(left)


# --- saving and loading -----------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run. Every process must call `save` and `load`; the first one writes what is shared.

    Args:
        accelerator: The engine.
        run_dir: The run's folder.
        model: The denoiser, whose trainable weights are kept.
        engine: What accelerate made of it.
        optimizer: What accelerate made of the optimiser.
        average: The averaged weights.
        limit: How many to keep; all when None.
        export: Writes a file that others load into the folder, beside the exact state.
        buffers: What training changes beside weights, the same in all processes; by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        model: nn.Module,
        engine: nn.Module,
        optimizer: Optimizer,
        average: Average,
        limit: int | None,
        export: Callable[[Path], object],
        buffers: dict[str, Tensor] | None = None,
    ):
        self.buffers = buffers or {}
        self.accelerator, self.run_dir, self.model, self.engine = accelerator, run_dir, model, engine
        self.optimizer, self.average, self.limit, self.export = optimizer, average, limit, export
        self.parameters = trainable(model)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `checkpoint-{step}`. Raises OSError, leaving the earlier ones whole, when it cannot be written."""
        final, fresh = self.run_dir / f"checkpoint-{step}", self.run_dir / f".checkpoint-{step}"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.write(fresh, state | {"step": step})
        except BaseException as error:
            if main:
                shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError):
                raise OSError(self.unwritten(step, error)) from error
            raise
        if main:
            flush(*fresh.rglob("*"), fresh)
            discard(final)
            fresh.rename(final)
            flush(self.run_dir)
            self.prune()
        self.accelerator.wait_for_everyone()
        return final

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """Every file of a checkpoint; state.json last, with the checksums of the others. Raises FloatingPointError for
        weights that are no numbers."""
        weights = {name: full(p) for name, p in self.parameters.items()}
        refuse_no_numbers(f"at step {state['step']} the weights", weights)
        average, main = self.average.tensors(), self.accelerator.is_main_process
        save_file(random_states(), folder / f"random_{self.accelerator.process_index}.safetensors")
        if self.deepspeed:
            self.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
        else:
            moments = optimizer_tensors(self.optimizer, list(self.parameters))
            if main:
                save_file(moments, folder / OPTIMIZER)
        self.export(folder)
        if main:
            save_file(weights, folder / WEIGHTS)
            if average:
                save_file(average, folder / AVERAGE)
            if self.buffers:
                save_file({name: full(value) for name, value in self.buffers.items()}, folder / BUFFERS)
        self.accelerator.wait_for_everyone()
        if main:
            here = {"average_steps": self.average.steps, "processes": self.accelerator.num_processes}
            (folder / STATE).write_text(json.dumps(state | here | {"files": checksums(folder)}, indent=1))

    def unwritten(self, step: int, error: Exception) -> str:
        """What to say when a checkpoint could not be written."""
        kept = checkpoints(self.run_dir)
        last = f"{kept[-1].name} is whole" if kept else "there is none yet"
        return (
            f"checkpoint-{step} could not be written to {self.run_dir} ({error}); of the earlier ones {last}. Make"
            " room, or keep fewer (train.checkpoints_total_limit), and go on with --train.resume_from_checkpoint latest"
        )

    def prune(self) -> None:
        """Keep the newest `limit`."""
        if self.limit:
            for old in checkpoints(self.run_dir)[: -self.limit]:
                discard(old)

    def load(self, folder: Path) -> None:
        """Weights, optimiser, average and random generators as they were. Raises ValueError when they cannot be."""
        state, rank = read_state(folder), self.accelerator.process_index
        with damage_named(folder):
            verify(folder, state["files"])
            self.load_weights(folder)
            if self.deepspeed:
                self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
            else:
                load_optimizer(self.optimizer, self.parameters, load_file(folder / OPTIMIZER))
            if self.average.model:
                self.average.load(load_file(folder / AVERAGE), state["average_steps"])
            for name, value in (load_file(folder / BUFFERS) if self.buffers else {}).items():
                self.buffers[name].copy_(value)
            if rank < state["processes"]:  # a run may go on with more processes than it began with
                set_random_states(load_file(folder / f"random_{rank}.safetensors"))

    def load_weights(self, folder: Path) -> None:
        """Copies into the existing parameters: the optimiser goes on holding the very tensors that train."""
        stored = load_file(folder / WEIGHTS)
        check_weights(folder, stored, {name: p.shape for name, p in self.parameters.items()})
        for name, parameter in self.parameters.items():
            parameter.data.copy_(like(stored[name], parameter.data))


def check_weights(folder: Path, stored: dict[str, Tensor], shapes: dict[str, Iterable[int]]) -> None:
    """Raise ValueError for weights that are not this model's."""
    if stored.keys() != shapes.keys():
        names = sorted(stored.keys() ^ shapes.keys())
        raise ValueError(f"{folder} holds other trainable weights than this run: {names[:4]} …")
    other = [name for name, shape in shapes.items() if stored[name].shape != shape]
    if other:
        raise ValueError(f"{folder} holds weights of other shapes than this run's (another rank?): {other[:4]} …")
