"""The numbers of a run: collected on the device every step, averaged over ranks and written once a window."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffpref.batch import Errors, Noised, Structure
from diffpref.objectives import preference_metrics

TIMESTEP_BINS = 4


def step_metrics(errors: Errors, noised: Noised, batch: Structure, loss: Tensor, beta: float) -> dict[str, Tensor]:
    """Vectors of one step, each any length: the objective's metrics, and accuracies by quarter of the noise
    schedule."""
    metrics = {"loss": loss.detach()} | preference_metrics(errors.detach(), batch, beta=beta)
    accuracies = metrics.get("rewards/accuracies")
    if accuracies is not None:
        quarter = (noised.level[batch.chosen] * TIMESTEP_BINS).long()
        metrics |= {f"accuracies/t{q}": accuracies[quarter == q] for q in range(TIMESTEP_BINS)}
    return metrics


class Window:
    """Sums over the steps since the last line of the log. Nothing leaves the device before `close`."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add vectors of one step."""
        for key, values in metrics.items():
            total = torch.stack([values.sum(), (values * values).sum(), values.new_tensor(values.numel())]).double()
            self.totals[key] = self.totals[key] + total if key in self.totals else total

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float, int]]:
        """(mean, standard error, count) of each key over all ranks, for keys that had values; starts the next
        window."""
        keys = sorted(self.totals)
        rows = reduce(torch.stack([self.totals[key] for key in keys])).tolist()
        self.totals = {}
        return {key: moments(*row) for key, row in zip(keys, rows, strict=True) if row[2]}


def moments(total: float, squares: float, count: float) -> tuple[float, float, int]:
    """Sums -> (mean, standard error of the mean, count)."""
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0) / count), int(count)


class DriftAlarm:
    """Watches for the known failure of margin losses: the margin grows while the winners' own error rises.

    Speaks when, over the last `memory` windows together, the winners' drift e_θ − e_ref lies `threshold` standard
    errors above zero and the mean margin is positive; then again only after the drift has come down.
    """

    def __init__(self, threshold: float, memory: int = 5):
        self.threshold, self.memory = threshold, memory
        self.windows: list[tuple[float, float, float]] = []
        self.raised = False
        self.steps: list[int] = []

    def update(self, step: int, window: dict[str, tuple[float, float, int]]) -> str | None:
        """One window of the log in; what to tell the user out, or None."""
        if "drift/chosen" not in window:
            return None
        drift, error, _ = window["drift/chosen"]
        self.windows = [*self.windows, (drift, error, window["rewards/margins"][0])][-self.memory :]
        count = len(self.windows)
        mean = sum(w[0] for w in self.windows) / count
        spread = math.sqrt(sum(w[1] ** 2 for w in self.windows)) / count
        margin = sum(w[2] for w in self.windows) / count
        bad = count == self.memory and margin > 0 and mean > self.threshold * spread
        speak, self.raised = bad and not self.raised, bad
        if not speak:
            return None
        self.steps.append(step)
        return (
            f"step {step}: the winners' own error is rising (drift {mean:+.2e} ± {spread:.0e}) while the margin grows:"
            " the policy unlearns losers faster than it learns winners, and pictures may break. Lower"
            " train.learning_rate, raise objective.beta, stop earlier (checkpoints are kept), or check the validation"
            " pictures."
        )


def append_line(path: Path, line: dict) -> None:
    """One more line of metrics.jsonl."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def truncate_lines(path: Path, step: int) -> None:
    """Drop lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
