"""Users by few of their other pairs, which an encoder reads: drawn anew for every group, so that the adapter learns to
use whatever pairs it is shown, and none by heart."""

import copy
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig
from diffpref.data.kinds import Said
from diffpref.noise import generator
from diffpref.users.choices import Choices
from diffpref.users.encoder import UserEncoder, homogeneous
from diffpref.users.sources.contract import PRESENT, UserSource
from diffpref.users.sources.named import named
from diffpref.users.sources.rewards import turned

SUPPORT, ASKED = 5, 8  # which random streams of a group: the pairs that the encoder is shown, and whose they are


class Reader(nn.Module):
    """The encoder, frozen, as a source's module."""

    def __init__(self, encoder: UserEncoder):
        super().__init__()
        self.encoder, self.id = encoder, encoder.id

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """support [N,K,3,D] and mask [N,K] -> [N,1,U]; zeros for nobody."""
        with torch.autocast(inputs["support"].device.type, enabled=False):
            found = self.encoder(inputs["support"].float(), inputs["mask"].bool())
        return (found * inputs[PRESENT][:, None])[:, None]


# What a user u is taken to say of a pair (chosen, rejected): log-odds of chosen, less those of 0 in the last row.
#   data         the row's own word
#   taste        s_u(c) - s_u(r)
#   difference   (s_u - s_0)(c) - (s_u - s_0)(r),   s_0 the population's:
#                where the base is π_0 ∝ π·exp(s_0), this leads to π_0·exp(s_u - s_0) ∝ π·exp(s_u)
ANYONE, BESIDE = ("taste", "difference"), ("difference",)


class SupportPairs(UserSource):
    """Support pairs of a group's user: on other prompts than the group's, so the pair that is trained on is never among
    them, nor one that shares a picture with it.

    Args:
        choices: Of all users.
        encoder: Reads them.
        sizes: Fewest and most pairs; how many is drawn. Users with fewer show what they have.
        seed: Of all draws.
        labels: Whose word counts, as users.labels says. But for the data's own, any user is asked about any pair.
    """

    def __init__(
        self, choices: Choices, encoder: UserEncoder, sizes: tuple[int, int], seed: int, labels: str = "data"
    ) -> None:
        self.choices, self.encoder, self.sizes, self.seed, self.labels = choices, encoder, sizes, seed, labels
        self.width, self.everyone = encoder.width, list(choices.of)

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset, team: Team) -> "SupportPairs":
        """Features of all pairs, made where they are not on disk yet. Every process must call this.

        Raises FileNotFoundError or ValueError for an encoder that cannot be had, and for rows without users.
        """
        from diffpref.users.meta.trainer import open_choices

        assert isinstance(rows, Dataset) and config.users.path is not None  # the configuration's contradictions
        encoder = UserEncoder.from_pretrained(config.users.path)
        choices = open_choices(rows, config, encoder.scorer().towers, team)
        return cls(choices, encoder, config.users.support, config.train.seed, config.users.labels)

    def whose(self, key: int, user: Any) -> str | None:
        """The user who is asked; None for nobody."""
        if self.labels in ANYONE:
            place = torch.randint(len(self.everyone), (1,), generator=generator(self.seed, key, ASKED))
            return self.everyone[int(place)]
        name = named(user)
        return name if name in self.choices.of else None

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """support [K,3,D] and mask [K]."""
        name = self.whose(key, user)
        if name is None:
            return None
        support, mask = self.choices.padded([self.drawn(row, key, name)], self.sizes[1])
        return {"support": support[0], "mask": mask[0]}

    def drawn(self, row: int, key: int, name: str) -> np.ndarray:
        """The rows of a group's support."""
        g = generator(self.seed, key, SUPPORT)
        others = self.choices.elsewhere(name, row)
        count = int(torch.randint(self.sizes[0], self.sizes[1] + 1, (1,), generator=g))
        return others[torch.randperm(len(others), generator=g)[:count].numpy()]

    def says(self, said: Said, values: dict[str, Any], key: int, row: int) -> Said:
        """The row's own word, or the pair as this user would have put it."""
        if self.labels == "data":
            return said
        return turned(said) if self.log_odds(row, key) < 0 else said

    @torch.no_grad()
    def log_odds(self, row: int, key: int) -> float:
        """Of the chosen picture of a row, as the encoder thinks of the user who is asked."""
        shown = self.inputs(row, key, None)
        assert shown is not None  # anyone is asked
        users = [self.encoder(shown["support"][None], shown["mask"][None])]
        if self.labels in BESIDE:
            users.append(homogeneous(torch.zeros(1, self.width - 1)))
        prompt, *pictures = self.choices.look([row]).unbind(1)
        odds = [
            self.encoder.scores(u, pictures[0], prompt) - self.encoder.scores(u, pictures[1], prompt) for u in users
        ]
        return float(odds[0] - sum(odds[1:]))

    def for_rows(self, rows: Dataset, config: RunConfig) -> "SupportPairs":
        """Of these rows' users, by their own word."""
        from diffpref.users.meta.trainer import open_choices

        choices = open_choices(rows, config, self.encoder.scorer().towers, Team())
        return SupportPairs(choices, self.encoder, self.sizes, self.seed)

    def absent(self) -> dict[str, Tensor]:
        """Nobody shows no pairs."""
        return {"support": torch.zeros(self.sizes[1], 3, self.choices.width), "mask": torch.zeros(self.sizes[1]).bool()}

    def module(self) -> nn.Module:
        """The encoder; a copy, for the loader's own stays on the CPU."""
        return Reader(copy.deepcopy(self.encoder))
