"""What a run says while it goes: metrics.jsonl, trackers, the progress bar, warnings; and when it must not go on."""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffpref.config import RunConfig
from diffpref.metrics import Values, Window, append_line
from diffpref.stability import DriftAlarm, Moments

SHOWN = (  # in the progress bar, as far as there is one
    ("loss", "loss"),
    ("acc", "rewards/accuracies"),
    ("acc", "accuracy"),
    ("margin", "rewards/margins"),
    ("margin", "margin"),
    ("winner drift", "drift/chosen"),
    ("liked drift", "drift/liked"),
)
NAMED_FAULTS = 5  # so many are said; all are written and counted


class Journal:
    """Numbers are collected on the device at every step; `close` averages them over all processes, writes the line and
    looks whether the run may go on. Every process must call `close`, at the same steps.

    Args:
        config: The run.
        accelerator: accelerate's engine.
        alarm: Looks at every window; none for what cannot drift.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, alarm: DriftAlarm | None = None):
        self.config, self.accelerator = config, accelerator
        self.folder, self.main = config.run_dir, accelerator.is_main_process
        self.window, self.alarm = Window(), alarm
        self.faults, self.named, self.stopped_by_drift = 0, 0, False
        self.spent, self.started, self.bar = 0.0, time.perf_counter(), tqdm(disable=True)

    def begin(self, step: int) -> None:
        """Training goes on from this step."""
        self.started = time.perf_counter()
        total = self.config.train.max_train_steps
        self.bar = tqdm(total=total, initial=step, desc="training", unit="step", disable=not self.main)

    def add(self, metrics: Mapping[str, Values]) -> None:
        """Numbers of one step."""
        self.window.add(metrics)

    def name_faults(self, step: int, faults: tuple[str, ...]) -> None:
        """Rows that could not be used: named, written and counted."""
        for fault in faults:
            self.named += 1
            append_line(self.folder / "faults.jsonl", {"step": step, "fault": fault})
            if self.named <= NAMED_FAULTS:
                more = "; further ones go to faults.jsonl" if self.named == NAMED_FAULTS else ""
                self.bar.write(f"left out: {fault}{more}")
        self.window.add({"faults": torch.tensor([float(len(faults))], device=self.accelerator.device)})

    def seconds(self) -> float:
        """Training time of the whole run, also before it was resumed."""
        return self.spent + time.perf_counter() - self.started

    def close(self, step: int, learning_rate: float) -> None:
        """Write the window's line, and look whether the winners drift (then `stopped_by_drift`, if so configured).

        Raises FloatingPointError when the loss is no number.
        """
        window = self.window.close(partial(self.accelerator.reduce, reduction="sum"))
        mean, _, batches = window.pop("faults")
        self.faults += round(mean * batches)
        line = {"step": step, "seconds": round(self.seconds(), 3)}
        line |= {key: mean for key, (mean, _, _) in window.items()} | {"learning_rate": learning_rate}
        self.refuse_no_number(step, line)
        self.write(line)
        self.bar.set_postfix({name: f"{line[key]:.3g}" for name, key in SHOWN if key in line})
        self.watch(step, window)

    def note(self, step: int, numbers: dict[str, float]) -> None:
        """A line of its own, of what was measured beside the training."""
        self.write({"step": step} | numbers)

    def write(self, line: dict[str, Any]) -> None:
        """To trackers and to metrics.jsonl."""
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        if self.main:
            append_line(self.folder / "metrics.jsonl", line)

    def refuse_no_number(self, step: int, line: dict[str, Any]) -> None:
        """Raise FloatingPointError when the loss is NaN or infinite: every later weight would be, too."""
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"the loss is {line['loss']} at step {step}: lower train.learning_rate, set train.skip_grad_norm, or"
                f" compute in bf16, not fp16 (train.mixed_precision); the checkpoints in {self.folder} are from before"
            )

    def watch(self, step: int, window: dict[str, Moments]) -> None:
        """Say what the alarm says; it may end the run."""
        warning = self.alarm.update(step, window) if self.alarm else None
        if warning and self.main:
            self.bar.write(warning)
        self.stopped_by_drift = bool(warning) and self.alarm.stops

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        alarm = self.alarm.state_dict() if self.alarm else None
        return {"alarm": alarm, "faults": self.faults, "seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self.alarm:
            self.alarm.load_state_dict(state["alarm"])
        self.faults, self.spent = state["faults"], state["seconds"]
