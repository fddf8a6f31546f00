"""The rows of a set of preferences as diffusers' scripts read, decode and collate them."""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms.functional import hflip

SIDES = ("chosen", "rejected")


def read_rows(path: Path, pairs: int) -> list[dict[str, Any]]:
    """The first pairs of a file -> prompt, and the bytes of both pictures."""
    table = pq.read_table(path, columns=["prompt", *SIDES]).slice(0, pairs)
    return [{k: v["bytes"] if k in SIDES else v for k, v in row.items()} for row in table.to_pylist()]


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows -> a batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Precomputed(Dataset):
    """Rows that are tensors already."""

    def __init__(self, rows: list[dict[str, Tensor]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class ScriptRows(Dataset):
    """A row -> both pictures on top of each other, pixels [6,H,W] in [-1,1], winner first, and tokens; as the SD script
    makes them (bilinear on the picture), or the SDXL script (which decodes the first picture twice, brings the second
    to its size and resizes both as one float tensor)."""

    def __init__(self, rows: list[dict[str, Any]], tokenizers: list, resolution: int, sdxl: bool):
        self.rows, self.tokenizers, self.side, self.sdxl = rows, tokenizers, resolution, sdxl
        self.resize, self.crop = transforms.Resize(resolution), transforms.CenterCrop(resolution)
        self.to_tensor, self.normalize = transforms.ToTensor(), transforms.Normalize([0.5], [0.5])
        steps = [self.resize, self.crop, transforms.RandomHorizontalFlip(), self.to_tensor, self.normalize]
        self.whole = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return (self.stacked_pixels(row) if self.sdxl else self.pixels(row)) | self.tokens(row["prompt"])

    def pixels(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """As the SD script."""
        return {"pixels": torch.cat([self.whole(opened(row[side])) for side in SIDES])}

    def stacked_pixels(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """As the SDXL script."""
        first = opened(row["chosen"])
        size = first.height, first.width
        pictures = opened(row["chosen"]), opened(row["rejected"]).resize(size[::-1])
        both = self.resize(torch.cat([self.to_tensor(picture) for picture in pictures]))
        if random.random() < 0.5:
            both = hflip(both)
        top, left = (max(0, round((length - self.side) / 2)) for length in both.shape[1:])
        time_ids = torch.tensor([*size, top, left, self.side, self.side])
        return {"pixels": self.normalize(self.crop(both)), "time_ids": time_ids}

    def tokens(self, prompt: str) -> dict[str, Tensor]:
        """ids, and ids_2 where there are two encoders."""
        found = {}
        for tokenizer, end in zip(self.tokenizers, ("", "_2"), strict=False):
            settings = {"truncation": True, "padding": "max_length", "max_length": tokenizer.model_max_length}
            found[f"ids{end}"] = tokenizer([prompt], **settings, return_tensors="pt").input_ids[0]
        return found


def opened(picture: bytes) -> Image.Image:
    """Decoded."""
    return Image.open(io.BytesIO(picture)).convert("RGB")
