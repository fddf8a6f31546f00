"""One pass over all items: rows to disk or to the table, the bar, and what is said at the end."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from diffpref.scorer.contract import Scorer
from diffpref.scoring.columns import PICTURE
from diffpref.scoring.items import Item
from diffpref.scoring.judging import IMAGE, judged
from diffpref.scoring.outputs import finish
from diffpref.scoring.prompts import Lined, Said, prompt_of
from diffpref.scoring.sources import Sources
from diffpref.scoring.summary import Tally
from diffpref.scoring.unfinished import Unfinished


@dataclass(frozen=True)
class Plan:
    """How it is done.

    out: file of the scores; None prints the best.  keep: copy pictures there.  request: JSON values that must be the
    same for a run to go on with what another began.  fresh: do not go on.  overwrite: replace a file `out` that is
    there.  shown: rows of the printed table.  carried: columns of the rows that are scores already.
    """

    out: Path | None
    batch_size: int
    workers: int
    keep: bool = False
    request: dict[str, Any] | None = None
    fresh: bool = False
    overwrite: bool = False
    shown: int = 20
    carried: tuple[str, ...] = ()


def refuse_to_replace(out: Path | None, overwrite: bool) -> None:
    """Raise ValueError where a file is there that nobody said to replace."""
    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; --overwrite replaces it")


def check(sources: Sources, given: Said | None) -> tuple[int | None, bool]:
    """Before long work: how many items there are (None: not known), and whether one of them may have a prompt.

    Raises ValueError for pictures with two prompts, and for another number of prompts than pictures.
    """
    counts = sources.counts()
    total = None if None in counts else sum(counts)
    if isinstance(given, Lined) and total != len(given.prompts):
        pictures = "pairs from standard input" if total is None else f"{total} pictures"
        raise ValueError(f"--prompts: {len(given.prompts)} lines for {pictures}; give one for each, or one for all")
    if isinstance(given, Lined):
        sources.refuse_unclear_order()
    seen = [prompt_of(item, number, given) for number, item in sources.glance(counts)]
    return total, any(prompt is not None for prompt in seen) or len(seen) != total


def score_all(items: Iterator[Item], total: int | None, scorers: Mapping[str, Scorer], plan: Plan) -> None:
    """Score, write, print. Raises ValueError when nothing could be scored."""
    tally = Tally(list(scorers), plan.shown if plan.out is None else 0)
    if plan.out is None:
        with Progress(tally, total) as progress:
            for _, row in rows(items, scorers, plan):
                progress.add(row)
        print("\n".join(tally.table()))
    else:
        progress = score_to(plan.out, items, total, scorers, plan, tally)
    where = f"; the column error of {plan.out} has all" if plan.out else ""
    print("\n".join([tally.line(progress.new, progress.seconds), *tally.troubles(where)]))
    if not tally.scored:
        raise ValueError(f"none of {tally.rows} pictures could be scored")


def score_to(
    out: Path, items: Iterator[Item], total: int | None, scorers: Mapping[str, Scorer], plan: Plan, tally: Tally
) -> "Progress":
    """Score into a file; what an earlier run did is not done again."""
    kinds: dict[str, pa.DataType] = dict.fromkeys(scorers, pa.float64()) | ({IMAGE: PICTURE} if plan.keep else {})
    unfinished = Unfinished(out, plan.request or {}, kinds, plan.fresh)
    try:
        progress = appended(unfinished, items, total, scorers, plan, tally)
        if tally.rows:
            finish(unfinished, out, dict.fromkeys([*plan.carried, *scorers]))
    finally:
        if not unfinished.done:
            unfinished.remove()
        unfinished.close()
    return progress


def appended(
    unfinished: Unfinished,
    items: Iterator[Item],
    total: int | None,
    scorers: Mapping[str, Scorer],
    plan: Plan,
    tally: Tally,
) -> "Progress":
    """Score what is not done yet. Raises ValueError where the target came to be there since the run began."""
    refuse_to_replace(plan.out, plan.overwrite)
    for row in unfinished.earlier():
        tally.add(row)
    progress = Progress(tally, total)
    try:
        with progress, unfinished:
            for item, row in rows(unfinished.skip(items), scorers, plan):
                unfinished.add(item, row)
                progress.add(row)
    except BaseException:
        if progress.new:
            print(f"{unfinished.done} rows are kept in {unfinished.folder}; the same command goes on from there")
        raise
    return progress


def rows(items: Iterator[Item], scorers: Mapping[str, Scorer], plan: Plan) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Items with their rows."""
    return judged(items, scorers, batch_size=plan.batch_size, workers=plan.workers, keep=plan.keep)


class Progress:
    """A bar over the rows of this run, and its time."""

    def __init__(self, tally: Tally, total: int | None):
        self.tally, self.new, self.seconds = tally, 0, 0.0
        self.bar = tqdm(total=total, initial=tally.rows, desc="scoring", unit="image")

    def __enter__(self) -> "Progress":
        self.started = time.perf_counter()
        return self

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self.tally.add(row)
        self.new += 1
        if self.tally.failed:
            self.bar.set_postfix(failed=self.tally.failed, refresh=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.bar.close()
