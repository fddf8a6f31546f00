"""Rows of a preference set -> PreferenceBatch. A group shares its view and its dropped caption."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from diffpref.batch import Conditioning, PreferenceBatch, Structure
from diffpref.config import DataConfig
from diffpref.data.kinds import PICTURES, Kind, Picture, Said
from diffpref.data.pictures import open_picture, to_tensor
from diffpref.data.views import View, cut, draw_view, draws
from diffpref.noise import FixedDraws, generator

Row = int | dict[str, Any]  # a number in the set, or the row itself where a stream has no numbers
Decode = Callable[[str, Picture, View], dict[str, Any]]
DROPPED = 6  # which random stream of a group: whether its user is dropped
NOBODY = ""  # the user of data that name no users; a row that names none where others do has None
TRIES = 8  # so many rows that cannot be used, one after the other, are no accident


class Users(Protocol):
    """Where users come from; users/sources/contract.py has the contract."""

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None: ...
    def absent(self) -> dict[str, Tensor]: ...
    def says(self, said: Said, values: dict[str, Any], key: int, row: int) -> Said: ...


@dataclass(frozen=True)
class Asked:
    """Whom a set's groups are trained for: the source of users, and the share of groups that are nobody's."""

    source: Users
    dropout: float = 0.0


class GroupCache(Protocol):
    """What the encoders made before training."""

    crops: int

    def latents(self, row: int, view: View) -> list[dict[str, Any]] | None:
        """For each picture of a row moments [C',h,w], original (height, width) and corner (top, left); None when
        latents are not cached. Raises KeyError for an entry that could not be made."""
        ...

    def conditioning(self, prompt: str) -> dict[str, Tensor] | None:
        """What the text encoders made of one prompt, without batch dimension; None when text is not cached."""
        ...


@dataclass(frozen=True)
class Group:
    """A row, ready to be collated. key: its position in training.  said: what the row says, after caption dropout.
    size (H, W).  pictures: for each, images [3,H,W] or moments [C',h,w], original (height, width) and corner (top,
    left).  conditioning: of each item, from the cache.  user: whose row it is.  asked: what is known of
    that user.  aspects: data.aspects of the row.  faults: a line for each row that this one stands in for."""

    key: int
    said: Said
    weight: float
    size: tuple[int, int]
    pictures: list[dict[str, Any]]
    conditioning: list[Conditioning] | None = None
    user: Any = NOBODY
    asked: dict[str, Tensor] | None = None
    aspects: tuple[float, ...] = ()
    faults: tuple[str, ...] = ()


class PreferenceGroups(TorchDataset):
    """Items of (row, key): one group, decoded or from the cache. The key is the group's position in training; its
    random draws depend on it alone, or with `fixed` on the row and the epoch.

    A row that turns out to be unusable is replaced by the next one that is usable and of the same size, or with
    data.faults=raise stops the run.

    Args:
        rows: Of the kind's columns (pictures undecoded), optionally weight, and row: the number to name it by.
        kind: What the rows say.
        config: How pictures are cut.
        sizes: (H, W) for all groups, or an array [rows, 2].
        seed: Of the random draws.
        cache: What is encoded already.
        asked: Whom the groups are trained for; nobody in particular when not given.
        decode: (name, undecoded picture, view) -> images [3,H,W], original (height, width), corner (top, left).
        fixed: Makes the keys where a row has a few draws that stay the same.
    """

    def __init__(
        self,
        rows: Dataset | None,
        kind: Kind,
        config: DataConfig,
        sizes: tuple[int, int] | np.ndarray,
        seed: int,
        cache: GroupCache | None = None,
        decode: Decode | None = None,
        asked: Asked | None = None,
        fixed: FixedDraws | None = None,
    ):
        self.decode, self.asked, self.fixed = decode or cut_picture, asked, fixed
        self.rows, self.kind, self.config, self.sizes, self.seed, self.cache = rows, kind, config, sizes, seed, cache
        # What needs no picture is read here: reading a whole row copies its pictures.
        self.words = rows and rows.remove_columns([name for name in PICTURES if name in rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[Row, int]) -> Group:
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

    def first_usable(self, rows: Iterable[Row], key: int) -> Group:
        """The first of the rows that can be used, and a line for each one before it. Raises ValueError when all of
        them fail, or the first with data.faults=raise."""
        failed: list[str] = []
        for row in islice(rows, TRIES):
            try:
                group = self.load(row, key)
            except (ValueError, OSError, KeyError) as error:
                reason = error.args[0] if isinstance(error, KeyError) else error  # a KeyError quotes its message
                failed.append(f"row {self.number(row)} of {self.config.path}: {reason}")
                if self.config.faults == "raise":
                    raise ValueError(f"data.path: {failed[0]}") from error
                continue
            return replace(group, faults=tuple(f"{line}; row {self.number(row)} stands in" for line in failed))
        raise ValueError(f"data.path: {failed[0]}; no other row can stand in ({len(failed)} tried)")

    def number(self, row: Row) -> int:
        """The row's number in the set that the user gave."""
        values = row if isinstance(row, dict) else self.words[row]
        return values.get("row", row)

    def load(self, row: Row, key: int) -> Group:
        """One group. Raises ValueError, FileNotFoundError or KeyError with the reason when it cannot be used."""
        if self.fixed and isinstance(row, int):
            key = self.fixed.key(row, key)
        values = row if isinstance(row, dict) else self.words[row]
        said, size = self.kind.says(values, self.config), self.size(row)
        if self.asked:
            said = self.asked.source.says(said, values, key, row)
        if self.kind.captionless and draws(self.seed, key)[3] < self.config.caption_dropout:
            said = said.without_prompts()
        view = draw_view(row, key, size, self.config, self.seed, self.cache.crops if self.cache else None)
        pictures = self.cache.latents(row, view) if self.cache else None
        if pictures is None:
            whole = row if isinstance(row, dict) else self.rows[row]
            pictures = [self.decode(name, picture, view) for name, picture in self.kind.named_pictures(whole).items()]
        weight, words = float(values.get("weight", 1.0)), self.conditioning(said.prompts)
        aspects = tuple(math.nan if values[name] is None else float(values[name]) for name in self.config.aspects)
        user = values.get("user_id", NOBODY)
        return Group(key, said, weight, size, pictures, words, user, self.known(row, key, user), aspects)

    def known(self, row: Row, key: int, user: Any) -> dict[str, Tensor] | None:
        """What is known of a group's user: present is 0, and the rest of no influence, for nobody."""
        if self.asked is None:
            return None
        dropped = torch.rand(1, generator=generator(self.seed, key, DROPPED)).item() < self.asked.dropout
        found = None if dropped else self.asked.source.inputs(row, key, user)
        present = torch.tensor(float(found is not None))
        return {"present": present} | (self.asked.source.absent() if found is None else found)

    def conditioning(self, prompts: list[str]) -> list[Conditioning] | None:
        """What the cache has of each prompt; None where text is not cached."""
        found = [self.cache.conditioning(prompt) if self.cache else None for prompt in prompts]
        known = [words for words in found if words is not None]
        return known or None


def cut_picture(name: str, picture: Picture, view: View) -> dict[str, Any]:
    """One picture, cut. Raises ValueError that names it."""
    try:
        image, original, corner = cut(open_picture(picture), view)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    return {"images": to_tensor(image), "original": original, "corner": corner}


def collate(groups: list[Group]) -> PreferenceBatch:
    """G groups -> N items, group by group."""
    pictures = [picture for group in groups for picture in group.pictures]
    kind = "images" if "images" in pictures[0] else "moments"
    prompts = [prompt for group in groups for prompt in group.said.prompts]
    words = [word for group in groups for word in group.conditioning or ()]
    starts = offsets([len(group.pictures) for group in groups])
    picture = [start + number for start, group in zip(starts, groups, strict=True) for number, _ in group.said.items]
    return PreferenceBatch(
        **{kind: torch.stack([picture[kind] for picture in pictures])},
        prompts=prompts,
        size=groups[0].size,
        original_size=torch.tensor([pictures[number]["original"] for number in picture]),
        crop_top_left=torch.tensor([pictures[number]["corner"] for number in picture]),
        keys=[group.key for group in groups],
        structure=structure(groups, prompts),
        picture=torch.tensor(picture),
        conditioning=stacked(words) if words else None,
        users=None if groups[0].asked is None else stacked([group.asked or {} for group in groups]),
        faults=tuple(line for group in groups for line in group.faults),
    )


def stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of each -> tensors of all."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def structure(groups: list[Group], prompts: list[str]) -> Structure:
    """How their items belong together."""
    said = [group.said for group in groups]
    counts = [len(one.items) for one in said]
    starts = offsets(counts)
    pairs = [(start + i, start + j) for start, one in zip(starts, said, strict=True) for i, j in one.pairs]
    return Structure(
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor(counts)),
        pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        weight=torch.tensor([group.weight for group in groups]),
        scores=joined([one.scores for one in said]),
        labels=joined([one.labels for one in said]),
        probability=joined([one.probability for one in said]),
        prompt=torch.tensor([number_of(prompt) for prompt in prompts]),
        user=users(groups),
        aspects=by_aspect(groups),
    )


