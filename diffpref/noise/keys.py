"""Randomness is an argument: each group of items draws from a generator of its own, keyed by (seed, key), where the
key is the group's position in the stream of training groups. A rank holds other positions than its neighbour, so no
two draw the same noise, and the same positions draw the same noise however they are spread over ranks and
accumulation steps."""

from dataclasses import dataclass

import torch

FIXED_SEED = 2**41  # of draws that are the same in every run: no run has it, nor has held-out noise


def generator(*key: int) -> torch.Generator:
    """A CPU generator for one key: equal keys, equal numbers, on every machine."""
    state = 0
    for part in key:  # splitmix64 over the parts: neighbouring keys give unrelated seeds
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


@dataclass(frozen=True)
class FixedDraws:
    """Keys of rows that have a few draws each, the same in every run: epoch e takes the (e mod K)-th of all rows.

    With `FIXED_SEED` they decide all that is drawn for a group: place and mirroring of the crop, dropped caption, the
    VAE's draw, timestep, noise. draws: K.  epoch: Positions of an epoch in the stream.
    """

    draws: int
    epoch: int

    def key(self, row: int, position: int) -> int:
        """row·K + k, for the row that stands at a position, or stands in there."""
        return row * self.draws + position // self.epoch % self.draws
