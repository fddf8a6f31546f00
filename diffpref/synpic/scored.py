"""What `diffpref score` wrote -> pictures with their scores. Pictures themselves stay where they are.

Columns: prompt; a column of numbers for each scorer, empty where it could not; error; and where the picture lies: image
(its bytes), path (its file), or file and row (of a parquet file with a column image).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.scoring.columns import recorded

IMAGE, ERROR = "image", "error"
WHERE = ("path", "file", "row", "key")  # columns that tell one picture from another
NO_SCORERS = ("prompt", "seed", "row", ERROR)


@dataclass(frozen=True)
class Place:
    """Where a picture lies: in a row of a parquet file's column image, or, without a row, in a file of its own."""

    file: str
    row: int | None = None


@dataclass
class Scored:
    """A picture. about: its row without scores.  scores: by scorer, those that there are."""

    place: Place
    about: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Empty where there is none."""
        return str(self.about.get("prompt") or "").strip()


def read_scored(names: Sequence[Path], scorers: Sequence[str] = ()) -> tuple[list[Scored], list[str]]:
    """The pictures of files and folders, and their scorers: those asked for, else as `found_scorers`.

    A picture that several files have scored, each by other scorers, is one. Raises FileNotFoundError where nothing is,
    ValueError for files without such columns, and for scores that are not finite or contradict each other.
    """
    files = [file for name in names for file in parquet_files(name)]
    schemas = {file: schema_of(file) for file in files}
    chosen = check_scorers(schemas, list(scorers)) if scorers else found_scorers(schemas)
    pictures: dict[tuple, Scored] = {}
    for file, schema in schemas.items():
        for number, row in enumerate(rows_of(file, schema)):
            add(pictures, one_of(file, schema, number, row, chosen))
    return list(pictures.values()), chosen


# --- files ----------------------------------------------------------------------------------------------------------


def parquet_files(name: Path) -> list[Path]:
    """The file, or those of a folder. Raises FileNotFoundError."""
    files = sorted(name.rglob("*.parquet")) if name.is_dir() else [name] if name.is_file() else []
    if not files:
        raise FileNotFoundError(f"there is no parquet file at {name}; diffpref score writes them with --out x.parquet")
    return files


def schema_of(file: Path) -> pa.Schema:
    """The columns of a file. Raises ValueError where they cannot be read, or lack prompt or picture."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{file} is no parquet file ({error}); diffpref score writes one with --out x.parquet"
        ) from error
    places = {IMAGE, "path"} & set(schema.names) or {"file", "row"} <= set(schema.names)
    if "prompt" not in schema.names or not places:
        raise ValueError(
            f"{file} has the columns {schema.names}; it needs prompt, a scorer's numbers, and where the pictures lie:"
            " image, path, or file and row"
        )
    return schema


def found_scorers(schemas: dict[Path, pa.Schema]) -> list[str]:
    """The columns that files say are scores. Of a file that says nothing it is the only column of fractions, or several
    that other files say are scores. Raises ValueError where there is none, or it is not clear."""
    said = {file: recorded(schema) for file, schema in schemas.items()}
    known = {name for names in said.values() for name in names or ()}
    found = [fractions(file, schemas[file], known) if names is None else names for file, names in said.items()]
    names = list(dict.fromkeys(name for some in found for name in some))
    if not names:
        raise ValueError(f"{', '.join(map(str, schemas))}: no column of scores is there; --scorers can name some")
    return names


def fractions(file: Path, schema: pa.Schema, known: set[str]) -> list[str]:
    """The columns of a file without a record that are scores. Raises ValueError where several may be, truths or margins
    among them."""
    names = [one.name for one in schema if pa.types.is_floating(one.type) and one.name not in NO_SCORERS]
    if len(names) > 1 and not known.issuperset(names):
        raise ValueError(f"{file} does not say which columns are scores; --scorers names them, of {', '.join(names)}")
    return names


def check_scorers(schemas: dict[Path, pa.Schema], names: list[str]) -> list[str]:
    """The names. Raises ValueError for one that is no column, holds no numbers, or is there twice."""
    kinds = {name: [schema.field(name).type for schema in schemas.values() if name in schema.names] for name in names}
    there = list(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
    for name, found in kinds.items():
        if not found:
            raise ValueError(f"--scorers: there is no column {name!r}; there are {', '.join(there)}")
        if not all(is_number(kind) for kind in found):
            raise ValueError(f"--scorers: the column {name} holds {found[0]} and no numbers")
    return list(kinds)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or nothing at all."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def rows_of(file: Path, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of a file without its pictures."""
    names = [one.name for one in schema if not pa.types.is_nested(one.type) and not pa.types.is_binary(one.type)]
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(columns=names):
            yield from batch.to_pylist()


# --- rows -----------------------------------------------------------------------------------------------------------


def one_of(file: Path, schema: pa.Schema, number: int, row: dict[str, Any], scorers: Sequence[str]) -> Scored:
    """One row. Raises ValueError, naming it, for a score that is not finite."""
    about = {name: value for name, value in row.items() if name not in scorers}
    scores = {name: float(row[name]) for name in scorers if row.get(name) is not None}
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"{file}, row {number}: {name} gives {score}; a picture without a score must have none there, or leave"
                " the scorer out with --scorers"
            )
    return Scored(place_of(file, schema, number, about), about, scores)


def place_of(file: Path, schema: pa.Schema, number: int, about: dict[str, Any]) -> Place:
    """Where the picture of a row lies; paths begin where the command runs, or else beside the file."""
    path, source, row = (about.get(name) for name in ("path", "file", "row"))
    if IMAGE in schema.names:
        return Place(str(file), number)
    if source is not None and row is not None:
        return Place(near(source, file), row)
    return Place(near(path or "", file))


def near(path: str, file: Path) -> str:
    """A path as it is, or beside the file that names it if it lies there."""
    beside = file.parent / path
    return str(beside) if path and not Path(path).exists() and beside.exists() else path


def add(pictures: dict[tuple, Scored], one: Scored) -> None:
    """Put a picture among the others, or its scores beside those it has. Raises ValueError for two different scores:
    the last digits depend on what is judged beside, the first score stays."""
    where = tuple(one.about.get(name) for name in WHERE)
    known = where if any(value is not None for value in where) else (one.place.file, one.place.row)
    there = pictures.setdefault((one.prompt, *known), one)
    for name, score in one.scores.items():
        if not math.isclose(there.scores.setdefault(name, score), score, rel_tol=1e-5, abs_tol=1e-6):
            raise ValueError(f"{name} gives two scores, {there.scores[name]} and {score}, to the picture {called(one)}")
    there.about[ERROR] = there.about.get(ERROR) or one.about.get(ERROR)


def called(one: Scored) -> str:
    """A picture's name in messages."""
    said = [f"{name} {one.about[name]}" for name in WHERE if one.about.get(name) is not None]
    return ", ".join(said) or f"{one.place.file}, row {one.place.row}"
