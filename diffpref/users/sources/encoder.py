"""Users by few of their other pairs, which an encoder reads: drawn anew for every group, so that the adapter learns to
use whatever pairs it is shown, and none by heart."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig
from diffpref.noise import generator
from diffpref.users.choices import Choices, open_choices
from diffpref.users.encoder import UserEncoder
from diffpref.users.few_shot import load_encoder
from diffpref.users.sources.contract import ALONE, Given, UserSource
from diffpref.users.sources.named import named

SUPPORT = 5  # which random stream of a group: the pairs that the encoder is shown


class SupportPairs(UserSource):
    """Support pairs of a group's user: on other prompts than the group's, so the pair that is trained on is never among
    them, nor one that shares a picture with it.

    Args:
        choices: Of all users.
        encoder: Reads them.
        sizes: Fewest and most pairs; how many is drawn. Users with fewer show what they have.
        seed: Of all draws.
    """

    def __init__(self, choices: Choices, encoder: UserEncoder, sizes: tuple[int, int], seed: int):
        self.choices, self.encoder, self.sizes, self.seed = choices, encoder, sizes, seed
        self.width = encoder.width

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset, team: Team) -> "SupportPairs":
        """Features of all pairs, made where they are not on disk yet. Every process must call this.

        Raises FileNotFoundError or ValueError for an encoder that cannot be had, and for rows without users.
        """
        assert isinstance(rows, Dataset) and config.users.path is not None  # the configuration's contradictions
        encoder = load_encoder(config.users.path)
        choices = open_choices(rows, config, encoder.scorer().towers, team)
        return cls(choices, encoder, config.users.support, config.train.seed)

    @torch.no_grad()
    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """u [r+1], read in full precision, whatever the model trains in."""
        name = named(user)
        if name is None or name not in self.choices.of:
            return None
        support, mask = self.choices.padded([self.drawn(row, key, name)], self.sizes[1])
        return {"user": self.encoder(support.float(), mask)[0]}

    def drawn(self, row: int, key: int, name: str) -> np.ndarray:
        """The rows of a group's support."""
        g = generator(self.seed, key, SUPPORT)
        others = self.choices.elsewhere(name, row)
        count = int(torch.randint(self.sizes[0], self.sizes[1] + 1, (1,), generator=g))
        return others[torch.randperm(len(others), generator=g)[:count].numpy()]

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "SupportPairs":
        """Of these rows' users."""
        choices = open_choices(rows, config, self.encoder.scorer().towers, team)
        return SupportPairs(choices, self.encoder, self.sizes, self.seed)

    def absent(self) -> dict[str, Tensor]:
        """Zeros."""
        return {"user": torch.zeros(self.width)}

    def module(self) -> nn.Module:
        """Nothing in it trains."""
        return Given(self.encoder.id)
