"""What came out: numbers with intervals over users and prompts. The judge is each user's own true utility."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr, wilcoxon

from diffpref.emoji_world.users import User, utility
from diffpref.scorer.measures.bootstrap import mean, share
from personal.conditions import AMOUNTS, SEEDS, Plan, spaced
from personal.draw import Drawn
from personal.known import Known

TOPS = (1, 5, 16)
Measure = Callable[..., tuple[float, float, float]]  # values and their clusters -> value, low, high


def measured(values: np.ndarray, users: Sequence, prompts: Sequence[str], of: Measure = mean) -> dict[str, Any]:
    """The mean of values [N], with the interval over users and prompts and that over users alone."""
    values = np.asarray(values, dtype=float)
    value, low, high = of(values, {"user": users, "prompt": prompts})
    alone = of(values, {"user": users})
    return {"value": value, "low": low, "high": high, "by_users": list(alone[1:]), "n": len(values)}


@dataclass(frozen=True)
class Grid:
    """Values of users by prompts [U,P]; some prompts only, by number."""

    values: np.ndarray
    users: list[int]
    prompts: list[str]

    def measured(self, of: Measure = share) -> dict[str, Any]:
        """The mean with its intervals; of shares also what each user's is, and Wilcoxon's test that they are ½."""
        users, prompts = np.repeat(self.users, self.values.shape[1]), self.prompts * len(self.users)
        found = measured(self.values.ravel(), users.tolist(), prompts, of)
        each = self.values.mean(1)
        if of is share and np.any(each != 0.5):
            found |= {"p_half": float(wilcoxon(each - 0.5).pvalue), "each_user": each.round(4).tolist()}
        return found


def won(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first utility is greater, ½ where they are equal."""
    return (1 + np.sign(first - second)) / 2


def judged(user: User, drawn: Drawn, numbers: Sequence[int] | slice = slice(None)) -> np.ndarray:
    """A user's true utilities of some of the pictures."""
    return utility(user, drawn.seen[numbers])


# --- win rates --------------------------------------------------------------------------------------------------------


class Contest:
    """The pictures of all conditions side by side, [U,P] utilities of each."""

    def __init__(self, plan: Plan, right: dict[str, list[Drawn]], general: dict[str, list[Drawn]]) -> None:
        self.plan, self.right, self.general = plan, right, general
        self.users = [one.user.user_id for one in plan.people]

    def grid(self, values: Any, numbers: Sequence[int]) -> Grid:
        return Grid(np.array(values), self.users, self.plan.named(numbers))

    def own(self, condition: str) -> np.ndarray:
        """Of each user's own pictures."""
        return np.array([judged(k.user, d) for k, d in zip(self.plan.people, self.right[condition], strict=True)])

    def nobodys(self, model: str, numbers: Sequence[int]) -> np.ndarray:
        """Of the pictures that a model draws for anybody, at each user's seeds."""
        people, drawn = self.plan.people, self.general[model]
        return np.array([judged(k.user, drawn[self.plan.turn(k.user)], numbers) for k in people])

    def wrong(self, condition: str) -> list[np.ndarray]:
        """For each user [V,P]: their utilities of what was drawn for the other users with the same seeds."""
        people, drawn = self.plan.people, self.right[condition]
        return [
            np.array([judged(k.user, drawn[j]) for j, other in enumerate(people) if self.is_wrong(k, other)])
            for k in people
        ]

    def is_wrong(self, one: Known, other: Known) -> bool:
        return one is not other and self.plan.turn(one.user) == self.plan.turn(other.user)

    def against(self, condition: str) -> dict[str, Any]:
        """One condition's win rates."""
        numbers = self.plan.numbers(condition)
        own, rows = self.own(condition), {}
        rivals = {model: self.nobodys(model, numbers) for model in ("base", "impersonal")}
        for model, rival in rivals.items():
            rows[f"over {model}"] = self.grid(won(own, rival), numbers).measured()
        wrong = self.wrong(condition)
        if all(len(one) for one in wrong):
            rows |= self.of_wrong(own, wrong, rivals, numbers)
        return rows

    def of_wrong(self, own: np.ndarray, wrong: list[np.ndarray], rivals: dict, numbers: Sequence[int]) -> dict:
        """The control: each user judges what was drawn for others, the mean over these."""
        rows = {"right over wrong": [won(u, w).mean(0) for u, w in zip(own, wrong, strict=True)]}
        for model, rival in rivals.items():
            rows[f"wrong over {model}"] = [won(w, r).mean(0) for w, r in zip(wrong, rival, strict=True)]
        found = {name: self.grid(values, numbers).measured() for name, values in rows.items()}
        for model, rival in rivals.items():
            less = won(own, rival) - np.array(rows[f"wrong over {model}"])
            found[f"right - wrong over {model}"] = self.grid(less, numbers).measured(mean)
        return found

    def more(self, condition: str, than: str, rival: str) -> dict[str, Any]:
        """The difference of two conditions' win rates over a rival, on the prompts of both."""
        both = sorted({*self.plan.numbers(condition)} & {*self.plan.numbers(than)})
        theirs, values = self.nobodys(rival, both), []
        for one in (condition, than):
            numbers = self.plan.numbers(one)
            values.append(won(self.own(one)[:, [numbers.index(p) for p in both]], theirs))
        return self.grid(values[0] - values[1], both).measured(mean)

    def impersonal(self) -> dict[str, Any]:
        """The impersonal model over the base, by the new users' own utilities."""
        every = range(len(self.plan.prompts))
        values = won(self.nobodys("impersonal", every), self.nobodys("base", every))
        return self.grid(values, every).measured()

    def nobody(self) -> dict[str, Any]:
        """What the personal model draws without a user, at the first seeds, by every new user's utility."""
        every, people = range(len(self.plan.prompts)), self.plan.people
        own, *rivals = (
            np.array([judged(k.user, self.general[model][0]) for k in people])
            for model in ("null", "base", "impersonal")
        )
        rows = zip(("over base", "over impersonal"), rivals, strict=True)
        return {name: self.grid(won(own, rival), every).measured() for name, rival in rows}

    def fidelity(self, condition: str) -> dict[str, Any]:
        """Share of pictures whose concept is recognised, and how much it falls against the impersonal model's."""
        numbers, people = self.plan.numbers(condition), self.plan.people
        own = np.array([drawn.recognised for drawn in self.right[condition]])
        rows = {"personal": self.grid(own, numbers).measured(mean)}
        for model in ("base", "impersonal"):
            other = np.array([self.general[model][self.plan.turn(k.user)].recognised[numbers] for k in people])
            rows[model] = self.grid(other, numbers).measured(mean)
            rows[f"personal - {model}"] = self.grid(own - other, numbers).measured(mean)
        return rows


