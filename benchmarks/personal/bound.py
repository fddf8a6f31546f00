"""The bound: what one who knows the model of users, sees what users see in a picture, and draws Bayes' conclusion gets
from a user's first n pairs. It predicts the user's choices, and it picks pictures out of a set.

For a set that holds all a model can be expected to draw, no way of personalising it can expect a better win rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpref.emoji_world.users import User, choice_probability, majority, utility
from diffpref.scorer.measures.bootstrap import share
from personal.bayes import DRAWN, Belief, beliefs, certain, crowd
from personal.people import Pictures, support_sets

KNOWN = (0, 1, 2, 4, 8, 16)  # pairs
ORACLE = "oracle"  # knows the user exactly
FINELY = "all shades: over impersonal"
BASES = 4  # pictures of a prompt that are to be beaten, in turn


@dataclass(frozen=True)
class Choice:
    """What there is to choose among for one prompt: candidates [M,K], base [K] which is to be beaten, and impersonal
    [K], what one gives who knows the population alone; it is among the candidates."""

    prompt: str
    candidates: np.ndarray
    base: np.ndarray
    impersonal: np.ndarray


def choice(prompt: str, candidates: np.ndarray, base: np.ndarray) -> Choice:
    """The impersonal one is what the mean user likes best."""
    return Choice(prompt, candidates, base, candidates[utility(majority(), candidates).argmax()])


def choices_of(of: Pictures, samples: int | None, artwork: bool, bases: int = BASES) -> list[Choice]:
    """Of every prompt: so many of the base model's pictures to choose among, its drawings too if wanted, and as bases
    other pictures of the model."""
    found = []
    for prompt in dict.fromkeys(of.prompts.tolist()):
        drawn, sampled = (of.seen[(of.prompts == prompt) & (of.drawn == kind)] for kind in (True, False))
        bases_of, rest = sampled[:bases], sampled[bases:][:samples]
        offered = np.concatenate([rest, drawn]) if artwork else rest
        found += [choice(prompt, offered, base) for base in bases_of]
    return found


def known(users: Sequence[User], drawn: int, counts: Sequence[int] = KNOWN) -> Iterator[tuple[User, dict[Any, Belief]]]:
    """What is known of each user after so many pairs, from so many drawn users, and by the one who knows them."""
    everyone = crowd(drawn)
    for user in tqdm(users, "users", unit="user"):
        said = np.stack([one.seen for one in support_sets(user, 1)[0]])
        after = beliefs(everyone, said, counts, np.random.default_rng((7, user.user_id)))
        yield user, dict(zip(counts, after, strict=True)) | {ORACLE: Belief(certain(user), 1.0)}


# --- picking pictures -------------------------------------------------------------------------------------------------


def won(user: User, picture: np.ndarray, other: np.ndarray) -> float:
    """1 where the user's true utility of the first is higher, ½ where they are equal."""
    return float(1 + np.sign(utility(user, picture) - utility(user, other))) / 2


@dataclass
class Tally:
    """Wins of one state of knowledge, by user and prompt, and how many users stood behind it."""

    wins: dict[str, list[float]] = field(default_factory=dict)
    effective: list[float] = field(default_factory=list)

    def add(self, name: str, values: Sequence[float]) -> None:
        self.wins.setdefault(name, []).extend(values)


def pick(user: User, belief: Belief, offered: Sequence[Choice]) -> tuple[list[float], list[float]]:
    """Wins [C] over the base, and over the impersonal picture, each with the picture most likely to win."""
    over = []
    for one in offered:
        rivals = (one.base, one.impersonal)
        over.append([won(user, one.candidates[belief.best(one.candidates, rival)], rival) for rival in rivals])
    return tuple(np.array(over).T.tolist())


# Pictures x of a convex class, the impersonal one x0 is what the mean user c likes best: c·(x - x0) ≤ 0 for all x.
# So of all e = x - x0, P(w·e > 0) is greatest where c·e = 0. For w of mean m and covariance Σ that is where
#   e ∝ Σ⁻¹(m - λc),  λ = cᵀΣ⁻¹m / cᵀΣ⁻¹c
def finely(belief: Belief) -> float:
    """The greatest probability of a picture that is better than the impersonal one, if pictures could be had in all
    shades: the posterior's own, which is right on average. One half of the crowd says where to go, the other what it is
    worth."""
    drawn, centre = np.array(belief.crowd.weights), np.array(majority().weights)
    half = max(drawn.shape[1] // 2, 1)
    m, inverse = drawn[:, :half].mean(1), np.linalg.inv(np.cov(drawn[:, :half])) if half > 1 else np.eye(len(centre))
    e = inverse @ (m - (centre @ inverse @ m) / (centre @ inverse @ centre) * centre)
    return float((e @ drawn[:, -half:] > 0).mean())


def interval(values: Sequence[float], users: Sequence, names: Sequence[str]) -> dict[str, float]:
    """Mean, with the interval over users and prompts."""
    value, low, high = share(np.array(values, dtype=float), {"user": users, "prompt": names})
    return {"value": value, "low": low, "high": high, "n": len(values)}


Offers = Mapping[str, Sequence[Choice]]  # sets of choices by name


def bound(
    users: Sequence[User], offers_to: Callable[[User], Offers], of: Pictures | None = None, drawn: int = DRAWN
) -> dict[str, Any]:
    """For each amount of knowledge: win rates for each set of offers, whose prompts are the same for all users, and,
    given comparisons, accuracy on them."""
    tallies: dict[Any, Tally] = {}
    for user, states in known(users, drawn):
        for n, belief in states.items():
            tally = tallies.setdefault(n, Tally())
            tally.effective.append(belief.effective)
            tally.add(FINELY, [finely(belief)])
            for name, offered in offers_to(user).items():
                base, impersonal = pick(user, belief, offered)
                tally.add(f"{name}: over base", base)
                tally.add(f"{name}: over impersonal", impersonal)
            if of is not None:
                tally.add("accuracy", accuracy(user, belief, of))
    return {str(n): summary(tally, users, offers_to(users[0]), of) for n, tally in tallies.items()}


def accuracy(user: User, belief: Belief, of: Pictures) -> list[float]:
    """Expected share of right predictions [P] over the noise of the user's choosing."""
    pairs = of.seen[of.pairs]
    truth = choice_probability(user, utility(user, pairs[:, 0]), utility(user, pairs[:, 1]))
    return np.where(belief.prefers(pairs) > 0.5, truth, 1 - truth).tolist()


def summary(tally: Tally, users: Sequence[User], offers: Offers, of: Pictures | None) -> dict[str, Any]:
    """Means with intervals."""
    names = {name: [one.prompt for one in offered] for name, offered in offers.items()}
    names["all shades"] = [None]
    names |= {"accuracy": of.prompts[of.pairs[:, 0]].tolist()} if of is not None else {}
    found: dict[str, Any] = {"effective": {"min": min(tally.effective), "median": float(np.median(tally.effective))}}
    for name, values in tally.wins.items():
        of_prompts = names[name.split(":")[0]]
        who = np.repeat([user.user_id for user in users], len(of_prompts)).tolist()
        found[name] = interval(values, who, of_prompts * len(users))
    return found
