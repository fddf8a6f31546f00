"""Which measures a set of preferences allows, in the order in which they are shown.

A section takes a Case and gives names with measures; it gives none where the data do not have what it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from diffpref.scorer import measures as of
from diffpref.scorer.evidence import Evidence, clusters_of
from diffpref.scorer.measures import Measured, Resampling, Threshold
from diffpref.scorer.measures.measured import counted

Measures = dict[str, Measured]
KNOWN = "known probabilities"


@dataclass(frozen=True)
class Case:
    """A scorer and what people said.

    scores [N]: of the items, NaN for those that no pair and no list has.  margin [P]: log-odds that the first of a
    pair is preferred, temperature applied.  aspects: the same by aspect, of those that the scorer names itself; others
    are measured by its one score.  thresholds: for ties, by name, from other pairs; chosen in-sample where
    there are none.  weight [P]: of each pair in the accuracy.
    """

    evidence: Evidence
    scores: np.ndarray
    margin: np.ndarray
    resampling: Resampling
    aspects: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    weight: np.ndarray | None = None


def accuracies(case: Case) -> Measures:
    """On pairs with a winner."""
    e = case.evidence
    return {"accuracy": of.accuracy(case.margin, e.label, e.clusters, case.resampling, weight=case.weight)}


def ties(case: Case) -> Measures:
    """Where people tied."""
    e, m = case.evidence, case.margin
    if not (e.label == 0).any():
        return {}
    half = case.thresholds.get("half") or of.pickscore_threshold(m, e.label)
    best = case.thresholds.get("three") or of.tie_calibration(m, e.label)
    given = e.clusters, case.resampling
    return {
        "accuracy, ties half (PickScore)": of.with_half_points(m, e.label, half, *given),
        "accuracy, three-way": of.three_way(m, e.label, Threshold(0.0, "none: exact ties alone"), *given),
        "accuracy, three-way, tie-calibrated": of.three_way(m, e.label, best, *given),
    }


def calibration(case: Case) -> Measures:
    """Against labels, or probabilities where the data have them."""
    target, known = of.target_of(case.evidence.label, case.evidence.probability)
    return against(case, target, known, "")


def against(case: Case, target: np.ndarray, known: np.ndarray, suffix: str) -> Measures:
    """Calibration error, log loss and Brier score on pairs with a target."""
    if not known.any():
        return {}
    names = {name: [x for x, good in zip(v, known, strict=True) if good] for name, v in case.evidence.clusters.items()}
    given = case.margin[known], target[known], names, case.resampling
    return {
        f"calibration error{suffix}": of.calibration_error(*given),
        f"log loss{suffix}": of.log_loss(*given),
        f"Brier score{suffix}": of.brier(*given),
    }


def known_truth(case: Case) -> Measures:
    """Against the probabilities of a column that was named."""
    e = case.evidence
    if e.truth is None:
        return {}
    calibrated = against(case, e.truth, np.isfinite(e.truth), f", {KNOWN}")
    return of.against_truth(case.margin, e.truth, e.clusters, case.resampling) | calibrated


def lists(case: Case) -> Measures:
    """List by list."""
    found = case.evidence.lists
    if not found:
        return {}
    clusters = clusters_of([one.prompt for one in found], [one.user for one in found])
    return of.list_measures([(case.scores[one.items], one.truth) for one in found], clusters, case.resampling)


def users(case: Case) -> Measures:
    """User by user, where there are two."""
    e = case.evidence
    if len(choosers(e)) < 2:
        return {}
    return {
        "accuracy, mean of users": of.macro_accuracy(case.margin, e.label, e.clusters, case.resampling),
        "accuracy, worst tenth of users": of.worst_users(of.per_user(case.margin, e.label, e.users), case.resampling),
    }


def choosers(evidence: Evidence) -> set:
    """Users of pairs with a winner."""
    said = zip(evidence.users, evidence.label, strict=True)
    return {user for user, label in said if user is not None and label != 0}


def cycles(case: Case) -> Measures:
    """Where majorities go round in a circle."""
    e = case.evidence
    triples = of.cyclic_triples(of.edges(e.pairs, e.label))
    if not triples:
        return {}
    clusters = {"prompt": [e.items[a].prompt for a, _, _ in triples]}
    return {"cyclic triples": of.cyclic_accuracy(triples, of.edges(e.pairs, case.margin), clusters, case.resampling)}


def aspects(case: Case) -> Measures:
    """Aspect by aspect."""
    e = case.evidence
    margins = {name: case.aspects.get(name, case.margin) for name in e.aspects}
    found = of.by_aspect(margins, e.aspects, e.clusters, case.resampling)
    whose = {name: "the scorer's own aspect" if name in case.aspects else "by its one score" for name in found}
    return {f"accuracy, {name}": replace(one, policy=f"{whose[name]}; {one.policy}") for name, one in found.items()}


# what a picture has more or less of, from (height, width) [..., 2]
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pixels": lambda size: np.log(size[..., 0] * size[..., 1]),
    "width to height": lambda size: np.log(size[..., 1] / size[..., 0]),
}


def biases(case: Case) -> Measures:
    """By size, shape and length of the prompt, as far as they vary."""
    e, used = case.evidence, np.isfinite(case.scores)
    words = np.array([len(item.prompt.split()) for item in e.items], dtype=np.float64)
    prompts = [item.prompt for item, good in zip(e.items, used, strict=True) if good]
    quantities = {name: shape(e.sizes.astype(np.float64)) for name, shape in SHAPES.items()} | {"prompt length": words}
    found = {
        f"correlation of score and {name}": of.correlation(
            case.scores[used], values[used], {"prompt": prompts}, case.resampling
        )
        for name, values in quantities.items()
    }
    found |= {f"leaning to more {name}": leaning(case, quantities[name]) for name in SHAPES}
    measured = {name: one for name, one in found.items() if one is not None}
    return measured | split(case, pixel_parts(case, quantities["pixels"])) | split(case, word_parts(case, words))


def leaning(case: Case, quantity: np.ndarray) -> Measured | None:
    """How much oftener than people the scorer prefers the picture that has more of it."""
    e = case.evidence
    first, second = quantity[e.pairs].T
    return of.preference_for(case.margin, e.label, first - second, e.clusters, case.resampling)


def pixel_parts(case: Case, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs by whether the winner is the larger picture."""
    first, second = pixels[case.evidence.pairs].T
    more = np.sign(first - second) * np.sign(case.evidence.label)
    return {"winner larger": more > 0, "winner smaller": more < 0, "of one size": first == second}


