"""Checkpoints of the trainable weights, optimiser and schedule; written beside, then renamed, so never half there."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "trainable.safetensors"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def register(accelerator: Accelerator, model: nn.Module) -> None:
    """Have accelerate's save_state and load_state keep only what trains, as safetensors, under the model's own names.

    Loading copies into the existing parameters: the optimiser goes on holding the very tensors that train.
    """

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # the frozen base is not part of a checkpoint
        if accelerator.is_main_process:
            save_file({k: p.detach().cpu().contiguous() for k, p in trainable(model).items()}, Path(folder) / WEIGHTS)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        stored, current = load_file(Path(folder) / WEIGHTS), trainable(model)
        if stored.keys() != current.keys():
            raise ValueError(
                f"{folder} holds other trainable weights than this run: {sorted(stored.keys() ^ current.keys())[:4]} …"
            )
        other = [name for name, parameter in current.items() if stored[name].shape != parameter.shape]
        if other:
            raise ValueError(f"{folder} holds weights of other shapes than this run's (another rank?): {other[:4]} …")
        for name, parameter in current.items():
            parameter.data.copy_(stored[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int) -> Path:
    """Write `checkpoint-{step}`; every rank takes part."""
    final, fresh = run_dir / f"checkpoint-{step}", run_dir / f".checkpoint-{step}"
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
    accelerator.wait_for_everyone()
    return final


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name. Raises ValueError for a folder that is none."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if not match or not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"train.resume_from_checkpoint: {folder} is not a checkpoint; give 'latest' or a folder checkpoint-<step>"
        )
    return int(match.group(1))


def find_checkpoint(run_dir: Path, which: str) -> Path | None:
    """'latest' -> the newest checkpoint of the run, or None when there is none yet; a path -> itself."""
    if which != "latest":
        return Path(which)
    found = [path for path in run_dir.glob("checkpoint-*") if (path / WEIGHTS).is_file()]
    return max(found, key=checkpoint_step, default=None)
