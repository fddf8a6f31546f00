"""Rows -> the file that was asked for: parquet, CSV or JSON lines."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as Picture

from diffpref.scoring.columns import SCORES, common, fitted, spelled
from diffpref.scoring.judging import IMAGE
from diffpref.scoring.unfinished import Unfinished

ROWS, BYTES = 8192, 64_000_000  # of a row group in parquet; reached, it is written


def finish(unfinished: Unfinished, target: Path, scores: Iterable[str]) -> None:
    """All rows -> the target, at once; what was unfinished is removed. scores: columns that a parquet file says are
    scores."""
    schema = common(unfinished.schemas()).with_metadata({SCORES: json.dumps(list(scores)).encode()})
    half = unfinished.folder / target.name
    WRITERS[target.suffix]((fitted(table, schema) for table in unfinished.tables()), schema, half)
    os.replace(half, target)
    unfinished.remove()


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Parquet; pictures are what `datasets` takes for pictures."""
    if IMAGE in schema.names:
        pictures = Features(Features.from_arrow_schema(schema) | {IMAGE: Picture()}).arrow_schema
        schema = pictures.with_metadata(pictures.metadata | (schema.metadata or {}))
    with pq.ParquetWriter(path, schema) as writer:
        for table in gathered(tables):
            writer.write_table(table.cast(schema))


def gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables -> larger ones."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= ROWS or sum(one.nbytes for one in held) >= BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def write_csv(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """CSV with a head; what is missing is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(schema.names)
        for row in rows(tables):
            writer.writerow(["" if value is None else spelled(value) for value in row.values()])


def write_jsonl(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """JSON lines; what is missing, or no finite number, is null."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows(tables):
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(finite, ensure_ascii=False, default=str) + "\n")


def rows(tables: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    """Row after row."""
    for table in tables:
        yield from table.to_pylist()


WRITERS: dict[str, Callable[[Iterable[pa.Table], pa.Schema, Path], None]] = {
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".jsonl": write_jsonl,
}
