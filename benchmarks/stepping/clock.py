"""Seconds of a number of steps, and how many of them went by waiting for data."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Turn:
    """What a variant did when it was its turn, for one step. seconds: by the wall's clock.  waited: of that, for its
    batch.  cpu: this process's own, which other programs disturb less; that of workers is not in it."""

    seconds: float
    waited: float
    cpu: float


class Clock:
    """Starts after `warm` steps, stops `steps` later; the device is waited for at these two moments only."""

    def __init__(self, warm: int, steps: int, device: torch.device):
        self.warm, self.steps, self.device = warm, steps, device
        self.count, self.waited, self.started, self.cpu = 0, 0.0, 0.0, 0.0
        self.result: Turn | None = None

    def tick(self) -> None:
        """A step is over."""
        self.count += 1
        if self.count == self.warm:
            self.waited, self.started, self.cpu = 0.0, self.now(), time.process_time()
        elif self.count == self.warm + self.steps:
            totals = self.now() - self.started, self.waited, time.process_time() - self.cpu
            self.result = Turn(*(total / self.steps for total in totals))

    def now(self) -> float:
        """The time at which the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, the waiting for each of them counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def turn(self) -> Turn:
        """Of one step. Raises RuntimeError where not all steps were made."""
        if self.result is None:
            raise RuntimeError(f"{self.count} steps were made, not {self.warm + self.steps}")
        return self.result
