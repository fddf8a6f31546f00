"""One cell: train through diffpref's own Trainer, then draw, judge and rank; the result is one row."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffpref.checkpoint import trainable
from diffpref.config import Config, DataConfig, ModelConfig, NoiseConfig, ObjectiveConfig, load_config
from diffpref.emoji_world.classifier import concept_recognition
from diffpref.emoji_world.users import majority_utility
from diffpref.encode import Encoder
from diffpref.families import load_pipeline
from diffpref.heldout import HeldOut, held_out_batches, held_out_rows
from diffpref.learner import Learner
from diffpref.predict import adapter_off
from diffpref.run_folder import RunFolder
from diffpref.sample import sample
from diffpref.trainer import Trainer
from diffpref.winrate import scores, win_rate
from equal_terms.plan import BATCH, VIEWS, Cell, Scale

EMOJI = Path(__file__).parents[2] / "diffpref" / "emoji_world" / "data"
TIMESTEPS = {"timesteps": "logit_normal", "logit_mean": 1.0}
GUIDANCE, DRAWN_AT_ONCE, WARMUP = 1.0, 36, 0.125


@dataclass(frozen=True)
class Place:
    """Where everything is: labels and base pictures' scores in data/, encoded pictures in cache/, adapters in
    weights/."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name


# --- configuration ---------------------------------------------------------------------------------------------------


def configuration(cell: Cell, place: Place) -> dict[str, Any]:
    """The run's configuration: the quickstart's adapter and timesteps, the cell's own objective, noise and data."""
    view = VIEWS[cell.view]
    data = {"path": str(place / f"data/{view.file}.parquet"), "max_pairs": 2 * cell.scale.pairs // view.items}
    return {
        "name": cell.key,
        "output_dir": str(place / "runs"),
        "overwrite": True,
        "model": {"pretrained_model_name_or_path": str(EMOJI / "pipeline")},
        "lora": {"rank": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]},
        "noise": TIMESTEPS | cell.noise,
        "data": data | {"num_workers": 0} | view.data,
        "cache": {"latents": True, "text": True, "folder": str(place / "cache")},
        "objective": cell.objective,
        "train": {
            "max_train_steps": cell.steps,
            "gradient_checkpointing": False,  # to measure whether they fit is a pass that nobody asked for
            "train_batch_size": BATCH // view.items,
            "learning_rate": cell.rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": int(WARMUP * cell.steps),
            "checkpointing_steps": 0,
            "logging_steps": max(cell.steps // 4, 1),
            "seed": cell.seed,
        },
    }


def load(cell: Cell, place: Place) -> Config:
    """The same, checked."""
    path = place / "configs" / f"{cell.key}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(configuration(cell, place), sort_keys=False))
    return load_config(["--config", str(path)])


# --- training --------------------------------------------------------------------------------------------------------


class Passes:
    """Items that have gone through a denoiser, by what for."""

    def __init__(self) -> None:
        self.counts = {"policy": 0, "policy_without_graph": 0, "reference": 0}

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        off = any(getattr(part, "disable_adapters", False) is True for part in module.modules())
        name = "policy" if torch.is_grad_enabled() else "reference" if off else "policy_without_graph"
        self.counts[name] += len(inputs[0])

    @contextmanager
    def counted(self, denoiser: nn.Module) -> Iterator[None]:
        """While this lasts."""
        hook = denoiser.register_forward_hook(self)
        try:
            yield
        finally:
            hook.remove()


def train(trainer: Trainer, cell: Cell, place: Place) -> dict[str, Any]:
    """Train, or load the weights that a cell with the same ones left -> what training cost, and its last numbers."""
    weights = place / "weights" / f"{cell.weights}.safetensors"
    record = weights.with_suffix(".json")
    if not record.exists():
        costs = run(trainer, cell)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in trainable(trainer.denoiser).items()}, weights)
        write_whole(record, costs)
        return costs
    for name, value in load_file(weights).items():
        trainable(trainer.denoiser)[name].data.copy_(value)
    return json.loads(record.read_text())