def word_parts(case: Case, words: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs by the length of their prompt, about the median."""
    length = words[case.evidence.pairs[:, 0]]
    middle = int(np.median(length))
    return {f"prompts up to {counted(middle, 'word')}": length <= middle, "longer prompts": length > middle}


def split(case: Case, parts: dict[str, np.ndarray]) -> Measures:
    """Accuracy in the parts; none where one part has all pairs."""
    e = case.evidence
    if any(rows.all() for rows in parts.values()):
        return {}
    found = of.by_split(case.margin, e.label, parts, e.clusters, case.resampling)
    return {f"accuracy, {name}": measured for name, measured in found.items()}


SECTIONS: tuple[Callable[[Case], Measures], ...] = (
    accuracies, known_truth, ties, calibration, lists, users, cycles, aspects, biases,
)  # fmt: skip


def measured(case: Case) -> Measures:
    """All that the data allow."""
    return {name: one for section in SECTIONS for name, one in section(case).items()}


# --- what the data do not allow ---------------------------------------------------------------------------------------


def no_users(case: Case) -> str:
    """Why there are no measures of users."""
    if all(user is None for user in case.evidence.users):
        return "no user_id"
    return f"{counted(len(choosers(case.evidence)), 'user')} with a choice"


def no_bias(what: str) -> Callable[[Case], str]:
    """Why a correlation is not measured: of two things one is always the same."""
    return lambda case: "all scores are equal" if np.ptp(case.scores[np.isfinite(case.scores)]) == 0 else what


# name -> a measure that is there if it was measured, and else the reason
ABSENT: dict[str, tuple[str, Callable[[Case], str]]] = {
    "ties": ("accuracy, three-way", lambda case: "no tied pair"),
    "calibration": ("calibration error", lambda case: "no probability of any pair is known"),
    "lists": ("Kendall tau-b", lambda case: f"the data are {case.evidence.kind.name}"),
    "users": ("accuracy, mean of users", no_users),
    "cycles": ("cyclic triples", lambda case: "no cyclic triple in the data"),
    "size bias": ("correlation of score and pixels", no_bias("all pictures have the same number of pixels")),
    "shape bias": ("correlation of score and width to height", no_bias("all pictures have the same shape")),
    "prompt length": ("correlation of score and prompt length", no_bias("all prompts have the same number of words")),
}


def not_measured(case: Case, found: Measures) -> dict[str, str]:
    """What is not among the measures -> why; aspects that were asked for, and what nobody had to ask for."""
    unsaid = {name: "no pair is judged in it" for name in case.evidence.aspects if f"accuracy, {name}" not in found}
    return {name: why(case) for name, (measure, why) in ABSENT.items() if measure not in found} | unsaid
