"""Tiny denoisers of every family with fixed inputs and a user for each picture: what tests of user adapters share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_pipelines import LATENT_SIZE, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from torch import Tensor

from diffpref.adapters import add_lora
from diffpref.config import LoraSettings
from diffpref.families import family_of
from diffpref.users.adapter import add_user_adapter

U, L, N = 6, 5, 3  # numbers of a user vector, vectors of a sequence, pictures in a batch
H, W = LATENT_SIZE, LATENT_SIZE + 4


@dataclass
class Case:
    """One denoiser with fixed inputs; `users` differ from item to item."""

    make: Callable
    sequence: bool

    def __post_init__(self):
        self.pipe = self.make()
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of(self.pipe)
        self.denoiser = getattr(self.pipe, self.family.denoiser).requires_grad_(False)
        g = torch.Generator().manual_seed(1)
        self.x_t, self.t = torch.randn(N, 4, H, W, generator=g), torch.tensor([3, 500, 999])
        with torch.no_grad():
            self.conditioning = self.family.encode_prompts(self.pipe, ["a cat", "", "a dog on a mat"])
        if "XL" in type(self.pipe).__name__:
            self.conditioning["time_ids"] = torch.tensor([[48.0, 40, 8, 4, 32, 48]]).expand(N, 6)
        self.users = torch.randn(N, 1, *((L, U) if self.sequence else (U,)), generator=g)

    def add(self) -> "Case":
        add_user_adapter(self.denoiser, U, sequence=self.sequence)
        return self

    def predict(self, users: Tensor | None = None, items: slice = slice(None)) -> Tensor:
        c = self.conditioning if users is None else self.conditioning | {"user": users}
        c = {key: value[items] for key, value in c.items()}
        return self.family.denoise(self.denoiser, self.x_t[items], self.t[items], c)

    def train(self, steps: int = 2) -> "Case":
        """A few steps of everything that trains, far enough for users to matter."""
        target = torch.randn(N, 4, H, W, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.AdamW([p for p in self.denoiser.parameters() if p.requires_grad], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            (self.predict(self.users).float() - target).square().mean().backward()
            optimizer.step()
        return self


CASES = {
    "sd": (tiny_sd, False),
    "sd-sequence": (tiny_sd, True),
    "sdxl": (tiny_sdxl, False),
    "sd3": (tiny_sd3, False),
    "sd3-sequence": (tiny_sd3, True),
    "flux": (tiny_flux, False),
}


def lora(case: Case, **settings) -> None:
    add_lora(case.denoiser, case.family, LoraSettings(rank=2, **settings), seed=0)


def facts(case: Case) -> dict:
    return {"family": type(case.denoiser).__name__, "width": U, "sequence": case.sequence}
