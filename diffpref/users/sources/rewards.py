"""Made-up users who weigh several scorers: each group is some other user's, whose weights are a unit direction.

Nobody's preferences are needed for these, only scores. A model that was tuned so takes any weighing at inference, as in
PPD's first experiment (Dang et al., 2501.06655: one scorer each) and in DPA (Wang et al. 2024, 2402.18571: directions).
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, DataConfig, RunConfig
from diffpref.data.columns import read_columns
from diffpref.data.kinds import Kind, Said, beaten, kind_of, pair, ranked
from diffpref.data.votes import GIVEN
from diffpref.noise import generator
from diffpref.users.sources.contract import ALONE, Given, UserSource

WEIGHTS = 7  # which random stream of a group: its user's weights


def one_hot(scorers: int, seed: int, key: int) -> Tensor:
    """All of the weight on one scorer, [S]."""
    return torch.eye(scorers)[int(torch.randint(scorers, (), generator=generator(seed, key, WEIGHTS)))]


def sphere(scorers: int, seed: int, key: int) -> Tensor:
    """Any direction in which no scorer counts against a picture, [S]: uniform on that part of the sphere."""
    drawn = torch.randn(scorers, generator=generator(seed, key, WEIGHTS)).abs()
    return drawn / drawn.norm()


DIRECTIONS = {"one_hot": one_hot, "sphere": sphere}


class RewardUsers(UserSource):
    """kind, data: of the rows.  mean, deviation [S]: of each scorer's numbers.  weights: a key of DIRECTIONS.  seed:
    of the draws."""

    def __init__(
        self, kind: Kind, data: DataConfig, mean: np.ndarray, deviation: np.ndarray, weights: str, seed: int
    ) -> None:
        self.kind, self.data, self.mean, self.deviation = kind, data, mean, deviation
        self.weights, self.seed, self.width = weights, seed, len(mean)

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset) -> "RewardUsers":
        """Scores are measured once, here, and compared in standard deviations of the whole set.

        Raises ValueError for a stream, for rows without scores of each picture or with two prompts, and for a scorer
        who gave the same to all.
        """
        if isinstance(rows, IterableDataset):
            raise ValueError("users.source rewards measures all scores before training; set data.streaming to false")
        check_columns(rows, config.data.path)
        kind = kind_of(rows.column_names, config.data)
        return cls(kind, config.data, *measured(rows, config.data), config.users.weights, config.train.seed)

    def direction(self, key: int) -> Tensor:
        """v [S], the weights of a group's user."""
        return DIRECTIONS[self.weights](self.width, self.seed, key)

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor]:
        """The weights are the user."""
        return {"user": self.direction(key)}

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "RewardUsers":
        """The same users; what a standard deviation is, the training rows have said."""
        check_columns(rows, str(config.data.validation))
        other = copy.copy(self)
        other.kind = kind_of(rows.column_names, config.data)
        return other

    def absent(self) -> dict[str, Tensor]:
        """Zeros."""
        return {"user": torch.zeros(self.width)}

    def says(self, said: Said, values: dict[str, Any], key: int, row: int = -1) -> Said:
        """Which pictures this user finds better, whatever the row says."""
        anew = ANEW[self.kind.name](values, self.scores(values[GIVEN], key), self.data)
        return replace(anew, items=said.items)

    # s_i = Σ_j v_j (r_ji − mean_j) / sd_j
    def scores(self, given: list[list[float]], key: int) -> tuple[float, ...]:
        """Numbers [S][k] -> what the group's user gives each picture, k numbers."""
        standard = (np.array(given) - self.mean[:, None]) / self.deviation[:, None]
        return tuple((self.direction(key).double().numpy()[:, None] * standard).sum(0).tolist())

    def module(self) -> nn.Module:
        """Nothing in it trains. Its id names the scorers in their order: weights of others mean something else, and
        `UserEmbedding(torch.tensor([0.6, 0.8]), id)` is one who weighs two of them so."""
        return Given(f"rewards: {', '.join(self.data.scorers)}")


def check_columns(rows: Dataset, path: str) -> None:
    """Raise ValueError for rows without a number of each scorer for each picture, or with two prompts."""
    if GIVEN not in rows.column_names or "rejected_prompt" in rows.column_names:
        raise ValueError(
            "users.source rewards needs pairs or lists of pictures under one prompt, each picture with a number of"
            f" every one of data.scorers; {path} is read as {rows.column_names}"
        )


def as_pair(values: dict[str, Any], scores: tuple[float, ...], data: DataConfig) -> Said:
    """A pair, turned round where the second picture has more. Of equal ones data.ties says what becomes; where it drops
    them, they are no pair: others would not call it a tie."""
    said = pair(values | {"margin": abs(scores[0] - scores[1])}, data)
    if scores[0] == scores[1]:
        return replace(said, pairs=(), scores=(0.5, 0.5)) if data.ties == "drop" else said
    return turned(said) if scores[0] < scores[1] else said


def turned(said: Said) -> Said:
    """The second picture over the first one."""
    scores, labels = said.scores, said.labels
    return replace(said, pairs=((1, 0),), scores=scores and scores[::-1], labels=labels and labels[::-1])


def as_list(values: dict[str, Any], scores: tuple[float, ...], data: DataConfig) -> Said:
    """A list. Its scores are shares of the other pictures that each one beats, as those of votes are."""
    return ranked(values | {"scores": beaten(scores), "wins": None}, data)


ANEW = {"pairs": as_pair, "lists": as_list}


def measured(rows: Dataset, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [S] of each scorer's numbers, over all pictures of all rows. Raises ValueError for a
    scorer that tells no two pictures apart."""
    numbers = np.concatenate([np.array(values[GIVEN]) for values in read_columns(rows, [GIVEN])], axis=1)
    same = [name for name, line in zip(data.scorers, numbers, strict=True) if line.min() == line.max()]
    if same:
        raise ValueError(f"data.scorers: {', '.join(same)} gave the same to every picture of {data.path}; leave it out")
    return numbers.mean(1), numbers.std(1)
