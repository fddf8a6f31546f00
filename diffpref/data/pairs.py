"""Rows of a preference set -> PreferenceBatch. A pair shares crop, flip and dropped caption."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from diffpref.batch import PreferenceBatch, Structure
from diffpref.config import DataConfig
from diffpref.noise import generator

AUGMENTATION = 2  # which random stream of a group: crop, flip and caption dropout


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, RGB, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {image.mode} has no known range; convert it to 8 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3,H,W] in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


def crop_square(image: Image.Image, size: int, place: tuple[float, float]) -> tuple[Image.Image, tuple[int, int]]:
    """Shorter side to `size`, then a square at `place` (vertical, horizontal, each in [0,1]); nothing is distorted.

    Returns the picture and its crop corner (top, left), in pixels of the resized picture.
    """
    scale = size / min(image.size)
    resized = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (round(p * (side - size)) for p, side in zip(reversed(place), resized.size, strict=True))
    return resized.crop((left, top, left + size, top + size)), (top, left)


class PreferencePairs(TorchDataset):
    """Items of (row, key): one decoded pair. The key is the pair's position in training; its random draws depend on
    it alone."""

    def __init__(self, rows: Dataset, config: DataConfig, resolution: int, seed: int):
        self.rows, self.config, self.resolution, self.seed = rows, config, resolution, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, key = item
        try:
            return self.load(index, key)
        except Exception as error:  # whatever is wrong with a file, the user needs to know which
            raise ValueError(f"data.path: row {index} of {self.config.path}: {error}") from error

    def load(self, index: int, key: int) -> dict:
        """One pair, decoded, cropped and perhaps mirrored."""
        row, g = self.rows[index], generator(self.seed, key, AUGMENTATION)
        if not isinstance(row["prompt"], str):
            raise ValueError(f"the prompt is {row['prompt']!r}, not text")
        vertical, horizontal, flip, drop = torch.rand(4, generator=g).tolist()
        place = (0.5, 0.5) if self.config.center_crop else (vertical, horizontal)
        images, sizes, corners = [], [], []
        for image in (to_rgb(row["chosen"]), to_rgb(row["rejected"])):
            if self.config.random_flip and flip < 0.5:
                image = ImageOps.mirror(image)
            cropped, corner = crop_square(image, self.resolution, place)
            images.append(cropped)
            sizes.append((image.height, image.width))
            corners.append(corner)
        prompt = "" if drop < self.config.caption_dropout else row["prompt"]
        tensors = [to_tensor(image) for image in images]
        return {
            "images": tensors,
            "prompt": prompt,
            "sizes": sizes,
            "corners": corners,
            "key": key,
            "weight": row.get("weight", 1.0),
        }


def collate(examples: list[dict]) -> PreferenceBatch:
    """P pairs -> N = 2P items, all winners first."""
    count = len(examples)
    order = [(example, side) for side in (0, 1) for example in examples]
    items = torch.arange(count)
    images = torch.stack([example["images"][side] for example, side in order])
    return PreferenceBatch(
        images=images,
        size=(images.shape[2], images.shape[3]),
        prompts=[example["prompt"] for example, _ in order],
        original_size=torch.tensor([example["sizes"][side] for example, side in order]),
        crop_top_left=torch.tensor([example["corners"][side] for example, side in order]),
        keys=[example["key"] for example in examples],
        structure=Structure(
            group=items.repeat(2),
            pairs=torch.stack([items, items + count], dim=1),
            weight=torch.tensor([float(example["weight"]) for example in examples]),
        ),
    )
