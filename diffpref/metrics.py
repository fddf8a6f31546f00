"""The numbers of a run: collected on the device every step, averaged over ranks and written once a window."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffpref.batch import Errors, Structure
from diffpref.objectives import preference_metrics
from diffpref.stability import Moments

TIMESTEP_BINS = 4
Values = Tensor | tuple[Tensor, Tensor]  # of any length; or of that length, and which of them count


def step_metrics(errors: Errors, level: Tensor, batch: Structure, loss: Tensor, beta: float) -> dict[str, Values]:
    """Numbers of one step: the objective's metrics, and accuracies by quarter of the noise schedule, whose level [N]
    lies in [0,1). Nothing here waits for the device: to pick the pairs of a quarter out would."""
    found = {"loss": loss.detach()} | preference_metrics(errors.detach(), batch, beta=beta)
    accuracies = found.get("rewards/accuracies")
    if accuracies is None:
        return {**found}
    quarter = (level[batch.chosen] * TIMESTEP_BINS).long()
    return found | {f"accuracies/t{q}": (accuracies, quarter == q) for q in range(TIMESTEP_BINS)}


class Window:
    """Sums over the steps since the last line of the log. Nothing leaves the device before `close`."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Values]) -> None:
        """Add numbers of one step."""
        for key, values in metrics.items():
            values, counted = values if isinstance(values, tuple) else (values, torch.ones_like(values))
            values = torch.where(counted > 0, values, 0.0)
            total = torch.stack([values.sum(), (values * values).sum(), counted.sum().to(values)]).double()
            self.totals[key] = self.totals[key] + total if key in self.totals else total

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Moments]:
        """(mean, standard error, count) of each key over all ranks, for keys that had values; starts the next
        window."""
        keys = sorted(self.totals)
        rows = reduce(torch.stack([self.totals[key] for key in keys])).tolist()
        self.totals = {}
        return {key: moments(*row) for key, row in zip(keys, rows, strict=True) if row[2]}


def moments(total: float, squares: float, count: float) -> Moments:
    """Sums -> (mean, standard error of the mean, count)."""
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0) / count), int(count)


def append_line(path: Path, line: dict) -> None:
    """One more line of a log of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def step_of(line: str) -> float:
    """The step a line belongs to; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def truncate_lines(path: Path, step: int) -> None:
    """Drop lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if step_of(line) <= step]
        fresh = path.with_suffix(".fresh")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(path)
