"""One look at every row before training: which pairs can be used, why the others cannot, how large the pictures are.

Only the words and the headers of the pictures are read. What is broken further inside is found when it is decoded.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from diffpref.config import DataConfig
from diffpref.data.pictures import open_file, picture_size
from diffpref.data.source import PICTURES

Look = tuple[int, str, list[tuple[int, int]]]  # row, "" or why it cannot be used, (height, width) of both pictures
SHOWN = 3  # rows named for each reason


def absent(value: Any) -> bool:
    """Whether a picture or a number is not there."""
    if isinstance(value, dict):
        return value["bytes"] is None and not value["path"]
    return value is None or value != value


def outside(row: dict, below: float = -math.inf, above: float = math.inf) -> bool:
    """Whether the row has a margin, and one smaller than one number or larger than another."""
    margin = row.get("margin")
    return margin is not None and (margin < below or margin > above)


# What the user wants left out. These always only leave out.
FILTERS: dict[str, Callable[[dict, DataConfig], bool]] = {
    "a tie (data.ties)": lambda row, c: c.ties == "drop" and row.get("margin") == 0,
    "margin below data.min_margin": lambda row, c: c.min_margin is not None and outside(row, below=c.min_margin),
    "margin above data.max_margin": lambda row, c: c.max_margin is not None and outside(row, above=c.max_margin),
}

# What is wrong with a row, beside its pictures. With data.faults=raise, these stop the run.
FAULTS: dict[str, Callable[[dict, DataConfig], bool]] = {
    "no label": lambda row, c: absent(row["chosen"]) or absent(row["rejected"]),
    "prompt not text": lambda row, c: not isinstance(row["prompt"], str),
    "prompt empty": lambda row, c: not row["prompt"].strip(),
    "weight missing": lambda row, c: "weight" in row and absent(row["weight"]),
    "weight negative or not finite": lambda row, c: "weight" in row and not 0 <= row["weight"] < math.inf,
    "margin missing": lambda row, c: (c.min_margin, c.max_margin) != (None, None) and absent(row.get("margin")),
}


def examine(row: dict[str, Any], config: DataConfig) -> tuple[str, list[tuple[int, int]]]:
    """A row, undecoded -> (why it cannot be used, or "", (height, width) of both pictures).

    The reason may go on with a colon and details.
    """
    reason = next((reason for reason, holds in (FAULTS | FILTERS).items() if holds(row, config)), "")
    return (reason, []) if reason else examine_pictures(row)


def examine_pictures(row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The same for the pictures alone."""
    try:
        sizes = [picture_size(row[side]) for side in PICTURES]
        return ("twice the same picture" if same_file(row["chosen"], row["rejected"]) else ""), sizes
    except (ValueError, OSError) as error:
        return str(error), []


def same_file(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two pictures are equal to the byte. Contents are read only where the lengths are equal."""
    with open_file(one) as a, open_file(other) as b:
        return length(a) == length(b) and a.read() == b.read()


def length(file: IO[bytes]) -> int:
    """Bytes of a file, which is then at its beginning."""
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    return size


def reason_of(text: str) -> str:
    """The part of a reason that is counted."""
    return text.partition(":")[0]


def is_filter(text: str) -> bool:
    """Whether a row was left out by the user's wish, and not because something is wrong with it."""
    return text in FILTERS


def look(rows: Dataset, indices: Iterable[int], config: DataConfig) -> list[Look]:
    """Examine some of the rows."""
    tables = rows.with_format("arrow")  # pictures stay in the file's memory map: only their headers are read
    return [(i, *examine(undecoded(tables[i]), config)) for i in indices]


def undecoded(table: pa.Table) -> dict[str, Any]:
    """A table of one row -> its values; bytes of pictures as buffers, without a copy."""
    values = {name: table[name][0] for name in table.column_names}
    row = {name: value.as_py() for name, value in values.items() if name not in PICTURES}
    for side in PICTURES:
        content, path = (values[side][key] if values[side].is_valid else None for key in ("bytes", "path"))
        row[side] = {
            "bytes": content.as_buffer() if content is not None and content.is_valid else None,
            "path": path.as_py() if path is not None else None,
        }
    return row


@dataclass(frozen=True)
class Checked:
    """The rows that are used, with a column row that holds their numbers in the set; sizes [rows, 2, 2], the
    (height, width) of both pictures, None for a stream; how many rows were left out, by reason."""

    rows: Dataset | IterableDataset
    sizes: np.ndarray | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def check(
    rows: Dataset | IterableDataset,
    config: DataConfig,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list], list] = list,
) -> Checked:
    """Look at all rows, each process at its share; `gather` puts the lists of all processes together. A stream is
    checked as it comes instead.

    Raises ValueError when nothing is left, and with data.faults=raise for the first row with a fault.
    """
    check_margin(rows, config)
    if isinstance(rows, IterableDataset):
        return Checked(rows)
    share = range(rank, len(rows), world)
    bar = tqdm(share, "looking at the pairs", unit="pair", delay=3, leave=False, disable=rank != 0)
    return conclude(rows, sorted(gather(look(rows, bar, config))), config, rank == 0)


def check_margin(rows: Dataset | IterableDataset, config: DataConfig) -> None:
    """Raise ValueError for limits on a column that is not there."""
    for key in ("min_margin", "max_margin"):
        if getattr(config, key) is not None and "margin" not in (rows.column_names or ()):
            raise ValueError(f"data.{key} needs a column margin, which {config.path} does not have")


def conclude(rows: Dataset, looks: list[Look], config: DataConfig, speak: bool) -> Checked:
    """What all looks together say: the rows that remain, and one printed line about the others."""
    left_out = [(row, text) for row, text, _ in looks if text]
    fault = next((f"row {row} of {config.path}: {text}" for row, text in left_out if not is_filter(text)), None)
    if fault and config.faults == "raise":
        raise ValueError(f"data.path: {fault}")
    if len(left_out) == len(looks):
        raise ValueError(f"data.path: none of the {len(looks)} pairs of {config.path} can be used: {summary(left_out)}")
    if left_out and speak:
        print(f"data: {len(left_out)} of {len(looks)} pairs are left out: {summary(left_out)}", flush=True)
    kept = [row for row, text, _ in looks if not text]
    sizes = np.array([sizes for _, text, sizes in looks if not text])
    numbered = rows.add_column("row", np.arange(len(rows)))  # before select: a selection would be copied, pictures too
    return Checked(numbered.select(kept), sizes, dict(count(left_out)))


def count(left_out: list[tuple[int, str]]) -> Counter[str]:
    """Rows by reason."""
    return Counter(reason_of(text) for _, text in left_out)


def summary(left_out: list[tuple[int, str]]) -> str:
    """Counts by reason, and the first rows of each: "prompt empty 2 (rows 3, 8), …"."""
    parts = []
    for reason, number in count(left_out).most_common():
        first = [str(row) for row, text in left_out if reason_of(text) == reason][:SHOWN]
        more = ", …" if number > len(first) else ""
        parts.append(f"{reason} {number} (row{'s' if number > 1 else ''} {', '.join(first)}{more})")
    return ", ".join(parts)
