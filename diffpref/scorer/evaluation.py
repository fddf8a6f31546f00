"""Measure scorers on preferences: every picture scored once, then compared as people compared them."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffpref.scorer.calibration import TemperatureBound, fit_temperature
from diffpref.scorer.evidence import Evidence, pictures
from diffpref.scorer.heads import Head
from diffpref.scorer.measures import (
    Measured,
    Reliability,
    Resampling,
    Threshold,
    difference,
    per_user,
    pickscore_threshold,
    reliability,
    target_of,
    tie_calibration,
)
from diffpref.scorer.score import Ready, Scoring, batches
from diffpref.scorer.sections import KNOWN, Case, measured, not_measured


@dataclass(frozen=True)
class Judgement:
    """What a scorer says of a set: scores [N] of items, margin [P] of pairs at temperature 1 and by aspect, NaN where a
    picture could not be scored; its own temperature; faults by item; strangers: users it judged as the population, for
    it does not know them."""

    name: str
    scores: np.ndarray
    margin: np.ndarray
    aspects: dict[str, np.ndarray]
    temperature: float
    faults: dict[int, str]
    strangers: int = 0


@dataclass(frozen=True)
class Result:
    """A scorer's measures on the pairs that all scorers could judge; its temperature and where that is from; its
    reliability, and against what; users: their accuracies, the least first; not_measured: why, by what."""

    name: str
    measures: dict[str, Measured]
    temperature: float
    temperature_from: str
    reliability: Reliability | None
    reliability_against: str
    users: list[dict]
    strangers: int
    not_measured: dict[str, str]


# --- scores -----------------------------------------------------------------------------------------------------------


def judge(
    scorer: Scoring, evidence: Evidence, *, name: str | None = None, batch_size: int = 32, workers: int | None = None
) -> Judgement:
    """Scores of all items, and margins of all pairs; a picture that cannot be scored is a fault.

    Raises:
        ValueError: a score is NaN or infinite; the scorer compares pictures under one prompt, and pairs have two.
    """
    seats, name = Seats(scorer, evidence), name or scorer.name
    scores, faults = item_scores(seats, name, batch_size, workers)
    if decides_by_scores(scorer):
        margin = scores[evidence.pairs[:, 0]] - scores[evidence.pairs[:, 1]]
    else:
        margin = compared(seats, set(faults), name, batch_size, workers)
    aspects = aspect_margins(seats, set(faults), name, batch_size, workers)
    return Judgement(name, scores, margin, aspects, scorer.temperature, faults, len(seats.strangers))


def item_scores(seats: "Seats", name: str, batch_size: int, workers: int | None) -> tuple[np.ndarray, dict[int, str]]:
    """Scores [N], NaN where there is none, and why, by item. Raises ValueError for one that is no number."""
    items = seats.evidence.items
    scores, faults = np.full(len(items), np.nan), {}
    with tqdm(total=len(items), desc=name, unit="picture", delay=1) as bar:
        for one, numbers in seats.by_user(range(len(items))):
            stream = one.stream(pictures(seats.evidence, [items[i] for i in numbers]), batch_size, workers)
            for number, verdict in zip(numbers, stream, strict=True):
                if verdict.score is None:
                    faults[number] = refuse_nan(name, verdict.fault or "")
                else:
                    scores[number] = verdict.score
                bar.update()
    return scores, faults


def refuse_nan(name: str, fault: str) -> str:
    """The fault of a picture. Raises ValueError where it is the scorer's."""
    if fault.startswith("score not finite"):
        raise ValueError(f"the scorer {name} gives a picture no number ({fault}): its weights may be damaged")
    return fault


def decides_by_scores(scorer: Scoring) -> bool:
    """Whether its comparison of two pictures is the difference of their scores."""
    head = getattr(scorer, "head", None)
    return "scores" in head.gives if isinstance(head, Head) else type(scorer).logits is Scoring.logits


