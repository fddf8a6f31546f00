"""Items -> rows: each picture is opened once, in a thread, and judged by every scorer."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from diffpref.data.pictures import open_picture, read_bytes, to_rgb, upright
from diffpref.scorer.contract import Scorer
from diffpref.scorer.inputs import check_prompt
from diffpref.scorer.score import in_threads
from diffpref.scoring.items import Item

ERROR, IMAGE = "error", "image"  # columns


@dataclass
class Ready:
    """An item whose picture is prepared for each scorer, or the fault; its file's bytes where they are kept."""

    item: Item
    prepared: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    content: bytes | None = None


def judged(
    items: Iterable[Item], scorers: Mapping[str, Scorer], *, batch_size: int, workers: int, keep: bool = False
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Every item with its row, in order: where it lies, prompt, other columns, a score by each scorer (None where there
    is none), error, and with `keep` the picture's file.

    At most three batches are held, prepared; of pictures that are opened, one a worker.
    """
    work = partial(ready, scorers=scorers, keep=keep)
    stream = in_threads(work, items, workers, ahead=2 * batch_size)
    while batch := list(islice(stream, batch_size)):
        scores = judge(batch, scorers)
        yield from ((one.item, row(one, found, keep)) for one, found in zip(batch, scores, strict=True))


def ready(item: Item, scorers: Mapping[str, Scorer], keep: bool) -> Ready:
    """Open and prepare. Runs in threads."""
    if item.fault or item.picture is None:
        return Ready(item, fault=item.fault or "picture missing")
    try:
        check_prompt(item.prompt, any(scorer.needs_prompt for scorer in scorers.values()))
        content = read_bytes(item.picture) if keep else None
        value = {"bytes": content, "path": None} if keep else item.picture
        return Ready(item, prepared(value, scorers), content=content)
    except (ValueError, OSError, ImportError) as error:  # ImportError: a URL whose package is not installed
        return Ready(item, fault=str(error))


def prepared(value: dict[str, Any], scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """A picture, opened once, as each scorer takes it. Raises ValueError or FileNotFoundError."""
    modes = {scorer.any_mode for scorer in scorers.values()}
    picture = open_picture(value, upright if True in modes else to_rgb)
    rgb = to_rgb(picture) if len(modes) > 1 else picture
    return {name: scorer.prepare(picture if scorer.any_mode else rgb) for name, scorer in scorers.items()}


def judge(batch: list[Ready], scorers: Mapping[str, Scorer]) -> list[dict[str, float | None]]:
    """By item, what each scorer gives it; None to those with a fault. What is no number becomes a fault."""
    good = [one for one in batch if one.fault is None]
    scores: dict[int, dict[str, float | None]] = {id(one): dict.fromkeys(scorers) for one in batch}
    for name, scorer in scorers.items() if good else ():
        given = scorer.judge([one.prepared[name] for one in good], [one.item.prompt or "" for one in good])
        for one, score in zip(good, given.tolist(), strict=True):
            if math.isfinite(score):
                scores[id(one)][name] = score
            else:
                one.fault = f"score not finite: {name} gives {score}"
    return [scores[id(one)] for one in batch]


def row(one: Ready, scores: dict[str, float | None], keep: bool) -> dict[str, Any]:
    """The columns of an item. Ours take the place of those that its row brought."""
    item = one.item
    ours: dict[str, Any] = scores | {ERROR: one.fault}
    if keep:
        ours[IMAGE] = None if one.fault else {"bytes": one.content, "path": item.picture["path"]}
    first = item.where | {"prompt": item.prompt}
    return first | {name: value for name, value in item.columns.items() if name not in first | ours} | ours
