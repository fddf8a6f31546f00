"""Scored pictures -> groups of one prompt, with one score for each picture: what several scorers say together.

Scores of different models have no common scale: votes and majority need none, mean gives each scorer one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffpref.data.votes import fractions, shares
from diffpref.synpic.scored import ERROR, Scored

Table = list[list[float]]  # [n][k]: what each of n scorers gave to each of k pictures
Scale = Sequence[tuple[float, float]]  # of each scorer, mean and standard deviation over all pictures


@dataclass(frozen=True)
class Group:
    """k pictures of one prompt. table: [n][k].  scores: [k], higher is better.  wins: [k][k], the share of scorers
    that put i above j."""

    pictures: list[Scored]
    table: Table
    scores: list[float]
    wins: list[list[float]]

    @property
    def gap(self) -> float:
        """From the best to the worst."""
        return max(self.scores) - min(self.scores)


@dataclass
class Left:
    """What was left out, by reason: pictures, and groups."""

    pictures: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)


# --- several scorers, one score -------------------------------------------------------------------------------------


# RankDPO (2410.18013): φ_i = C_i / (n (k - 1)), where C_i counts the comparisons that i wins, over scorers and others.
def by_votes(table: Table, scale: Scale) -> list[float]:
    """The share of all comparisons that each picture wins, in [0, 1]."""
    return fractions(shares(table), len(table))


# As in BalancedDPO (2503.12575): i beats j where more than half of the scorers say so; an even split is half a win.
def by_majority(table: Table, scale: Scale) -> list[float]:
    """The share of the others that each picture beats by majority, in [0, 1]."""
    wins = shares(table)
    decided = [[(share > 0.5) + 0.5 * (share == 0.5) for share in line] for line in wins]
    return fractions(decided, 1)


def by_mean(table: Table, scale: Scale) -> list[float]:
    """The mean over scorers of (score - mean) / deviation; no share, but in standard deviations."""
    normalised = [
        [(score - mean) / deviation for score in line] for line, (mean, deviation) in zip(table, scale, strict=True)
    ]
    return np.mean(normalised, axis=0).tolist()


BY: dict[str, Callable[[Table, Scale], list[float]]] = {"votes": by_votes, "majority": by_majority, "mean": by_mean}


def scale_of(pictures: Sequence[Scored], scorers: Sequence[str]) -> Scale:
    """Mean and standard deviation of each scorer; a deviation of 1 where it says the same of all."""
    values = np.array([[one.scores[name] for name in scorers] for one in pictures]).reshape(-1, len(scorers))
    deviation = values.std(axis=0)
    return list(zip(values.mean(axis=0).tolist(), np.where(deviation > 0, deviation, 1.0).tolist(), strict=True))


# --- groups ---------------------------------------------------------------------------------------------------------


def usable(pictures: Iterable[Scored], scorers: Sequence[str], left: Left) -> Iterator[Scored]:
    """Those with a prompt and a score of each scorer; the others are counted."""
    for one in pictures:
        if not one.prompt:
            left.pictures["without a prompt"] += 1
        elif one.about.get(ERROR):
            left.pictures["that could not be scored"] += 1
        elif any(name not in one.scores for name in scorers):
            left.pictures["not scored by all"] += 1
        else:
            yield one


def rank(
    pictures: Sequence[Scored],
    scorers: Sequence[str],
    left: Left,
    *,
    by: str = "votes",
    columns: Sequence[str] = (),
    min_gap: float = 0.0,
) -> list[Group]:
    """Groups of the pictures that share their prompt, and what further columns say, with more than one picture and a
    gap between best and worst; what is left out is counted.

    Raises ValueError for a column that is not there, and where no group is left.
    """
    for name in columns:
        if not any(name in one.about for one in pictures):
            raise ValueError(f"--group-by: there is no column {name!r}")
    kept = list(usable(pictures, scorers, left))
    scale, together = scale_of(kept, scorers) if kept else (), defaultdict(list)
    for one in kept:
        together[(one.prompt, *(one.about.get(name) for name in columns))].append(one)
    groups = [judge(some, scorers, by, scale) for some in together.values() if len(some) > 1]
    left.groups["of one picture"] = len(together) - len(groups)
    return with_gap(groups, min_gap, left)


def judge(pictures: list[Scored], scorers: Sequence[str], by: str, scale: Scale) -> Group:
    """What the scorers say together of some pictures."""
    table = [[one.scores[name] for one in pictures] for name in scorers]
    return Group(pictures, table, BY[by](table, scale), shares(table))


def with_gap(groups: list[Group], min_gap: float, left: Left) -> list[Group]:
    """Groups that say which picture is better. Raises ValueError where there is none."""
    left.groups["all equal"] = sum(group.gap == 0 for group in groups)
    kept = [group for group in groups if group.gap > 0 and group.gap >= min_gap]
    left.groups["of a smaller gap than --min-gap"] = len(groups) - len(kept) - left.groups["all equal"]
    if not kept:
        raise ValueError(f"no group of pictures is left to be ranked; {reasons(left)}")
    return kept


def reasons(left: Left) -> str:
    """Counts in words."""
    said = {
        what: ", ".join(f"{number} {reason}" for reason, number in counts.items() if number)
        for what, counts in (("pictures", left.pictures), ("groups", left.groups))
    }
    return "left out: " + ("; ".join(f"{what} {text}" for what, text in said.items() if text) or "none")
