"""Digests of every picture's bytes, remembered so that a second start need not read them all."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from diffpref.cache.store import write_atomically
from diffpref.cache.team import Team
from diffpref.data.loader import as_it_is, ignore_interrupts
from diffpref.data.pairs import SIDES
from diffpref.data.pictures import read_bytes

UNKNOWN = -1  # stamp of a picture that must be read each time


def in_workers(items: TorchDataset, workers: int) -> DataLoader:
    """Items in order, each as it is, made by so many processes (by this one when 0)."""
    workers = min(workers, len(items))
    return DataLoader(
        items, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupts, collate_fn=as_it_is
    )


def files(rows: Dataset, side: str) -> Iterator[tuple[int, str]]:
    """(row, path) of the pictures that a set names by their path and does not hold. Reads no picture."""
    column = rows.data.column(side)
    within = pc.is_valid(pc.struct_field(column, "bytes")).to_numpy()
    if within.all():
        return
    paths = pc.struct_field(column, "path")
    places = np.arange(len(column)) if rows._indices is None else rows._indices.column(0).to_numpy()
    for row, place in enumerate(places.tolist()):
        if not within[place]:
            yield row, paths[place].as_py()


def stamp(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except (OSError, TypeError, ValueError):
        return UNKNOWN, UNKNOWN


def stamps(rows: Dataset) -> np.ndarray:
    """[rows, 2 sides, (bytes, ns)] of pictures that are files; 0 for those within the set: its fingerprint speaks for
    them."""
    found = np.zeros((len(rows), 2, 2), np.int64)
    for number, side in enumerate(SIDES):
        for row, path in files(rows, side):
            found[row, number] = stamp(path)
    return found


class Reading(TorchDataset):
    """Row -> (row, its two digests, or the reason why there is none)."""

    def __init__(self, rows: Dataset, order: list[int]):
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: int) -> tuple[int, bytes, str]:
        number = self.order[item]
        row = self.rows[number]
        try:
            return number, b"".join(hashlib.sha256(read_bytes(row[side])).digest() for side in SIDES), ""
        except (OSError, ValueError) as error:
            return number, b"", str(error)


def recall(memo: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Digests [rows, 2, 32] and stamps [rows, 2, 2] of the last time; stamps unknown when there is no such memo."""
    try:
        stored = load_file(memo)
        digests, seen = stored["digests"].numpy(), stored["stamps"].numpy()
        if digests.shape == (count, 2, 32) and seen.shape == (count, 2, 2):
            return digests, seen
    except (OSError, KeyError, SafetensorError):
        pass
    return np.zeros((count, 2, 32), np.uint8), np.full((count, 2, 2), UNKNOWN, np.int64)


def picture_digests(rows: Dataset, folder: Path, workers: int, team: Team) -> tuple[np.ndarray, dict[int, str]]:
    """sha256 of the bytes of both pictures of every row, [rows, 2, 32]; and the reasons of rows that have none.

    A digest is read again when the set's fingerprint, or size or time of a picture's file, is another.
    """
    memo = folder / "digests" / f"{hashlib.sha256(rows._fingerprint.encode()).hexdigest()[:32]}.safetensors"
    digests, seen = recall(memo, len(rows))
    now = stamps(rows)
    stale = np.flatnonzero(((now != seen) | (now == UNKNOWN)).any(axis=(1, 2))).tolist()
    reading = in_workers(Reading(rows, list(team.share(stale))), workers)
    found = list(tqdm(reading, "reading pictures", len(reading), disable=not (team.main and stale)))
    faults = {}
    for row, digest, fault in team.together(found):
        if fault:
            faults[row], now[row], digests[row] = fault, UNKNOWN, 0
        else:
            digests[row] = np.frombuffer(digest, np.uint8).reshape(2, 32)
    if team.main and stale:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, save({"digests": torch.from_numpy(digests), "stamps": torch.from_numpy(now)}))
    return digests, faults