class Seats:
    """The scorer as it judges for each user; those it does not know are judged as the population."""

    def __init__(self, scorer: Scoring, evidence: Evidence):
        self.scorer, self.evidence, self.strangers = scorer, evidence, set()

    def by_user(self, numbers: Sequence[int], item_of=lambda number: number) -> Iterator[tuple[Scoring, list[int]]]:
        """(scorer for a user, what is to be judged for them), in order of rows within each."""
        user_of = lambda number: self.evidence.items[item_of(number)].user  # noqa: E731
        ordered = sorted(numbers, key=lambda number: str(user_of(number)))
        for user, group in groupby(ordered, key=user_of):
            yield self.seat(user), list(group)

    def seat(self, user: Any) -> Scoring:
        """The scorer for a user."""
        if user is None:
            return self.scorer
        try:
            return self.scorer.for_user(user)
        except ValueError:
            self.strangers.add(user)
            return self.scorer


def compared(seats: Seats, faulty: set[int], name: str, batch_size: int, workers: int | None) -> np.ndarray:
    """Margins [P] of a scorer that looks at both pictures: each two of them once, NaN where one cannot be scored.

    Raises:
        ValueError: the pictures of a pair have different prompts.
    """
    evidence, items = seats.evidence, seats.evidence.items
    asked = list(map(tuple, evidence.pairs.tolist()))
    pairs, found = [pair for pair in dict.fromkeys(asked) if not faulty & set(pair)], {}
    if any(items[i].prompt != items[j].prompt for i, j in pairs):
        raise ValueError(f"the scorer {name} compares pictures under one prompt, and these pairs have two")
    with tqdm(total=len(pairs), desc=f"{name}, pairs", unit="pair", delay=1) as bar:
        for one, numbers in seats.by_user(range(len(pairs)), lambda number: pairs[number][0]):
            logits = logits_of(one, evidence, [pairs[n] for n in numbers], batch_size, workers)
            for number, logit in zip(numbers, logits, strict=True):
                found[pairs[number]] = logit
                bar.update()
    return np.array([found.get(pair, np.nan) for pair in asked])


def logits_of(
    scorer: Scoring, evidence: Evidence, pairs: list, batch_size: int, workers: int | None
) -> Iterator[float]:
    """The log-odds of each pair of items, one after the other."""
    both = pictures(evidence, [evidence.items[i] for pair in pairs for i in pair])
    items = (((one[0], other[0]), one[1]) for one, other in zip(both, both, strict=True))
    for chunk in batches(scorer, items, batch_size, workers):
        yield from finite_logits(scorer, chunk)


def finite_logits(scorer: Scoring, chunk: list[Ready]) -> list[float]:
    """Of a batch. Raises ValueError for what is no number."""
    sides = ([ready.prepared[side] for ready in chunk] for side in (0, 1))
    found = scorer.logits(*sides, [ready.prompt for ready in chunk])
    if not found.isfinite().all():
        raise ValueError(f"the scorer {scorer.name} gives no number for a pair: its weights may be damaged")
    return found.tolist()


def aspect_margins(
    seats: Seats, faulty: set[int], name: str, batch_size: int, workers: int | None
) -> dict[str, np.ndarray]:
    """Margins [P] in the aspects that both the scorer's head and the data name; of other aspects nothing."""
    scorer, evidence = seats.scorer, seats.evidence
    names = scorer.head.settings.get("names", []) if isinstance(getattr(scorer, "head", None), Head) else []
    if not set(names) & set(evidence.aspects):
        return {}
    found = np.full((len(evidence.items), len(names)), np.nan)
    good = [number for number in range(len(found)) if number not in faulty]
    items = (((picture,), prompt) for picture, prompt in pictures(evidence, [evidence.items[i] for i in good]))
    chunks = tqdm(batches(scorer, items, batch_size, workers), f"{name}, aspects", unit="batch", delay=1)
    with torch.inference_mode():
        judged = [scorer.judged([r.prepared[0] for r in c], [r.prompt for r in c]).aspects.cpu() for c in chunks]
    found[good] = torch.cat(judged).double().numpy()
    first, second = evidence.pairs.T
    return {one: (found[first] - found[second])[:, names.index(one)] for one in names if one in evidence.aspects}


