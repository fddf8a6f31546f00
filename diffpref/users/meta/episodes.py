"""Batches of persons: each with some choices to learn the taste from, and others to tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diffpref.noise import generator
from diffpref.users.choices import Choices
from diffpref.users.meta.config import EpisodeConfig

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Episodes:
    """G persons. support [G,K,3,D] and other [G,K,3,D], two sets of their choices that share none, with masks [G,K];
    query [G,Q,3,D] with its mask [G,Q], choices on prompts that are in neither."""

    support: Tensor
    mask: Tensor
    other: Tensor
    other_mask: Tensor
    query: Tensor
    asked: Tensor
    faults: tuple[str, ...] = ()


class EpisodeStream:
    """The batches of one process from a step on; each depends on (seed, step, process) alone.

    Args:
        choices: Of all persons.
        persons: Those to draw.
        config: Sizes.
        seed: Of all draws.
        size: Persons in a batch.
        batches: Numbers of the batches to give.
        rank: Of this process.
        exactly: Show the fewest choices always; equal seeds then ask the same, however many are shown.
    """

    def __init__(
        self,
        choices: Choices,
        persons: Sequence[str],
        config: EpisodeConfig,
        *,
        seed: int,
        size: int,
        batches: range,
        rank: int = 0,
        exactly: bool = False,
    ):
        self.choices, self.persons, self.config = choices, persons, config
        self.seed, self.size, self.batches, self.rank, self.exactly = seed, size, batches, rank, exactly

    def __iter__(self) -> Iterator[Episodes]:
        for number in self.batches:
            rng = np.random.default_rng(generator(self.seed, number, self.rank).initial_seed())
            drawn = rng.choice(len(self.persons), min(self.size, len(self.persons)), replace=False)
            yield self.gather([self.episode(self.persons[i], rng) for i in drawn.tolist()])

    def state_dict(self) -> dict:
        """The position is the step."""
        return {}

    def episode(self, person: str, rng: np.random.Generator) -> Rows:
        """Rows of the support, of another one, and of the query."""
        rows = rng.permutation(self.choices.of[person])
        prompts = self.choices.index[rows, 0]
        asked = list(dict.fromkeys(prompts.tolist()))
        query = rows[np.isin(prompts, asked[: max(len(asked) // 2, 1)])][: self.config.query]
        left = self.choices.apart(rows, query)
        fewest, most = self.config.support
        count = fewest if self.exactly else int(rng.integers(fewest, most + 1))
        return left[:count], left[count : count + most], query

    def gather(self, drawn: list[Rows]) -> Episodes:
        """Rows -> features."""
        sizes = (self.config.support[1], self.config.support[1], self.config.query)
        columns = zip(zip(*drawn, strict=True), sizes, strict=True)
        return Episodes(*(values for sets, size in columns for values in self.choices.padded(sets, size)))
