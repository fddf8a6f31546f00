"""What a ranking says, for people: who wins how often, and whether the scorers agree."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.stats import kendalltau

from diffpref.synpic.ranking import Group, Left, reasons


def wins_of(groups: Sequence[Group]) -> dict[str, float]:
    """Pipeline -> the share of groups whose best picture is its own, ties shared; empty where none is known."""
    won: dict[str, float] = {}
    for group in groups:
        names = [one.about.get("pipeline") for one in group.pictures]
        won = dict.fromkeys(filter(None, names), 0.0) | won
        best = [name for name, score in zip(names, group.scores, strict=True) if score == max(group.scores)]
        for name in filter(None, best):
            won[name] += 1 / len(best)
    return {name: won[name] / len(groups) for name in sorted(won)}


# Kendall's τ_b: (concordant - discordant) / sqrt(pairs not tied in one · pairs not tied in the other)
def agreement(groups: Sequence[Group], scorers: Sequence[str]) -> dict[tuple[str, str], tuple[float, int]]:
    """Two scorers -> the mean of τ_b over groups, and of how many: where one finds all pictures equal there is none."""
    found = {}
    for (i, one), (j, other) in combinations(enumerate(scorers), 2):
        both = [(group.table[i], group.table[j]) for group in groups]
        taus = [kendalltau(a, b, variant="b").statistic for a, b in both if len(set(a)) > 1 and len(set(b)) > 1]
        found[one, other] = (float(np.mean(taus)) if taus else float("nan"), len(taus))
    return found


def lines(groups: Sequence[Group], scorers: Sequence[str], left: Left, by: str) -> list[str]:
    """For people."""
    sizes = Counter(len(group.pictures) for group in groups)
    shown = ", ".join(f"{number} of {size}" for size, number in sorted(sizes.items()))
    said = [f"scorers      {', '.join(scorers)}, by {by}", f"groups       {len(groups)} ({shown} pictures)"]
    said.append(f"left out     {reasons(left).removeprefix('left out: ')}")
    if won := wins_of(groups):
        said.append(f"best         {', '.join(f'{name} {share:.3f}' for name, share in won.items())} of the groups")
    for (one, other), (tau, number) in agreement(groups, scorers).items():
        said.append(f"agreement    {one}, {other}: Kendall's tau-b {tau:.3f}, mean of {number} groups")
    return said
