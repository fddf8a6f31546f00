"""One look at every row before training: which rows can be used, why the others cannot, how large the pictures are.

Only the words and the headers of the pictures are read. What is broken further inside is found when it is decoded.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from diffpref.config import DataConfig
from diffpref.data.columns import add_column
from diffpref.data.kinds import LABELS, PICTURES, Kind, Picture, kind_of
from diffpref.data.pictures import open_file, picture_size, read_bytes
from diffpref.data.votes import GIVEN

Look = tuple[int, str, list[tuple[int, int]]]  # row, "" or why it cannot be used, (height, width) of its pictures
SHOWN = 3  # rows named for each reason


def absent(value: Any) -> bool:
    """Whether a picture or a number is not there."""
    if isinstance(value, dict):
        return value["bytes"] is None and not value["path"]
    return value is None or value != value


def alike(row: dict) -> bool:
    """Whether the row has scorers' numbers, and none of them tells two pictures apart."""
    return bool(row.get(GIVEN)) and all(len(set(line)) == 1 for line in row[GIVEN])


def outside(row: dict, below: float = -math.inf, above: float = math.inf) -> bool:
    """Whether the row has a margin, and one smaller than one number or larger than another."""
    margin = row.get("margin")
    return margin is not None and (margin < below or margin > above)


# What the user wants left out. These always only leave out.
FILTERS: dict[str, Callable[[dict, DataConfig], bool]] = {
    "a tie (data.ties)": lambda row, c: c.ties == "drop" and (row.get("margin") == 0 or alike(row)),
    "margin below data.min_margin": lambda row, c: c.min_margin is not None and outside(row, below=c.min_margin),
    "margin above data.max_margin": lambda row, c: c.max_margin is not None and outside(row, above=c.max_margin),
}

# What is wrong with a row, beside its pictures. With data.faults=raise, these stop the run.
FAULTS: dict[str, Callable[[dict, DataConfig], bool]] = {
    "prompt not text": lambda row, c: not isinstance(row["prompt"], str),
    "prompt empty": lambda row, c: not row["prompt"].strip(),
    "weight missing": lambda row, c: "weight" in row and absent(row["weight"]),
    "weight negative or not finite": lambda row, c: "weight" in row and not 0 <= row["weight"] < math.inf,
    "margin missing": lambda row, c: (c.min_margin, c.max_margin) != (None, None) and absent(row.get("margin")),
}

BAD_VOTES = "not one finite vote for each picture (data.scorers)"
# The same for rows of one kind; these come first.
KIND_FAULTS: dict[str, dict[str, Callable[[dict, DataConfig], bool]]] = {
    "pairs": {
        BAD_VOTES: lambda row, c: bool(c.scorers) and (absent(row.get("probability", 1.0)) or not row.get(GIVEN, True)),
        "no label": lambda row, c: absent(row["chosen"]) or absent(row["rejected"]),
        "rejected_prompt missing": lambda row, c: absent(row.get("rejected_prompt", "")),
        "probability missing": lambda row, c: c.ties != "half" and absent(row.get("probability", 1.0)),
        "probability outside [0, 1]": lambda row, c: not (absent(row.get("probability")) or share(row["probability"])),
    },
    "lists": {
        "no pictures": lambda row, c: not row["images"],
        "list of one": lambda row, c: len(row["images"]) == 1,
        BAD_VOTES: lambda row, c: bool(c.scorers) and None in (row.get("wins", ()), row.get(GIVEN, ())),
        "not one score for each picture": lambda row, c: len(row["scores"] or ()) != len(row["images"]),
        "scores not finite": lambda row, c: not all(not absent(x) and math.isfinite(x) for x in row["scores"]),
        "all ties": lambda row, c: alike(row) if GIVEN in row else len(set(row["scores"])) == 1,
        "wins missing": lambda row, c: row.get("wins", ()) is None,
        "wins not k x k": lambda row, c: "wins" in row and not square(row["wins"], len(row["images"])),
        "probability outside [0, 1]": lambda row, c: not all(map(share, off_diagonal(row.get("wins", ())))),
    },
    "likes": {"label not known": lambda row, c: row["label"] not in LABELS},
    "captions": {
        "rejected_prompt not text": lambda row, c: not isinstance(row["rejected_prompt"], str),
        "rejected_prompt empty": lambda row, c: not row["rejected_prompt"].strip(),
        "rejected_prompt equal to prompt": lambda row, c: row["rejected_prompt"] == row["prompt"],
    },
}


def share(value: float | None) -> bool:
    """Whether a number lies in [0, 1]."""
    return value is not None and 0 <= value <= 1


def off_diagonal(wins: Sequence[Sequence[float]]) -> list[float]:
    """The numbers of every two pictures that are not the same."""
    return [value for i, line in enumerate(wins) for j, value in enumerate(line) if i != j]