# --- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What comes from other pairs than the measured ones, or from them: the temperature, and thresholds of ties."""

    temperature: float
    source: str
    thresholds: dict[str, Threshold]


def own(judgement: Judgement) -> Fitted:
    """The scorer as it is; thresholds are chosen in-sample."""
    return Fitted(judgement.temperature, "its own", {})


def fit(judgement: Judgement, evidence: Evidence, source: str, *, temperature: bool) -> Fitted:
    """Temperature (if asked for) and thresholds from pairs; `source` is where those are from, "" for the measured ones.

    Raises:
        ValueError: no pair can be used.
    """
    kept = evidence.sound(set(judgement.faults))
    evidence, margin = evidence.without(set(judgement.faults)), judgement.margin[kept]
    fitted = own(judgement)
    if temperature:
        target, known = target_of(evidence.label, evidence.probability)
        if not known.any():
            raise ValueError("a temperature is fitted on pairs with a winner or a probability, and there are none")
        value, said = fitted_quietly(margin[known], target[known])
        fitted = replace(fitted, temperature=value, source=f"fitted {f'on {source}' if source else 'in-sample'}{said}")
    if source and (evidence.label == 0).any():
        z, label = margin / fitted.temperature, evidence.label
        chosen = {"half": pickscore_threshold(z, label, source), "three": tie_calibration(z, label, source)}
        fitted = replace(fitted, thresholds=chosen)
    return fitted


def fitted_quietly(margin: np.ndarray, target: np.ndarray) -> tuple[float, str]:
    """The temperature, and what the fit had to say about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TemperatureBound)
        value = fit_temperature(margin, target)
    return value, "".join(f" ({warning.message})" for warning in caught)


def evaluate(
    judgements: Sequence[Judgement],
    evidence: Evidence,
    fits: Sequence[Fitted],
    resampling: Resampling,
    *,
    prompts_alike: bool = False,
) -> tuple[list[Result], list[tuple[str, str, Measured]]]:
    """Measures of each scorer, and the differences of accuracy of every two, on the pairs that all could judge.

    Args:
        prompts_alike: Let each prompt count the same in the accuracy, however many pairs it has.
    """
    faulty = {item for judgement in judgements for item in judgement.faults}
    kept, part = evidence.sound(faulty), evidence.without(faulty)
    weight = prompt_weights(part.prompts) if prompts_alike else None
    results, margins = [], {}
    for one, fitted in zip(judgements, fits, strict=True):
        margins[one.name] = margin = one.margin[kept] / fitted.temperature
        aspects = {name: values[kept] for name, values in one.aspects.items()}
        case = Case(part, one.scores, margin, resampling, aspects, fitted.thresholds, weight)
        results.append(result(one, fitted, case))
    gaps = [
        (a, b, difference(margins[a], margins[b], part.label, part.clusters, resampling, weight=weight))
        for a, b in combinations(margins, 2)
    ]
    return results, gaps


def result(judgement: Judgement, fitted: Fitted, case: Case) -> Result:
    """All about one scorer."""
    e, found = case.evidence, measured(case)
    target, known, against = best_known(e)
    table = reliability(case.margin[known], target[known]) if known.any() else None
    whose = any(user is not None and label != 0 for user, label in zip(e.users, e.label, strict=True))
    users = per_user(case.margin, e.label, e.users).rows() if whose else []
    given = judgement.name, found, fitted.temperature, fitted.source
    return Result(*given, table, against, users, judgement.strangers, not_measured(case, found))


def best_known(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, str]:
    """Targets [P] of a reliability, which pairs have one [P], and what they are: the column that was named, if any."""
    if evidence.truth is not None:
        return evidence.truth, np.isfinite(evidence.truth), KNOWN
    target, known = target_of(evidence.label, evidence.probability)
    return target, known, "labels" if evidence.probability is None else "probabilities"


def prompt_weights(prompts: list[str]) -> np.ndarray:
    """1 over the number of pairs of its prompt, [P]: as PickScore weighs them."""
    _, index, count = np.unique(np.array(prompts, dtype=object), return_inverse=True, return_counts=True)
    return 1 / count[index]
