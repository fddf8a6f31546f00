"""A run of this package, through its own Trainer, Loop and Learner; only its clock is added."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from diffpref.batch import PreferenceBatch
from diffpref.config import CacheConfig, Config, DataConfig, LoraSettings, ModelConfig, ObjectiveConfig, TrainConfig
from diffpref.data import training_loader
from diffpref.trainer import Trainer
from stepping.bases import Bases, given
from stepping.clock import Clock, Turn
from stepping.levers import FULL, HALF, WHOLE, Lever, changed
from stepping.script import Recipe

ENDLESS = 1_000_000  # steps; the loader goes on beyond a turn, as it does in a run


def configured(name: str, lever: Lever, bases: Bases, recipe: Recipe, pairs: int, folder: Path) -> Config:
    """A run on the terms of the script's: the same LoRA, batch, rate and β."""
    config = Config(
        name=name,
        output_dir=folder,
        model=ModelConfig(bases.what),
        data=DataConfig(str(bases.pairs), max_pairs=pairs, resolution=bases.resolution),
        lora=LoraSettings(rank=recipe.rank),
        objective=ObjectiveConfig("dpo", beta=recipe.beta),
        cache=CacheConfig(folder=folder / "cache"),
        train=TrainConfig(
            max_train_steps=ENDLESS,
            train_batch_size=recipe.batch,
            learning_rate=recipe.rate,
            lr_scheduler="constant",
            checkpointing_steps=0,
        ),
    )
    precision = HALF if bases.pipe.device.type == "cuda" else WHOLE
    return changed(config, FULL | precision | lever.changes)


class Ours:
    """A trainer that runs a few steps at a time.

    Args:
        config: The run.
        bases: Weights.
        lever: Applied once the trainer is made.
    """

    def __init__(self, config: Config, bases: Bases, lever: Lever):
        config.run_dir.mkdir(parents=True)
        with given(bases.at(getattr(torch, config.model.dtype))):
            self.trainer = Trainer(config)
        self.trainer.fill_cache()
        self.trainer.open_reference_table()
        lever.alter(self.trainer)
        self.done = 0
        if lever.epochs:
            steps = -(-lever.epochs * len(self.trainer.checked.rows) // config.train.train_batch_size)
            self.run(steps, Clock(1, steps, self.trainer.accelerator.device))

    @property
    def model(self) -> nn.Module:
        """What trains."""
        return self.trainer.denoiser

    def batch(self) -> PreferenceBatch:
        """The first one of the run, as its loader makes it."""
        trainer = self.trainer
        config = changed(trainer.config, {"data.num_workers": 0})
        place = {"start": 0, "rank": 0, "world": 1, "seed": config.train.seed, "cache": trainer.cache}
        return next(iter(training_loader(trainer.checked.rows, trainer.sizes, config, **place)))

    def once(self) -> Callable[[], Any]:
        """A step on a batch that is here already."""
        batch, loop = self.batch(), self.trainer.loop

        def step() -> None:
            self.trainer.learner.learn([batch], loop.journal)
            loop.step()

        return step

    def turn(self, warm: int, steps: int) -> Turn:
        """So many steps of the loop, timed after the first ones. Workers are started anew, and end."""
        clock = Clock(warm, steps, self.trainer.accelerator.device)
        self.run(warm + steps, clock)
        return clock.turn()

    def run(self, steps: int, clock: Clock) -> None:
        """The loop as a run has it, to a later last step."""
        loop = self.trainer.loop
        last = self.done + steps
        loop.train = replace(loop.train, max_train_steps=last)
        with watching(loop, clock):
            self.trainer.learn(self.done, None, None)
        self.done = last


@contextmanager
def watching(loop: Any, clock: Clock) -> Iterator[None]:
    """Inside, the clock sees every batch that the loop takes and every step that it makes."""
    accumulated, after_step = loop.accumulated, loop.after_step

    def stepped() -> None:
        after_step()
        clock.tick()

    batches: dict[int, Iterator] = {}  # one watched iterator for each of the loop's
    watched = lambda source: batches.setdefault(id(source), clock.watched(source))  # noqa: E731
    loop.accumulated = lambda source, step: accumulated(watched(source), step)
    loop.after_step = stepped
    try:
        yield
    finally:
        loop.accumulated, loop.after_step = accumulated, after_step


# --- several engines in one process -----------------------------------------------------------------------------------


@contextmanager
def engine(state: dict[str, Any]) -> Iterator[None]:
    """accelerate keeps the precision for the whole process: inside, the one that a variant was made with. What it says
    on stderr (bars) is not shown."""
    shared = AcceleratorState._shared_state
    shared.clear()
    shared.update(state)
    with redirect_stderr(io.StringIO()):
        yield
    state.update(shared)
