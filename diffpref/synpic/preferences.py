"""Ranked groups -> a set of preferences that the trainer takes, pictures and all."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from diffpref.data.formats import FEATURES
from diffpref.data.kinds import COMPARISONS
from diffpref.data.pictures import read_bytes
from diffpref.scoring.items import undecoded
from diffpref.synpic.files import sweep, written_whole
from diffpref.synpic.ranking import Group
from diffpref.synpic.scored import IMAGE, Place

ROWS = 64  # written together
HELD = 16  # row groups of pictures held at once: a group's pictures lie in one file for each pipeline
ABOUT = {"pipelines": "pipeline", "seeds": "seed", "keys": "key"}  # of each picture, where it is known: ours <- theirs
NUMBERS, TEXTS = List(Value("float64")), List(Value("string"))


class Pictures:
    """Reads pictures from where they lie. A few row groups are held, for those that lie beside one another."""

    def __init__(self) -> None:
        self.group = lru_cache(HELD)(read_group)
        self.ends = lru_cache(None)(row_group_ends)

    def read(self, place: Place) -> dict[str, Any]:
        """A picture with its bytes. Raises ValueError, naming the place, where it cannot be read."""
        try:
            return {"bytes": bytes(read_bytes(self.undecoded(place))), "path": None}
        except (ValueError, OSError) as error:
            where = place.file if place.row is None else f"{place.file}, row {place.row}"
            raise ValueError(f"the picture at {where} cannot be read: {error}") from error

    def undecoded(self, place: Place) -> dict[str, Any]:
        """As the cell of a column. Raises ValueError where it is empty, or there is none."""
        if place.row is None:
            return {"bytes": None, "path": place.file}
        ends = self.ends(place.file)
        number = bisect_right(ends, place.row)
        if number == len(ends):
            raise ValueError(f"the file has {ends[-1] if ends else 0} rows")
        cell = self.group(place.file, number)[place.row - (ends[number - 1] if number else 0)].as_py()
        if (value := undecoded(cell, str(Path(place.file).parent))) is None:
            raise ValueError("there is none")
        return value


def read_group(file: str, number: int) -> pa.ChunkedArray:
    """The pictures of one row group."""
    with pq.ParquetFile(file) as table:
        return table.read_row_group(number, columns=[IMAGE]).column(0)


def row_group_ends(file: str) -> list[int]:
    """How many rows there are up to the end of each row group. Raises ValueError for a file without pictures."""
    try:
        metadata = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"no parquet file ({error}); score with --keep-images to have the pictures beside") from error
    if IMAGE not in metadata.schema.to_arrow_schema().names:
        raise ValueError(f"it has no column {IMAGE}; score with --keep-images to have the pictures beside")
    return list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))


# --- rows -----------------------------------------------------------------------------------------------------------


def list_rows(groups: Iterable[Group], scorers: Sequence[str], pictures: Pictures) -> Iterator[dict[str, Any]]:
    """One list of each group."""
    for number, group in enumerate(groups):
        images = [pictures.read(one.place) for one in group.pictures]
        yield {
            **common(group, range(len(images)), scorers, number),
            "images": images,
            "scores": group.scores,
            "wins": group.wins,
        }


def pair_rows(
    groups: Iterable[Group], scorers: Sequence[str], pictures: Pictures, how: str, min_gap: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Pairs of each group; how: a key of COMPARISONS. probability: the share of scorers for the winner; margin: the
    difference of the scores."""
    for number, group in enumerate(groups):
        images = [pictures.read(one.place) for one in group.pictures]
        for better, worse in COMPARISONS[how](tuple(group.scores)):
            margin = group.scores[better] - group.scores[worse]
            if margin >= min_gap:
                yield {
                    **common(group, (better, worse), scorers, number),
                    "chosen": images[better],
                    "rejected": images[worse],
                    "probability": group.wins[better][worse],
                    "margin": margin,
                }


def common(group: Group, members: Sequence[int], scorers: Sequence[str], number: int) -> dict[str, Any]:
    """What lists and pairs both say of their pictures, each scorer's own scores among it."""
    about = [group.pictures[i].about for i in members]
    known = {
        ours: [one.get(name) for one in about] for ours, name in ABOUT.items() if any(name in one for one in about)
    }
    own = {name: [line[i] for i in members] for name, line in zip(scorers, group.table, strict=True)}
    return {"prompt": group.pictures[0].prompt, "group_id": number} | known | own


# --- the file -------------------------------------------------------------------------------------------------------


def features(columns: Iterable[str]) -> Features:
    """The kinds of columns: ours have their own, scorers' are lists of numbers."""
    own = FEATURES | {"group_id": Value("int64"), "pipelines": TEXTS, "seeds": List(Value("int64")), "keys": TEXTS}
    return Features({name: own.get(name, NUMBERS) for name in columns})


def check_names(scorers: Sequence[str]) -> None:
    """Raise ValueError for a scorer whose name is that of another column."""
    taken = {*FEATURES, *ABOUT, "group_id", "weight", "user_id"} & set(scorers)
    if taken:
        raise ValueError(f"--scorers: {', '.join(sorted(taken))} is a column of preferences; rename it in the file")


def write(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """A parquet file that is there whole or not at all; returns how many rows it has. A picture that recurs beside
    itself is stored once (dictionary pages). Raises ValueError where there is no row."""
    sweep(path)
    rows, number = iter(rows), 0
    if (first := next(rows, None)) is None:
        raise ValueError("there is no preference to write")
    schema, rows = features(first).arrow_schema, chain([first], rows)
    with (
        written_whole(path) as beside,
        pq.ParquetWriter(beside, schema, compression="zstd", dictionary_pagesize_limit=2**30) as writer,
    ):
        while some := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            number += len(some)
    return number