# --- who is it --------------------------------------------------------------------------------------------------------


def places(likeness: np.ndarray) -> np.ndarray:
    """[U,U], query by candidate -> the right one's place [U], from 1; of equal ones the middle."""
    own = likeness.diagonal()[:, None]
    return 1 + (likeness > own).sum(1) + ((likeness == own).sum(1) - 1) / 2


def retrieval(place: np.ndarray, users: Sequence[int]) -> dict[str, Any]:
    """Of the right users' places [U], from 1: share within the first 1, 5, 16, and the mean reciprocal."""
    found = {f"top {k}": (place <= k).astype(float) for k in TOPS} | {"mean reciprocal": 1 / place}
    rows: dict[str, Any] = {}
    for name, values in found.items():
        value, low, high = share(values, {"user": users})
        rows[name] = {"value": value, "low": low, "high": high}
    return rows | {"chance": {f"top {k}": min(k / len(users), 1.0) for k in TOPS}, "n": len(users)}


def retrieved(people: Sequence[Known], pairs: int) -> np.ndarray:
    """Places of the users whose second support set of so many pairs is looked up among all first ones."""
    first = np.concatenate([one.first[pairs].states for one in people])
    second = np.concatenate([one.second[pairs].states for one in people])
    return places(second @ first.T)


# --- between two users ------------------------------------------------------------------------------------------------


def interpolation(plan: Plan, between: list[list[Drawn]]) -> dict[str, Any]:
    """Spearman's ρ of the amount with U_second - U_first for each couple and prompt, and whether that always rises."""
    gaps = np.array(
        [[gap(first, second, d) for d in way] for (first, second), way in zip(plan.couples, between, strict=True)]
    )
    gaps = gaps.transpose(0, 2, 1)  # [couples, prompts, amounts]
    names = plan.named(spaced(len(plan.prompts), plan.scale.between))
    couples = [f"{a.user.user_id}-{b.user.user_id}" for a, b in plan.couples]
    users, prompts = np.repeat(couples, len(names)).tolist(), names * len(couples)
    rho = [correlation(row) for row in gaps.reshape(-1, len(AMOUNTS))]
    rising = (np.diff(gaps, axis=2) > 0).all(2).ravel()
    mean_rho = [correlation(row) for row in gaps.mean(1)]
    return {
        "spearman": measured(rho, users, prompts),
        "monotone": measured(rising, users, prompts, share),
        "spearman_of_couples_means": measured(mean_rho, couples, couples),
        "couples": couples,
        "amounts": list(AMOUNTS),
        "difference": gaps.mean((0, 1)).tolist(),
        "difference_by_couple": gaps.mean(1).round(4).tolist(),
    }


def gap(first: Known, second: Known, drawn: Drawn) -> np.ndarray:
    """U_second - U_first of pictures."""
    return judged(second.user, drawn) - judged(first.user, drawn)


def correlation(values: np.ndarray) -> float:
    """Spearman's, with the amounts; 0 where all values are equal."""
    return 0.0 if np.ptp(values) == 0 else float(spearmanr(AMOUNTS, values).statistic)


# --- diversity --------------------------------------------------------------------------------------------------------


def apart(drawn: Sequence[Drawn]) -> np.ndarray:
    """Mean distance [P] between pictures of a prompt at different seeds: root mean square of the pixels in [0,1]."""
    pixels = [one.pixels.astype(float) / 255 for one in drawn]
    return np.mean([np.sqrt(np.square(a - b).mean((1, 2, 3))) for a, b in combinations(pixels, 2)], axis=0)


def part(drawn: Drawn, numbers: Sequence[int]) -> Drawn:
    """Some of the pictures."""
    return Drawn(drawn.pixels[numbers], drawn.seen[numbers], drawn.recognised[numbers])


def diversity(plan: Plan, spread: list[list[Drawn]], general: dict[str, list[Drawn]]) -> dict[str, Any]:
    """Distances for some users after 4 pairs, and of the same prompts for nobody; the ratio is what is kept."""
    users, some = plan.people[: len(spread)], spaced(len(plan.prompts), plan.scale.spread[1])
    names, own = plan.named(some), np.array([apart(drawn) for drawn in spread])
    who = np.repeat([one.user.user_id for one in users], len(names)).tolist()
    rows = {"personal": measured(own.ravel(), who, names * len(users))}
    for model in ("base", "impersonal"):
        rival = apart([part(drawn, some) for drawn in general[model]])
        rows[model] = {"value": float(rival.mean())}
        rows[f"personal / {model}"] = measured((own / rival).ravel(), who, names * len(users))
    return rows | {"seeds": SEEDS}
