"""The artwork as tensors, and its fixed splits.

N drawings; `concept [N]` and `style [N]` index `concepts` and `STYLES`.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpref.emoji_world.build import STYLES

ARTWORK = Path(__file__).parent / "data" / "artwork.parquet"
HELD_OUT_PAIRS = 0.08  # share of (concept, style) pairs the pipeline never sees: do they compose?
HELD_OUT_CONCEPTS = 1 / 3  # share of concepts that no preference is ever trained on: does a taste carry over?


@dataclass(frozen=True)
class Artwork:
    """images [N,3,H,W] in [-1,1]; concept, style [N]; seen [N] False where the pipeline's training must not look."""

    images: Tensor
    concept: Tensor
    style: Tensor
    seen: Tensor
    concepts: tuple[str, ...]

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.images.shape[-1]

    @cached_property
    def training(self) -> Tensor:
        """Indices of the drawings the pipeline may train on."""
        return self.seen.nonzero().squeeze(1)

    def caption(self, i: int, styled: bool) -> str:
        """The prompt of drawing i: its Unicode name, with or without the style word."""
        return caption(self.concepts[self.concept[i]], STYLES[self.style[i]] if styled else None)


def caption(concept: str, style: str | None = None) -> str:
    """The world's prompts: "name" or "name, style"."""
    return f"{concept}, {style}" if style else concept


def held_out_pairs(concepts: tuple[str, ...]) -> set[tuple[str, str]]:
    """The (concept, style) pairs kept from the pipeline: spread evenly over styles, at most one per concept."""
    count = round(HELD_OUT_PAIRS * len(concepts) * len(STYLES))
    chosen = random.Random("held-out pairs").sample(sorted(concepts), count)
    return {(concept, STYLES[i % len(STYLES)]) for i, concept in enumerate(chosen)}


def split_concepts(concepts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(preference-training concepts, evaluation concepts), disjoint, in the artwork's order."""
    count = round(HELD_OUT_CONCEPTS * len(concepts))
    held = set(random.Random("held-out concepts").sample(sorted(concepts), count))
    return [c for c in concepts if c not in held], [c for c in concepts if c in held]


def load_artwork(path: Path = ARTWORK) -> Artwork:
    """Read a data set written by `build`. Raises FileNotFoundError when it is not there."""
    from datasets import Dataset

    if not Path(path).exists():
        raise FileNotFoundError(f"no artwork at {path}; make it with python -m diffpref.emoji_world.build --out {path}")
    rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    concepts = tuple(dict.fromkeys(rows["concept"]))
    held = held_out_pairs(concepts)
    pairs = list(zip(rows["concept"], rows["style"], strict=True))
    return Artwork(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1),
        concept=torch.tensor([concepts.index(c) for c, _ in pairs]),
        style=torch.tensor([STYLES.index(s) for _, s in pairs]),
        seen=torch.tensor([pair not in held for pair in pairs]),
        concepts=concepts,
    )
