"""What a loss is computed of: predictions and targets of the shapes that models have."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.batch import Structure
from diffpref.config import ObjectiveConfig

SHAPES: dict[str, tuple[int, ...]] = {  # of an item
    "sd15": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "flux": (4096, 64),  # tokens x channels, as the transformer gives them
    "wan": (16, 21, 60, 104),  # 81 frames of 480p
}
APART = {"sd15": 1e-3, "sdxl": 1e-2, "flux": 1e-1, "wan": 1e-1}  # policy from reference, root mean square
RESIDUAL = 0.5  # reference from target, likewise
BETA = 5000.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = 4  # wide ones of an item, each touched once at the least: policy, reference and target read, gradient written


@dataclass(frozen=True)
class Case:
    """A row of the table. shrunk: every side of the shape divided by that, for tests."""

    shape: str
    dtype: str
    pairs: int
    shrunk: int = 1

    @property
    def item(self) -> tuple[int, ...]:
        """Shape of an item."""
        return tuple(max(1, side // self.shrunk) for side in SHAPES[self.shape])

    @property
    def elements(self) -> int:
        """Of all items."""
        return 2 * self.pairs * math.prod(self.item)

    @property
    def bytes_min(self) -> int:
        """Each wide tensor once."""
        return TENSORS * self.elements * DTYPES[self.dtype].itemsize

    @property
    def scale(self) -> float:
        """dL/dloss: fp16 is trained with a scaled loss, here by the power of two that makes gradients about 1."""
        size = BETA / (self.pairs * math.prod(self.item))
        return 2.0 ** -round(math.log2(size)) if self.dtype == "fp16" else 1.0

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.shape}, {self.pairs} pair{'s' * (self.pairs > 1)}, {self.dtype}"


@dataclass(frozen=True)
class Inputs:
    """policy (wants a gradient), reference, target [2B,...], winners first; weight [2B]; scale []: dL/dloss."""

    policy: Tensor
    reference: Tensor
    target: Tensor
    weight: Tensor
    scale: Tensor
    structure: Structure
    settings: ObjectiveConfig


def make(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random predictions about as far apart as those of a model in training; drawn on the CPU where that is quick."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, items = DTYPES[case.dtype], 2 * case.pairs

    def normal() -> Tensor:
        return torch.randn(items, *case.item, generator=generator, device=device)

    target = normal()
    reference = target + RESIDUAL * normal()
    policy = (reference + APART[case.shape] * normal()).to(dtype)
    place = torch.arange(case.pairs, device=device)
    structure = Structure(place.repeat(2), torch.stack([place, place + case.pairs], 1), torch.ones_like(place).float())
    return Inputs(
        policy.requires_grad_(),
        reference.to(dtype),
        target.to(dtype),
        torch.ones(items, device=device),
        torch.tensor(case.scale, device=device),
        structure,
        ObjectiveConfig(name="dpo", beta=BETA),
    )