def run(trainer: Trainer, cell: Cell) -> dict[str, Any]:
    """The loop itself -> costs per 1000 pairs, and the log's last line."""
    passes, wall, cpu = Passes(), time.perf_counter(), time.process_time()
    with passes.counted(trainer.denoiser):
        trainer.learn(0, None, None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    lines = [json.loads(line) for line in (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "threads": torch.get_num_threads(),
        "pairs": cell.scale.pairs,
        "passes": passes.counts,
        "log": {key: value for key, value in lines[-1].items() if isinstance(value, int | float)},
    }


def write_whole(path: Path, content: Any) -> None:
    """JSON that is whole or not there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


# --- pictures --------------------------------------------------------------------------------------------------------


def prompts_of(cell_use: str, scale: Scale, place: Place) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the pictures that a use is judged on."""
    files = {"sweep": place / "data/validation_prompts.txt", "test": EMOJI / "evaluation_prompts.txt"}
    count, each = scale.validation if cell_use == "sweep" else scale.test
    named = [line.strip() for line in files[cell_use].read_text().splitlines() if line.strip()][:count]
    return [p for p in named for _ in range(each)], [seed for _ in named for seed in range(each)]


def draw(pipe: Any, prompts: list[str], seeds: list[int], steps: int) -> list[Image]:
    """One picture for each prompt and seed."""
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "batch_size": DRAWN_AT_ONCE}
    return sample(pipe, prompts, seeds, **settings)


def base_scores(use: str, scale: Scale, place: Place) -> dict[str, Any]:
    """Of the untouched pipeline's pictures: utility [N], recognised (mean). Drawn once."""
    prompts, seeds = prompts_of(use, scale, place)
    path = place / "data" / f"base-{len(prompts)}-{scale.steps}-{use}.json"
    if not path.exists():
        pictures = draw(load_pipeline(ModelConfig(str(EMOJI / "pipeline"))), prompts, seeds, scale.steps)
        utility, known = scores(majority_utility, pictures, prompts), scores(concept_recognition, pictures, prompts)
        write_whole(path, {"utility": utility.tolist(), "recognised": known.mean()})
    return json.loads(path.read_text())


def judge(trainer: Trainer, cell: Cell, place: Place) -> dict[str, Any]:
    """Win rate over the base, mean gain in utility; which pictures won, and which show their concept."""
    prompts, seeds = prompts_of(cell.use, cell.scale, place)
    base = np.array(base_scores(cell.use, cell.scale, place)["utility"])
    with trainer.drawing() as pipe:
        pictures = draw(pipe, prompts, seeds, cell.scale.steps)
    utility = scores(majority_utility, pictures, prompts)
    rate, won = win_rate(utility, base, prompts), (utility > base) + 0.5 * (utility == base)
    return {
        "win_rate": rate.value,
        "gain": float((utility - base).mean()),
        "won": won.tolist(),
        "gains": (utility - base).round(3).tolist(),
        "known": scores(concept_recognition, pictures, prompts).astype(int).tolist(),
    }


# --- ranking ---------------------------------------------------------------------------------------------------------


class Remembered:
    """The reference on held-out items, which every cell shows it again: predictions are kept by what goes in."""

    kept: dict[bytes, torch.Tensor] = {}

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> tuple[torch.Tensor]:
        prompt = conditioning["encoder_hidden_states"]
        key = hashlib.sha256(b"".join(part.numpy().tobytes() for part in (x_t, t, prompt))).digest()
        if key not in self.kept:
            with adapter_off(self.denoiser)() as reference:
                self.kept[key] = reference(x_t, t, **conditioning)[0]
        return (self.kept[key],)


def held_out(trainer: Trainer, cell: Cell, place: Place) -> HeldOut:
    """Held-out pairs, measured alike whatever the cell trains on: shared noise, errors in the model's own space."""
    pairs, draws = cell.scale.ranking
    path = str(place / "data/held_out.parquet")
    data = DataConfig(path, validation=path, validation_groups=pairs, num_workers=0)
    rows = held_out_rows(data)
    batches = held_out_batches(rows, trainer.native_resolution(), trainer.multiple(), BATCH // 2)
    config = replace(trainer.config, noise=NoiseConfig(**TIMESTEPS), objective=ObjectiveConfig())
    models = replace(trainer.learner.models, base=lambda: nullcontext(Remembered(trainer.denoiser)))
    encoder = Encoder(trainer.pipe, seed=0)
    learner = Learner(
        trainer.accelerator, models, encoder, trainer.parameterization, config, trainer.loop.groups_per_step()
    )
    return HeldOut(learner, batches, draws)


MEASURED = ("accuracies", "drift_chosen", "drift_rejected", "rankings", "rankings_reference")


def ranking(held_out: HeldOut) -> dict[str, Any]:
    """Which held-out pairs the implicit reward ranks right, and how far errors of both sides have moved."""
    ranks = held_out.measure()
    numbers = ranks.numbers(beta=1.0)
    right = 0.5 * (1 + np.sign(ranks.advantage[:, 0] - ranks.advantage[:, 1]))
    return {name: numbers[f"validation/{name}"] for name in MEASURED} | {"right": right.tolist()}


# --- the whole -------------------------------------------------------------------------------------------------------


def compute(cell: Cell, place: Place) -> dict[str, Any]:
    """The cell's row. A run that diverges is a result, too."""
    row = {"key": cell.key, "steps": cell.steps} | asdict(cell)
    try:
        return row | measured(cell, place)
    except FloatingPointError as error:
        return row | {"diverged": str(error)}


def measured(cell: Cell, place: Place) -> dict[str, Any]:
    """What there is to say of a cell."""
    trainer = Trainer(load(cell, place))
    folder = RunFolder(trainer.config, None)
    try:
        held = held_out(trainer, cell, place) if cell.use == "test" else None  # encoded before encoders leave
        trainer.fill_cache()
        found = {"training": train(trainer, cell, place)} | judge(trainer, cell, place)
    finally:
        folder.close()
    return found | ({"ranking": ranking(held)} if held else {})
