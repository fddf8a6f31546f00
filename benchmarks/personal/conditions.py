"""What is drawn of whom, in the order of what decides first.

A user has one of four seeds for each prompt, so that four base pictures of a prompt serve all 56 users, and users of
the same seeds can be compared picture by picture: the pictures of one are the *wrong* pictures of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tqdm import tqdm

from diffpref.emoji_world.users import MAJORITY, PIXEL_SPREAD, STYLE_SPREAD, STYLES, User
from personal.draw import Drawn, Studio
from personal.known import Known

SEEDS = 4  # of a prompt; users take them in turn
FIRST = 40_000  # the first seed: beyond those of all preferences and other evaluations
AMOUNTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from one user to another


@dataclass(frozen=True)
class Scale:
    """How much is drawn. every: a condition takes each so-manieth of the prompts, or all where it is not named.
    couples: of users, to go from the one to the other.  around: users whose neighbourhood is drawn, and prompts for
    each.  spread: users and prompts of which all seeds are drawn.  candidates: pictures of which the best is kept."""

    every: dict[str, int]
    couples: int = 12
    between: int = 6
    around: tuple[int, int] = (14, 4)
    spread: tuple[int, int] = (8, 6)
    candidates: int = 5


FULL = Scale({"1": 2, "16": 2, "oracle": 2, "2": 4, "8": 4})  # some of one are all in the other, to compare them


@dataclass(frozen=True)
class Plan:
    """Of all users: who they are, the prompts, and where the pictures come from."""

    people: Sequence[Known]
    prompts: Sequence[str]
    studio: Studio
    scale: Scale = FULL

    def turn(self, user: User) -> int:
        """Which of the four seeds is a user's."""
        return user.user_id % SEEDS

    def seeds(self, prompts: Sequence[int], turn: int) -> list[int]:
        """Of prompts by number."""
        return [FIRST + SEEDS * p + turn for p in prompts]

    def numbers(self, condition: str) -> list[int]:
        """Of the prompts that are drawn for a condition."""
        return list(range(0, len(self.prompts), self.scale.every.get(condition, 1)))

    def named(self, numbers: Sequence[int]) -> list[str]:
        return [self.prompts[p] for p in numbers]

    def general(self, model: str) -> list[Drawn]:
        """Every prompt at each of the four seeds, for nobody."""
        every = range(len(self.prompts))
        parts = range(SEEDS) if model != "null" else range(1)
        which = "personal" if model == "null" else model
        return [self.studio.pictures(which, f"nobody/{turn}", self.prompts, self.seeds(every, turn)) for turn in parts]

    def right(self, condition: str) -> list[Drawn]:
        """For each user, their pictures after so many pairs, or the oracle's."""
        some = self.numbers(condition)
        bar = tqdm(self.people, f"right, {condition}", unit="user")
        return [self.own(one, condition, some, self.turn(one.user), f"right-{condition}") for one in bar]

    def own(self, one: Known, condition: str, numbers: Sequence[int], turn: int, name: str) -> Drawn:
        """A user's pictures of some prompts at one of the seeds; even and odd prompts are kept apart, so that a run
        with all prompts goes on from one with half of them."""
        halves = [[p for p in numbers if p % 2 == rest] for rest in (0, 1)]
        parts = [self.half(one, condition, half, turn, name) for half in halves if half]
        return reordered(parts, np.argsort([p for half in halves for p in half]))

    def half(self, one: Known, condition: str, numbers: Sequence[int], turn: int, name: str) -> Drawn:
        """One shard."""
        seeds, what = self.seeds(numbers, turn), f"{name}/{one.user.user_id}"
        return self.studio.pictures("personal", what, self.named(numbers), seeds, one.after(condition))

    def spread(self) -> list[list[Drawn]]:
        """For some users, after 4 pairs, all seeds of some prompts."""
        users, prompts = self.scale.spread
        some = spaced(len(self.prompts), prompts)
        return [
            [self.own(one, "4", some, turn, f"spread-{turn}") for turn in range(SEEDS)]
            for one in tqdm(self.people[:users], "spread", unit="user")
        ]

    @cached_property
    def couples(self) -> list[tuple[Known, Known]]:
        """Users whose tastes differ most, each in one couple at most."""
        return opposite(self.people)[: self.scale.couples]

    def between(self) -> list[list[Drawn]]:
        """For each couple, pictures of some prompts on the way from the first to the second."""
        return [self.way(*couple) for couple in tqdm(self.couples, "between", unit="couple")]

    def way(self, first: Known, second: Known) -> list[Drawn]:
        """At each of the amounts."""
        some, name = spaced(len(self.prompts), self.scale.between), f"{first.user.user_id}-{second.user.user_id}"
        return [
            self.studio.pictures(
                "personal",
                f"between-{amount}/{name}",
                self.named(some),
                self.seeds(some, self.turn(first.user)),
                first.oracle.mix(second.oracle, amount),
            )
            for amount in AMOUNTS
        ]


def reordered(parts: Sequence[Drawn], order: np.ndarray) -> Drawn:
    """Several shards as one; order: where the pictures of all parts, one after the other, are to be taken from."""
    fields = ([getattr(part, name) for part in parts] for name in ("pixels", "seen", "recognised"))
    return Drawn(*(np.concatenate(values)[order] for values in fields))


def spaced(count: int, wanted: int) -> list[int]:
    """So many numbers below count, evenly."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()


def tastes(people: Sequence[Known]) -> np.ndarray:
    """True tastes [U,K]: what sets users apart from the mean user, in units of the world's spread."""
    unit = np.array([STYLE_SPREAD if name in STYLES else PIXEL_SPREAD for name in MAJORITY])
    return (np.array([one.user.weights for one in people]) - np.array(list(MAJORITY.values()))) / unit


def opposite(people: Sequence[Known]) -> list[tuple[Known, Known]]:
    """Couples, the least alike first."""
    own = tastes(people)
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    likeness, couples = own @ own.T, []
    np.fill_diagonal(likeness, np.inf)
    while np.isfinite(likeness).any():
        first, second = np.unravel_index(likeness.argmin(), likeness.shape)
        couples.append((people[int(first)], people[int(second)]))
        likeness[[first, second]] = likeness[:, [first, second]] = np.inf
    return couples
