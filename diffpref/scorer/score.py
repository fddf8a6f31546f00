"""Scores, comparisons, ranks and streams: what follows from a scorer's two methods, prepare and judge.

Pictures are opened and prepared in threads, a bounded number ahead of the model, so memory does not grow with their
number. Nothing here knows what a scorer is made of.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffpref.scorer.inputs import check_prompt, in_step, known_length, one_by_one, open_any, paired

In = TypeVar("In")
Out = TypeVar("Out")

SHOW_AFTER = 2.0  # seconds: short work has no progress bar


@dataclass(frozen=True)
class Verdict:
    """Of one picture: its score, or why it has none."""

    score: float | None
    fault: str | None = None


@dataclass(frozen=True)
class Ready:
    """Prepared pictures that belong together (one, or the two of a comparison) and their prompt; or what went wrong."""

    prepared: tuple[Any, ...] = ()
    prompt: str = ""
    error: Exception | None = None


class Scoring:
    """What every scorer can do. Keyword arguments only: the packages of others disagree on their order.

    images: what diffpref/scorer/inputs.py takes; prompts: one for each picture, or one for all.
    batch_size: pictures judged at once.  workers: threads that open pictures, 0 for none; by default one a core.
    progress: whether a bar is shown; by default on a terminal, when it takes long.
    """

    name: str
    temperature: float
    needs_prompt: bool
    any_mode: bool
    prepare: Callable[[Image.Image], Any]
    judge: Callable[[list[Any], list[str]], Tensor]

    def logits(self, first: list[Any], second: list[Any], prompts: list[str]) -> Tensor:
        """Log-odds [N] at temperature 1 that first[i] is preferred to second[i]: the difference of their scores."""
        scores = self.judge([*first, *second], [*prompts, *prompts])
        return scores[: len(first)] - scores[len(first) :]

    def for_user(self, user: Any) -> "Scoring":
        """The same scorer, judging as one user would. Raises ValueError for a user it does not know."""
        raise ValueError(f"the scorer {self.name} knows no users: leave user out, got {user!r}")

    def score(
        self,
        *,
        images: Any,
        prompts: str | Iterable[str] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        user: Any = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Scores [N], fp32 on the CPU; higher is better. What cannot be scored raises ValueError, FileNotFoundError or
        TypeError, which says the picture's number, from 0; `stream` lists such pictures and goes on."""
        scorer = self if user is None else self.for_user(user)
        items = (((image,), prompt) for image, prompt in paired(images, prompts, self.needs_prompt))
        scores: list[float] = []
        for chunk in shown(batches(scorer, items, batch_size, workers), known_length(images), progress):
            refuse(chunk, len(scores))
            judged = scorer.judge([r.prepared[0] for r in chunk], [r.prompt for r in chunk])
            scores += finite(scorer, judged, len(scores))
        return torch.tensor(scores, dtype=torch.float32)

    def compare(
        self,
        *,
        first: Any,
        second: Any,
        prompts: str | Iterable[str] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        user: Any = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Probabilities [N] that first[i] is preferred to second[i]. Raises as `score`, and ValueError for different
        numbers of pictures."""
        scorer = self if user is None else self.for_user(user)
        pairs = couples(first, second, prompts, self.needs_prompt)
        found: list[float] = []
        for chunk in shown(batches(scorer, pairs, batch_size, workers), known_length(first), progress):
            refuse(chunk, len(found))
            sides = ([r.prepared[0] for r in chunk], [r.prepared[1] for r in chunk])
            found += finite(scorer, scorer.logits(*sides, [r.prompt for r in chunk]), len(found))
        # P(first ≻ second) = σ(logit / T): Bradley and Terry, 1952; T as in Guo et al., 2017 (arXiv 1706.04599)
        return torch.sigmoid(torch.tensor(found, dtype=torch.float32) / self.temperature)

    def rank(self, *, images: Any, prompt: str | None = None, **options: Any) -> list[int]:
        """Numbers of the pictures, best first; equal ones stay in order. `options` are those of `score`."""
        scores = self.score(images=images, prompts=prompt, **options)
        return torch.sort(scores, descending=True, stable=True).indices.tolist()

    def stream(
        self, items: Iterable[tuple[Any, str | None]], batch_size: int = 32, workers: int | None = None
    ) -> Iterator[Verdict]:
        """A verdict of every (picture, prompt), in order; one that cannot be opened or has no prompt says so in its
        fault. At most a few batches are held at any time."""
        single = (((image,), prompt) for image, prompt in items)
        for chunk in batches(self, single, batch_size, workers):
            good = [ready for ready in chunk if ready.error is None]
            scores = self.judge([r.prepared[0] for r in good], [r.prompt for r in good]).tolist() if good else []
            rest = iter(scores)
            yield from (verdict(next(rest)) if r.error is None else Verdict(None, str(r.error)) for r in chunk)


def verdict(score: float) -> Verdict:
    """A score, or the fault that it is no number."""
    return Verdict(score) if math.isfinite(score) else Verdict(None, f"score not finite: {score}")


def couples(first: Any, second: Any, prompts: Any, needed: bool) -> Iterator[tuple[tuple[Any, Any], str]]:
    """((first, second), prompt) of every comparison. Raises ValueError where the numbers differ."""
    numbers = known_length(first), known_length(second)
    if None not in numbers and numbers[0] != numbers[1]:
        raise ValueError(f"{numbers[0]} first pictures and {numbers[1]} second ones: a comparison takes one of each")
    both = in_step(paired(first, prompts, needed), one_by_one(second), "second pictures")
    return (((left, right), prompt) for (left, prompt), right in both)


def ready(item: tuple[tuple[Any, ...], str | None], scorer: Scoring, prompted: bool) -> Ready:
    """Open and prepare what is judged together. Runs in threads."""
    images, prompt = item
    try:
        prompt = check_prompt(prompt, prompted and scorer.needs_prompt)
        opened = (open_any(image, rgb=not scorer.any_mode) for image in images)
        return Ready(tuple(scorer.prepare(picture) for picture in opened), prompt)
    except (ValueError, TypeError, OSError, ImportError) as error:  # ImportError: a URL whose package is not installed
        return Ready(error=error)


def batches(
    scorer: Scoring,
    items: Iterable[tuple[tuple[Any, ...], str | None]],
    batch_size: int,
    workers: int | None,
    prompted: bool = True,
) -> Iterator[list[Ready]]:
    """What is judged at once, prepared while the one before it is judged. Raises ValueError for impossible sizes."""
    if batch_size < 1 or (workers or 0) < 0:
        raise ValueError(f"batch_size is {batch_size} and workers {workers}; they must be at least 1 and 0")
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    prepared = in_threads(partial(ready, scorer=scorer, prompted=prompted), items, workers, ahead=2 * batch_size)
    while chunk := list(islice(prepared, batch_size)):
        yield chunk


def in_threads(function: Callable[[In], Out], items: Iterable[In], workers: int, ahead: int) -> Iterator[Out]:
    """`function` of every item, in order, computed in threads at most `ahead` items before they are asked for."""
    if workers == 0:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(workers), deque[Future[Out]]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def refuse(chunk: list[Ready], before: int) -> None:
    """Raise the first error of a batch, as one of the same kind that says which picture it is about."""
    for number, one in enumerate(chunk, before):
        if one.error is not None:
            kinds = (FileNotFoundError, TypeError, ValueError)
            kind = next((kind for kind in kinds if isinstance(one.error, kind)), ValueError)
            raise kind(f"picture {number}: {one.error}") from one.error


def finite(scorer: Scoring, scores: Tensor, before: int) -> list[float]:
    """The scores of a batch. Raises ValueError for what is no number."""
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"picture {before + int(bad[0])}: {scorer.name} gives {scores[bad[0]].item()}, no number")
    return scores.tolist()


def shown(chunks: Iterator[list[Ready]], total: int | None, progress: bool | None) -> Iterator[list[Ready]]:
    """The batches, with a progress bar in pictures."""
    hidden = None if progress is None else not progress  # None: hidden where there is no terminal
    with tqdm(total=total, unit="picture", disable=hidden, delay=0 if progress else SHOW_AFTER) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))
