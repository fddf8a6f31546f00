"""What a noise strategy has to work with, and what it makes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.batch import Conditioning
from diffpref.config import NoiseConfig
from diffpref.noise.schedules import Parameterization
from diffpref.triton_kernels.philox import Streams, streams

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # x_t [M,C,h,w], t [M], conditioning [M,...] -> prediction


@dataclass(frozen=True)
class Noise:
    """rows: R rows of noise, [R,C,h,w] or the streams that make them.  row [N]: which of them each item takes; row i
    for item i where it is None."""

    rows: Tensor | Streams
    row: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One batch: x0 [N,C,h,w] fp32; level [N]; group [N], 0..G-1; the key and the generator of each group, the seed of
    all; the model, for strategies that ask it; and who computes, PyTorch or a kernel."""

    x0: Tensor
    level: Tensor
    group: Tensor
    keys: list[int]
    generators: list[torch.Generator]
    seed: int
    conditioning: Conditioning
    parameters: Parameterization
    config: NoiseConfig
    model: Model | None = None
    kernel: str = "auto"

    @property
    def items(self) -> list[Tensor]:
        """Indices of each group's items, on the CPU."""
        group = self.group.cpu()
        return [(group == number).nonzero().squeeze(1) for number in range(len(self.keys))]

    def of_groups(self) -> Noise:
        """One fresh noise for each group."""
        return Noise(SOURCES[self.config.source].groups(self), self.group)

    def of_items(self, number: int = 0) -> Noise:
        """Fresh noise for every item. number: how often there was some before, in this draw."""
        return Noise(SOURCES[self.config.source].items(self, number))

    def normal(self, number: int) -> Tensor:
        """The same as a tensor, [N,C,h,w]."""
        rows = self.of_items(number).rows
        return rows if isinstance(rows, Tensor) else rows.normal(self.x0.shape[1:], self.kernel)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's prediction for x [N,C,h,w] at timesteps t [N], fp32."""
        if self.model is None:
            raise ValueError(f"noise.strategy {self.config.strategy} inverts pictures with a model, and none was given")
        return self.model(x, t, self.conditioning).float()


# --- sources of noise -------------------------------------------------------------------------------------------------


def generator_groups(draw: Draw) -> Tensor:
    """[G,C,h,w] from the groups' generators: drawn on the CPU, so that a seed means the same on every device."""
    noise = torch.stack([torch.randn(draw.x0.shape[1:], generator=g) for g in draw.generators])
    return noise.to(draw.x0.device, non_blocking=True)


def generator_items(draw: Draw, number: int) -> Tensor:
    """[N,C,h,w], each group's items in turn from its generator, which knows how often it was asked."""
    noise = torch.empty(draw.x0.shape)
    for items, g in zip(draw.items, draw.generators, strict=True):
        noise[items] = torch.randn(len(items), *draw.x0.shape[1:], generator=g)
    return noise.to(draw.x0.device, non_blocking=True)


def philox_groups(draw: Draw) -> Streams:
    """A stream for each group, by its key."""
    return streams(draw.keys, seed=draw.seed, device=draw.x0.device)


def philox_items(draw: Draw, number: int) -> Streams:
    """A stream for each item: its group's key, and as draw 2^16·number + its place among the group's items."""
    groups = philox_groups(draw).table[:, 1][draw.group]
    place = (draw.group[:, None] == draw.group).tril(-1).sum(1)
    return streams(groups, seed=draw.seed, draw=(number << 16) + place, device=draw.x0.device)


@dataclass(frozen=True)
class Source:
    """groups: Draw -> G rows of noise.  items: Draw, number -> N rows."""

    groups: Callable[[Draw], Tensor | Streams]
    items: Callable[[Draw, int], Tensor | Streams]


SOURCES: dict[str, Source] = {
    "generator": Source(generator_groups, generator_items),
    "philox": Source(philox_groups, philox_items),
}