def users(groups: list[Group]) -> Tensor | None:
    """Of each item a number for its user, [N]; below 0 and of its own for each row that names none. None for data that
    have no users."""
    if groups[0].user == NOBODY:
        return None
    named = [-1 - i if group.user is None else number_of(str(group.user)) for i, group in enumerate(groups)]
    return torch.tensor([number for number, group in zip(named, groups, strict=True) for _ in group.said.items])


def by_aspect(groups: list[Group]) -> Tensor | None:
    """Of each pair, +1 where its better item is also better in an aspect, [P,A]; None where nobody asks. A pair that
    stands the other way round says the contrary."""
    if not groups[0].aspects:
        return None
    rows = [(group.aspects, 1.0 if i < j else -1.0) for group in groups for i, j in group.said.pairs]
    return torch.tensor([[sign * value for value in aspects] for aspects, sign in rows])


def number_of(name: str) -> int:
    """A number for a prompt or a user, the same in every batch and process."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def offsets(counts: list[int]) -> list[int]:
    """Where each one begins, when so many stand one after the other."""
    return list(accumulate(counts, initial=0))[:-1]


def joined(values: list[tuple[float, ...] | None]) -> Tensor | None:
    """The values of all groups in turn; None where the rows do not say."""
    if None in values:
        return None
    return torch.tensor([number for group in values for number in group or ()])
