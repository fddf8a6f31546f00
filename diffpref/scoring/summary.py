"""What is said at the end: how many, how fast, the mean, the best, and what could not be scored."""

import heapq
from collections.abc import Sequence
from typing import Any

from diffpref.scoring.items import called
from diffpref.scoring.judging import ERROR

FAULTS = 20  # so many are said; all are in the output
WIDTH = 60  # letters of a prompt or a path in the table


class Tally:
    """Counts rows and keeps the best of them, by the first scorer.

    Args:
        scorers: The columns of scores.
        shown: How many are kept.
    """

    def __init__(self, scorers: Sequence[str], shown: int):
        self.scorers, self.shown = list(scorers), shown
        self.rows, self.scored = 0, 0
        self.sums = dict.fromkeys(scorers, 0.0)
        self.counts = dict.fromkeys(scorers, 0)
        self.best: list[tuple[float, int, dict[str, Any]]] = []
        self.faults: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        self.scored += row[ERROR] is None
        if row[ERROR] is not None and len(self.faults) < FAULTS:
            self.faults.append(f"{called(row)}: {row[ERROR]}")
        for name in self.scorers:
            if row[name] is not None:
                self.sums[name] += row[name]
                self.counts[name] += 1
        self.keep(row)

    def keep(self, row: dict[str, Any]) -> None:
        """Keep the row if it is among the best; of equal ones the first."""
        first = row[self.scorers[0]]
        if first is None:
            return
        brief = {name: row[name] for name in (*self.scorers, "prompt")} | {"name": called(row)}
        heapq.heappush(self.best, (first, -self.rows, brief))
        if len(self.best) > self.shown:
            heapq.heappop(self.best)

    @property
    def failed(self) -> int:
        """Rows with an error."""
        return self.rows - self.scored

    def line(self, new: int, seconds: float) -> str:
        """One line. new: rows of this run; the others were there from before."""
        means = ", ".join(f"{n} {self.sums[n] / self.counts[n]:.4g}" for n in self.scorers if self.counts[n])
        there = f", {self.rows - new} of them before" if new < self.rows else ""
        return f"{self.scored} of {self.rows} pictures scored{there}; {new / max(seconds, 1e-9):.1f} images/s" + (
            f"; mean: {means}" if means else ""
        )

    def troubles(self, where: str) -> list[str]:
        """The first faults, a line each. where: where the others are said."""
        if not self.failed:
            return []
        more = self.failed - len(self.faults)
        rest = [f"  and {more} more{where}"] if more else []
        return [f"{self.failed} could not be scored:", *(f"  {fault}" for fault in self.faults), *rest]

    def table(self) -> list[str]:
        """The best, a line each."""
        ranked = [brief for _, _, brief in sorted(self.best, key=lambda kept: kept[:2], reverse=True)]
        width = max([8, *map(len, self.scorers)])
        head = "  ".join([*(f"{name:>{width}}" for name in self.scorers), "picture"])
        return [head, *(self.cells(brief, width) for brief in ranked)]

    def cells(self, brief: dict[str, Any], width: int) -> str:
        """One line of the table."""
        numbers = [f"{brief[n]:>{width}.4f}" if brief[n] is not None else " " * width for n in self.scorers]
        prompt = [] if brief["prompt"] is None else [short(brief["prompt"])]
        return "  ".join([*numbers, short(brief["name"], end=True), *prompt])


def short(text: str, end: bool = False) -> str:
    """A text that fits a line; `end`: its end is kept."""
    text = " ".join(text.split())
    if len(text) <= WIDTH:
        return text
    return f"…{text[1 - WIDTH :]}" if end else f"{text[: WIDTH - 1]}…"
