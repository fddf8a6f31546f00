"""Small sets of pairs, their caches, and batches with and without one: what the tests of the cache share."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffpref.batch import PreferenceBatch, Structure
from diffpref.cache import DiskCache, make, open_cache, store
from diffpref.config import CacheConfig, Config, DataConfig, ModelConfig
from diffpref.data.pictures import open_picture, to_tensor
from diffpref.data.views import cut, enumerate_views
from diffpref.encode import encode_moments

SIZE = (32, 32)
FEATURES = Features(
    {"prompt": Value("string"), "chosen": ImageFeature(decode=False), "rejected": ImageFeature(decode=False)}
)


def picture(seed: int, size: tuple[int, int] = (44, 36)) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def pairs(count: int = 3, **columns) -> Dataset:
    sides = {side: [picture(2 * i + n) for i in range(count)] for n, side in enumerate(("chosen", "rejected"))}
    prompts = [("a cat", "a dog", "two cats")[i % 3] for i in range(count)]
    return Dataset.from_dict({"prompt": prompts, **sides} | columns, features=FEATURES)


def settings(folder: Path, **changes) -> Config:
    data = {"num_workers": 0, **{k: v for k, v in changes.items() if hasattr(DataConfig, k)}}
    cache = {"latents": True, "text": True, **{k: v for k, v in changes.items() if hasattr(CacheConfig, k)}}
    assert changes.keys() <= data.keys() | cache.keys()
    base, pairs = ModelConfig("base"), DataConfig("pairs", **data)
    return Config(name="t", model=base, data=pairs, output_dir=folder, cache=CacheConfig(**cache))


def opened(folder: Path, pipe, rows: Dataset, sizes=None, team: dict | None = None, **changes) -> DiskCache:
    return open_cache(
        rows, SIZE if sizes is None else np.array(sizes), settings(folder, **changes), pipe, **(team or {})
    )


def views(folder: Path, row: int, **changes) -> list:
    config = settings(folder, **changes)
    return enumerate_views(row, SIZE, config.data, config.cache.crops)


def batch(items: list[dict], prompts: list[str], **parts) -> PreferenceBatch:
    """A batch of one pair."""
    original, corner = (torch.tensor([item[name] for item in items]) for name in ("original", "corner"))
    structure = Structure(torch.tensor([0, 0]), torch.tensor([[0, 1]]), torch.ones(1))
    return PreferenceBatch(prompts, SIZE, original, corner, [7], structure, torch.arange(2), **parts)


def uncached(row: dict, view) -> PreferenceBatch:
    cuts = [cut(open_picture(row[side]), view) for side in ("chosen", "rejected")]
    items = [{"original": original, "corner": corner} for _, original, corner in cuts]
    return batch(items, [row["prompt"]] * 2, images=torch.stack([to_tensor(image) for image, *_ in cuts]))


def cached(cache: DiskCache, number: int, row: dict, view) -> PreferenceBatch:
    items, text = cache.latents(number, view), cache.conditioning(row["prompt"])
    assert items is not None and text is not None
    conditioning = {name: torch.stack([tensor] * 2) for name, tensor in text.items()}
    return batch(
        items, [row["prompt"]] * 2, moments=torch.stack([i["moments"] for i in items]), conditioning=conditioning
    )


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """From now on, how many pictures and prompts were encoded: {"pictures": …, "prompts": …}."""
    counts = {"pictures": 0, "prompts": 0}

    def moments(pipe, images):
        counts["pictures"] += len(images)
        return encode_moments(pipe, images)

    original = make.Prompts.make

    def prompts(self, parts, report):
        counts["prompts"] += len(parts)
        return original(self, parts, report)

    monkeypatch.setattr(make, "encode_moments", moments)
    monkeypatch.setattr(make.Prompts, "make", prompts)
    monkeypatch.setattr(make.Pictures, "bytes_needed", lambda self, missing: 1)  # the probes do not count
    monkeypatch.setattr(make.Prompts, "bytes_needed", lambda self, missing: 1)
    return counts


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("*-*/*.safetensors") if store.SHARD.fullmatch(path.name))
