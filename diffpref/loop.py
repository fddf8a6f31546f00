"""The loop of a run, whatever is trained: optimiser steps, log, checkpoints, stops; nothing lost, nothing repeated."""

import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from diffpref import engines
from diffpref.checkpoint import Checkpoints, read_state, trainable
from diffpref.config import RunConfig, computed, to_dict
from diffpref.interrupt import Interrupt, Stopped
from diffpref.journal import Journal
from diffpref.optimizers import make_optimizer
from diffpref.run_folder import RunFolder
from diffpref.stability import Average, Spikes


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that is not installed: accelerate would go on without it and say nothing."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"train.report_to: {name} is not to be had here; installed trackers: {', '.join(available) or 'none'}"
            )


class Faulty(Protocol):
    """A batch. faults: a line for each row that could not be used and was replaced."""

    @property
    def faults(self) -> tuple[str, ...]: ...


class Batches(Protocol):
    """What a loader gives: batches, and where it stands after the last one, as JSON values."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...


class Loop:
    """Steps from one to the last, with all that a run must survive. Every process makes one and calls the same methods.

    Args:
        config: The run.
        accelerator: accelerate's engine.
        model: Whose trainable weights are trained, in fp32.
        journal: The log.
        export: Writes what others load into a folder, beside a checkpoint's exact state.
        after_step: Called after every optimiser step.
        buffers: What the model changes beside its weights, by name; kept in checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        journal: Journal,
        export: Callable[[Path], object],
        after_step: Callable[[], object] = lambda: None,
        buffers: dict[str, Tensor] | None = None,
    ):
        self.config, self.train, self.accelerator, self.journal = config, config.train, accelerator, journal
        self.after_step, self.patience = after_step, engines.Patience(accelerator)
        optimizer = make_optimizer(trainable(model).values(), self.train)
        self.policy, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = get_scheduler(
            self.train.lr_scheduler,
            optimizer,
            num_warmup_steps=self.train.lr_warmup_steps,
            num_training_steps=self.train.max_train_steps,
        )
        self.spikes = Spikes(self.train.skip_grad_norm)
        self.average = Average(trainable(model), self.train.ema_decay)
        kept = self.train.checkpoints_total_limit
        parts = (model, self.policy, self.optimizer, self.average)
        self.checkpoints = Checkpoints(accelerator, config.run_dir, *parts, kept, export, buffers)

    # --- before ------------------------------------------------------------------------------------------------------

    def groups_per_step(self) -> int:
        """Groups (pairs, lists, …) that an optimiser step sees, over all processes."""
        train = self.train
        return train.train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes

    def resume(self, checkpoint: Path | None) -> tuple[int, dict | None]:
        """Load the checkpoint that was asked for -> (step to go on from, position in the data).

        Raises ValueError when that would be another run.
        """
        if checkpoint is None:
            if self.train.resume_from_checkpoint:
                self.accelerator.print("no checkpoint yet: starting at step 0")
            return 0, None
        state = read_state(checkpoint)
        if state["groups_per_step"] != self.groups_per_step():
            raise ValueError(
                f"{checkpoint} was made with {state['groups_per_step']} pairs or lists a step, this run has"
                f" {self.groups_per_step()} (processes x train_batch_size x gradient_accumulation_steps)"
            )
        self.checkpoints.load(checkpoint)
        self.load_schedule(state["schedule"])
        self.journal.load_state_dict(state["journal"])
        self.spikes.load_state_dict(state["spikes"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"resuming from {checkpoint}")
        return state["step"], state["data"]

    def load_schedule(self, state: dict) -> None:
        """Go on at the checkpoint's learning rate: torch's schedule would set it only after the next step."""
        self.schedule.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    # --- the steps ---------------------------------------------------------------------------------------------------

    def run(
        self,
        start: int,
        loader: Batches,
        learn: Callable[[Iterable[Any], Journal], object],
        preview: Callable[[int], object],
        previews: int,
    ) -> int:
        """Train from step `start` to the end, or to where the drift alarm stops; returns the last step.

        Args:
            start: Steps already done.
            loader: Batches from there on.
            learn: Accumulates the gradient of one optimiser step's batches and notes its numbers.
            preview: Called with the step every `previews` steps (0: never) before the last.
            previews: See there.

        Raises Stopped, after a checkpoint, when a signal asked for it.
        """
        step, journal = start, self.journal  # a run that is complete has no more steps
        journal.begin(start)
        self.policy.train()
        batches = iter(loader)
        with journal.bar, Interrupt() as interrupt:
            for step in range(start + 1, self.train.max_train_steps + 1):
                learn(self.accumulated(batches, step), journal)
                self.step()
                journal.bar.update()
                asked = self.patience.any(bool(interrupt))
                if not (asked or self.closes(step) or self.every(previews, step)):
                    continue
                journal.close(step, self.schedule.get_last_lr()[0])
                if asked or journal.stopped_by_drift or self.saves(step):
                    self.checkpoints.save(step, self.state(loader.state_dict()))
                if asked:
                    raise Stopped(step, interrupt.signum or signal.SIGTERM)
                if journal.stopped_by_drift:
                    break
                if self.every(previews, step) and step < self.train.max_train_steps:
                    preview(step)
                    self.patience.wait()
        return step

    def accumulated(self, batches: Iterator[Faulty], step: int) -> Iterator[Faulty]:
        """The batches of one optimiser step, their faults named."""
        for batch in islice(batches, self.train.gradient_accumulation_steps):
            self.journal.name_faults(step, batch.faults)
            yield batch

    def step(self) -> None:
        """One optimiser step, unless the gradient is out of all proportion."""
        clipped = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.train.max_grad_norm)
        norm = engines.whole_norm(clipped, self.accelerator.device)
        self.journal.add({"grad_norm": norm})
        spike = self.train.skip_grad_norm is not None and self.spikes.is_spike(norm.item())
        if not spike:
            self.optimizer.step()
            self.after_step()
            self.average.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def every(self, steps: int, step: int) -> bool:
        """Whether something that is done every so many steps (0: never) is due."""
        return steps > 0 and step % steps == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due: every so many steps, and at the end, from where a run can be made longer."""
        every = self.train.checkpointing_steps
        return self.every(every, step) or (every > 0 and step == self.train.max_train_steps)

    def closes(self, step: int) -> bool:
        """Whether the log's window closes here. It does at every checkpoint, so that none is kept of a loss that is no
        number."""
        return self.every(self.train.logging_steps, step) or self.saves(step) or step == self.train.max_train_steps

    def state(self, position: dict) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors, as JSON values."""
        scaler = self.accelerator.scaler
        return {
            "computed": computed(self.config),
            "groups_per_step": self.groups_per_step(),
            "schedule": self.schedule.state_dict(),
            "journal": self.journal.state_dict(),
            "spikes": self.spikes.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": position,
        }


def in_folder(config: RunConfig, checkpoint: Path | None, accelerator: Accelerator, act: Callable[[], dict]) -> dict:
    """`act` while the run's folder is ours: opened by the first process, for all of them, as are trackers."""
    folder = RunFolder(config, checkpoint) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    if config.train.report_to:
        accelerator.init_trackers("diffpref", config={k: str(v) for k, v in to_dict(config).items()})
    try:
        return act()
    finally:
        if folder:
            folder.close()
