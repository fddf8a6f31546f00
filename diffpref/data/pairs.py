"""Rows of a preference set -> PreferenceBatch. A pair shares its view and its dropped caption."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from diffpref.batch import PreferenceBatch, Structure
from diffpref.config import DataConfig
from diffpref.data.pictures import open_picture, to_tensor
from diffpref.data.views import View, cut, draw_view, draws

Row = int | dict[str, Any]  # a number in the set, or the row itself where a stream has no numbers
SIDES = ("chosen", "rejected")
TRIES = 8  # so many rows that cannot be used, one after the other, are no accident


class PairCache(Protocol):
    """What the encoders made before training."""

    crops: int

    def latents(self, row: int, view: View) -> list[dict[str, Any]] | None:
        """For each side moments [C',h,w], original (height, width) and corner (top, left); None when latents are not
        cached. Raises KeyError for an entry that could not be made."""
        ...

    def conditioning(self, prompt: str) -> dict[str, Tensor] | None:
        """What the text encoders made of one prompt, without batch dimension; None when text is not cached."""
        ...


class PreferencePairs(TorchDataset):
    """Items of (row, key): one pair, decoded or from the cache. The key is the pair's position in training; its random
    draws depend on it alone.

    A row that turns out to be unusable is replaced by the next one that is usable and of the same size, or with
    data.faults=raise stops the run.

    Args:
        rows: prompt, chosen, rejected (undecoded), optionally weight, and row: the number to name it by.
        config: How pairs are cut.
        sizes: (H, W) for all pairs, or an array [rows, 2].
        seed: Of the random draws.
        cache: What is encoded already.
    """

    def __init__(
        self,
        rows: Dataset | None,
        config: DataConfig,
        sizes: tuple[int, int] | np.ndarray,
        seed: int,
        cache: PairCache | None = None,
    ):
        self.rows, self.config, self.sizes, self.seed, self.cache = rows, config, sizes, seed, cache
        # With cached latents the files are not touched; reading a row would copy them.
        self.words = rows.remove_columns(list(SIDES)) if rows is not None and cache is not None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[Row, int]) -> dict[str, Any]:
        row, key = item
        return self.first_usable([row] if isinstance(row, dict) else self.following(row), key)

    def size(self, row: Row) -> tuple[int, int]:
        """(H, W) that a row is trained at."""
        size = self.sizes if isinstance(self.sizes, tuple) else self.sizes[row]
        return int(size[0]), int(size[1])

    def following(self, row: int) -> Iterator[int]:
        """The row, then all others of its size in order, from the end on to the beginning."""
        yield row
        same = np.arange(len(self))
        if not isinstance(self.sizes, tuple):
            same = np.flatnonzero((self.sizes == self.sizes[row]).all(1))
        yield from (int(other) for other in np.roll(same, -np.searchsorted(same, row))[1:])

    def first_usable(self, rows: Iterable[Row], key: int) -> dict[str, Any]:
        """The first of the rows that can be used, and a line for each one before it. Raises ValueError when all of
        them fail, or the first with data.faults=raise."""
        failed: list[str] = []
        for row in islice(rows, TRIES):
            try:
                pair = self.load(row, key)
            except (ValueError, OSError, KeyError) as error:
                reason = error.args[0] if isinstance(error, KeyError) else error  # a KeyError quotes its message
                failed.append(f"row {self.number(row)} of {self.config.path}: {reason}")
                if self.config.faults == "raise":
                    raise ValueError(f"data.path: {failed[0]}") from error
                continue
            return pair | {"faults": [f"{line}; row {self.number(row)} stands in" for line in failed]}
        raise ValueError(f"data.path: {failed[0]}; no other row can stand in ({len(failed)} tried)")

    def number(self, row: Row) -> int:
        """The row's number in the set that the user gave."""
        values = row if isinstance(row, dict) else self.words[row]
        return values.get("row", row)

    def load(self, row: Row, key: int) -> dict[str, Any]:
        """One pair. Raises ValueError, FileNotFoundError or KeyError with the reason when it cannot be used."""
        values = row if isinstance(row, dict) else self.words[row]
        prompt = "" if draws(self.seed, key)[3] < self.config.caption_dropout else values["prompt"]
        pair = {"key": key, "prompt": prompt, "weight": values.get("weight", 1.0), "size": self.size(row)}
        view = draw_view(row, key, pair["size"], self.config, self.seed, self.cache.crops if self.cache else None)
        pair["sides"] = self.cache.latents(row, view) if self.cache else None
        if pair["sides"] is None:
            values = row if isinstance(row, dict) else self.rows[row]
            pair["sides"] = [decode(values, side, view) for side in SIDES]
        pair["conditioning"] = self.cache.conditioning(prompt) if self.cache else None
        return pair


def decode(values: dict[str, Any], side: str, view: View) -> dict[str, Any]:
    """One picture of a row, cut. Raises ValueError that names the side."""
    try:
        image, original, corner = cut(open_picture(values[side]), view)
    except (ValueError, OSError) as error:
        raise ValueError(f"{side}: {error}") from error
    return {"images": to_tensor(image), "original": original, "corner": corner}


def collate(examples: list[dict[str, Any]]) -> PreferenceBatch:
    """P pairs -> N = 2P items, all winners first."""
    items, both = torch.arange(len(examples)), examples * 2
    sides = [example["sides"][side] for side in (0, 1) for example in examples]
    kind = "images" if "images" in sides[0] else "moments"
    words = [example["conditioning"] for example in both]
    return PreferenceBatch(
        **{kind: torch.stack([side[kind] for side in sides])},
        prompts=[example["prompt"] for example in both],
        size=examples[0]["size"],
        original_size=torch.tensor([side["original"] for side in sides]),
        crop_top_left=torch.tensor([side["corner"] for side in sides]),
        keys=[example["key"] for example in examples],
        structure=Structure(
            group=items.repeat(2),
            pairs=torch.stack([items, items + len(examples)], dim=1),
            weight=torch.tensor([float(example["weight"]) for example in examples]),
        ),
        conditioning=words[0] and {name: torch.stack([word[name] for word in words]) for name in words[0]},
        faults=tuple(line for example in examples for line in example.get("faults", ())),
    )
