"""What an exact Bayesian gets out of the very pictures that were drawn, and from the same choices."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diffpref.emoji_world.users import User
from personal.bayes import crowd, same_user
from personal.bound import Choice, Offers, bound
from personal.outcomes import Contest, places, retrieval
from personal.people import Pictures, support_sets

SETS = {"drawn": False, "drawn, any seeds": True}  # what to pick from: whether also pictures of other seeds


def offers(contest: Contest) -> Callable[[User], Offers]:
    """For each user and prompt, every picture that any model drew of the prompt for anybody with the user's seeds, and
    that with any; to be beaten are the base's and the impersonal model's at the user's own."""
    plan, cache = contest.plan, {}

    def of_user(user: User) -> Offers:
        turn = plan.turn(user)
        base, impersonal = (contest.general[model][turn].seen for model in ("base", "impersonal"))
        found = {}
        for name, pooled in SETS.items():
            place = None if pooled else turn
            if place not in cache:
                cache[place] = candidates(contest, place)
            rows = zip(plan.prompts, cache[place], base, impersonal, strict=True)
            found[name] = [Choice(prompt, seen, b, i) for prompt, seen, b, i in rows]
        return found

    return of_user


def candidates(contest: Contest, turn: int | None) -> list[np.ndarray]:
    """Attributes [M,K] of all pictures of each prompt."""
    found: list[list[np.ndarray]] = [[] for _ in contest.plan.prompts]
    for number, seen in everything(contest, turn):
        found[number].append(seen)
    return [np.stack(some) for some in found]


def everything(contest: Contest, turn: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """(prompt's number, attributes [K]) of every picture, at one of the seeds or at all."""
    plan, every = contest.plan, range(len(contest.plan.prompts))
    for drawn in contest.general.values():
        for one in drawn if turn is None else drawn[turn : turn + 1]:
            yield from zip(every, one.seen, strict=True)
    for condition, drawn in contest.right.items():
        for known, one in zip(plan.people, drawn, strict=True):
            if turn is None or plan.turn(known.user) == turn:
                yield from zip(plan.numbers(condition), one.seen, strict=True)


def bounds(contest: Contest, of: Pictures, drawn: int) -> dict[str, Any]:
    """By number of pairs, from so many drawn users."""
    return bound([one.user for one in contest.plan.people], offers(contest), of, drawn)


def recognised(users: Sequence[User], pairs: int, drawn: int) -> dict[str, Any]:
    """How often a Bayesian finds users again, from so many pairs each time."""
    sets = [support_sets(user, 2) for user in users]
    first, second = (np.stack([[said.seen for said in both[i][:pairs]] for both in sets]) for i in range(2))
    return retrieval(places(same_user(crowd(drawn), first, second)), [user.user_id for user in users])