def square(wins: list[list[float] | None], side: int) -> bool:
    """Whether there are numbers for every two of so many pictures."""
    return len(wins) == side and all(line is not None and len(line) == side for line in wins)


def examine(row: dict[str, Any], kind: Kind, config: DataConfig) -> tuple[str, list[tuple[int, int]]]:
    """A row, undecoded -> (why it cannot be used, or "", (height, width) of its pictures).

    The reason may go on with a colon and details.
    """
    reasons = KIND_FAULTS[kind.name] | FAULTS | FILTERS
    reason = next((reason for reason, holds in reasons.items() if holds(row, config)), "")
    return (reason, []) if reason else examine_pictures(list(kind.named_pictures(row).values()))


def examine_pictures(pictures: list[Picture]) -> tuple[str, list[tuple[int, int]]]:
    """The same for the pictures alone."""
    try:
        sizes = [picture_size(picture) for picture in pictures]
        return ("twice the same picture" if repeated(pictures) else ""), sizes
    except (ValueError, OSError) as error:
        return str(error), []


def repeated(pictures: list[Picture]) -> bool:
    """Whether two pictures are equal to the byte. Contents are read only where the lengths are equal."""
    lengths = [length(picture) for picture in pictures]
    return any(
        lengths[i] == lengths[j] and read_bytes(pictures[i]) == read_bytes(pictures[j])
        for i, j in combinations(range(len(pictures)), 2)
    )


def length(picture: Picture) -> int:
    """Bytes of a picture's file."""
    with open_file(picture) as file:
        return file.seek(0, 2)


def reason_of(text: str) -> str:
    """The part of a reason that is counted."""
    return text.partition(":")[0]


def is_filter(text: str) -> bool:
    """Whether a row was left out by the user's wish, and not because something is wrong with it."""
    return text in FILTERS


def look(rows: Dataset, indices: Iterable[int], config: DataConfig) -> list[Look]:
    """Examine some of the rows."""
    kind = kind_of(rows.column_names, config)
    unused = [name for name in PICTURES if name in rows.column_names and name not in kind.pictures]
    tables = rows.remove_columns(unused).with_format("arrow")  # pictures stay in the file's memory map
    return [(i, *examine(undecoded(tables[i]), kind, config)) for i in indices]


def undecoded(table: pa.Table) -> dict[str, Any]:
    """A table of one row -> its values; bytes of pictures as buffers, without a copy."""
    columns = {name: next(chunk for chunk in table[name].chunks if len(chunk)) for name in table.column_names}
    return {name: pictures_of(one) if name in PICTURES else one[0].as_py() for name, one in columns.items()}


def pictures_of(column: pa.StructArray | pa.ListArray) -> Any:
    """The picture of a column of one row, or the list of them, or None."""
    if isinstance(column, pa.StructArray):
        return picture_at(column, 0)
    first, end = column.offsets.to_pylist()
    return None if column.null_count else [picture_at(column.values, place) for place in range(first, end)]


def picture_at(column: pa.StructArray, place: int) -> Picture | None:
    """An undecoded picture."""
    if column.slice(place, 1).null_count:
        return None
    return {"bytes": buffer_at(column.field("bytes"), place), "path": column.field("path")[place].as_py()}


def buffer_at(column: pa.BinaryArray, place: int) -> pa.Buffer | None:
    """A value as a part of the column's memory: to arrow's own scalars it is copied."""
    one = column.slice(place, 1)
    if one.null_count:
        return None
    _, offsets, data = one.buffers()
    width = np.dtype(np.int64 if pa.types.is_large_binary(column.type) else np.int32)
    first, end = np.frombuffer(offsets, width, 2, one.offset * width.itemsize).tolist()
    return data.slice(first, end - first)


@dataclass(frozen=True)
class Checked:
    """The rows that are used, with a column row that holds their numbers in the set; sizes [rows, K, 2], the
    (height, width) of their pictures, zeros where a row has fewer than the longest, None for a stream; how many rows
    were left out, by reason."""

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
    bar = tqdm(share, "looking at the rows", unit="row", delay=3, leave=False, disable=rank != 0)
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
        raise ValueError(f"data.path: none of the {len(looks)} rows of {config.path} can be used: {summary(left_out)}")
    if left_out and speak:
        print(f"data: {len(left_out)} of {len(looks)} rows are left out: {summary(left_out)}", flush=True)
    kept = [row for row, text, _ in looks if not text]
    sizes = padded([sizes for _, text, sizes in looks if not text])
    numbered = add_column(rows, "row", np.arange(len(rows)))
    return Checked(numbered.select(kept), sizes, dict(count(left_out)))


def padded(sizes: list[list[tuple[int, int]]]) -> np.ndarray:
    """The sizes of the pictures of all rows, [rows, K, 2], zeros where a row has fewer than K."""
    longest = max(map(len, sizes))
    return np.array([[*row, *[(0, 0)] * (longest - len(row))] for row in sizes])


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
