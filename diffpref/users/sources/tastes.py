"""Made-up users, of an encoder's prior: anybody there could be, asked about every pair.

Real users have said little, each of few pairs, and their own words are noisy. An encoder has learned from all of them
together in which r ways tastes differ, w ~ N(m, I); a user of that prior judges any pair without noise. An adapter that
has learned to follow every such taste follows those that the encoder reads from a stranger's few pairs.

    d = φ(f_c, t) - φ(f_r, t),   δ = s z,   z ~ unit sphere,   s ~ U(SHORTEST, FARTHEST)
    taste        prefers c where (m + δ)ᵀd > 0
    difference   prefers c where δᵀd > 0: for a base π_0 ∝ π exp(mᵀφ), which with the adapter becomes π exp((m + δ)ᵀφ)

Of several that are drawn, the one is asked whose taste has most to say about the pair: |zᵀd| is greatest.
"""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig
from diffpref.data.kinds import WINNER_FIRST, Said
from diffpref.noise import generator
from diffpref.users.choices import open_choices
from diffpref.users.encoder import UserEncoder, homogeneous
from diffpref.users.few_shot import load_encoder
from diffpref.users.sources.contract import ALONE, Given, UserSource
from diffpref.users.sources.rewards import turned

TASTES = 8  # which random stream of a group: the users of whom one is asked
CANDIDATES = 8
SHORTEST, FARTHEST = 0.2, 3.0  # |δ|: after one pair a stranger's is about 0.3, of people that are well known 2


class DrawnTastes(UserSource):
    """Tastes drawn from the prior.

    Args:
        differences: d [R,r] of every row, NaN for one that cannot be used.
        population: m [r], or zeros where only the difference counts.
        id: Of the encoder.
        seed: Of all draws.
    """

    def __init__(self, differences: Tensor, population: Tensor, id: str, seed: int):
        self.differences, self.population, self.id, self.seed = differences, population, id, seed
        self.width = differences.shape[1] + 1

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset, team: Team) -> "DrawnTastes":
        """Features of all pairs, made where they are not on disk yet. Every process must call this.

        Raises FileNotFoundError or ValueError for an encoder that cannot be had, and for rows that are no pairs.
        """
        assert isinstance(rows, Dataset) and config.users.path is not None  # the configuration's contradictions
        encoder = load_encoder(config.users.path)
        beside = config.users.labels == "difference"
        population = torch.zeros_like(encoder.population) if beside else encoder.population.detach()
        return cls(differences(rows, config, encoder, team), population, encoder.id, config.train.seed)

    def taste(self, row: int, key: int) -> Tensor:
        """δ [r] of the user who is asked."""
        g, d = generator(self.seed, key, TASTES), self.differences[row]
        z = nn.functional.normalize(torch.randn(CANDIDATES, len(d), generator=g), dim=-1)
        length = SHORTEST + (FARTHEST - SHORTEST) * torch.rand(1, generator=g)
        return length * z[(z @ d).abs().argmax()]

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """u [r+1], whoever the row's own user is; nobody where the pair could not be looked at."""
        return None if self.differences[row].isnan().any() else {"user": homogeneous(self.taste(row, key))}

    def absent(self) -> dict[str, Tensor]:
        """Zeros."""
        return {"user": torch.zeros(self.width)}

    def says(self, said: Said, values: dict[str, Any], key: int, row: int) -> Said:
        """The pair as this user puts it, who finds no two pictures equal, and how probable that is."""
        odds = (self.population + self.taste(row, key)) @ self.differences[row]
        if odds.isnan():
            return said
        anew = replace(said, pairs=((0, 1),), **WINNER_FIRST)
        return replace(turned(anew) if odds < 0 else anew, probability=(float(odds.abs().sigmoid()),))

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "DrawnTastes":
        """Of the same prior, about these rows."""
        assert isinstance(config, Config) and config.users.path is not None
        encoder = load_encoder(config.users.path)
        return DrawnTastes(differences(rows, config, encoder, team), self.population, self.id, self.seed)

    def module(self) -> nn.Module:
        """Nothing in it trains."""
        return Given(self.id)


@torch.no_grad()
def differences(rows: Dataset, config: RunConfig, encoder: UserEncoder, team: Team) -> Tensor:
    """d [R,r] of every row, NaN for one that cannot be used."""
    choices = open_choices(rows, config, encoder.scorer().towers, team, named=False)
    prompt, chosen, rejected = choices.look(range(len(choices.index))).unbind(1)
    found = encoder.looks(chosen, prompt) - encoder.looks(rejected, prompt)
    found[torch.from_numpy(choices.index[:, 0] < 0)] = torch.nan
    return found
