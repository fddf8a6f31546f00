"""Find a set of preferences and give it its columns. Nothing is decoded; checks.py looks at the rows."""

import re
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from diffpref.config import DataConfig

Rows = Dataset | IterableDataset
PICTURES = ("chosen", "rejected")
REQUIRED = ("prompt", *PICTURES)
NUMBERS = ("weight", "margin")  # optional columns


def from_parquet(path: Path, config: DataConfig) -> Rows:
    """One parquet file; it has no splits, data.split does not matter."""
    return load_dataset("parquet", data_files=str(path), split="train", streaming=config.streaming)


def from_json(path: Path, config: DataConfig) -> Rows:
    """JSON lines whose pictures are paths, relative to the file; it has no splits, data.split does not matter."""
    with path.open("rb") as file:
        if not any(map(bytes.strip, file)):
            raise ValueError("it is empty")
    rows = load_dataset("json", data_files=str(path), split="train", streaming=config.streaming)
    if isinstance(rows, IterableDataset):
        rows = rows._resolve_features()  # a stream of JSON knows its columns only once its beginning is read
    pictures = [name for name in PICTURES if name in (rows.column_names or ())]

    def absolute(row: dict) -> dict:
        files = {name: row[name] and str(path.parent / row[name]) for name in pictures}
        return {name: file and {"bytes": None, "path": file} for name, file in files.items()}

    return rows.map(
        absolute, features=Features({**(rows.features or {}), **{name: Image(decode=False) for name in pictures}})
    )


def from_folder(path: Path, config: DataConfig) -> Rows:
    """A folder of parquet or JSON Lines files named for the split, or an image folder with metadata.jsonl
    (chosen_file_name, …)."""
    shards = sorted(map(str, path.glob(f"**/{config.split}*.parquet")))
    if not shards and config.split == "train":  # files that bear no split's name
        shards = sorted(map(str, path.glob("**/*.parquet")))
    if shards:
        return load_dataset("parquet", data_files=shards, split="train", streaming=config.streaming)
    if not any(path.glob("**/metadata.*")):
        raise FileNotFoundError(
            f"data.path: the folder {path} has neither parquet files of the split {config.split!r} nor a metadata.jsonl"
        )
    return load_dataset("imagefolder", data_dir=str(path), split=config.split, streaming=config.streaming)


READERS: dict[str, Callable[[Path, DataConfig], Rows]] = {
    ".parquet": from_parquet,
    ".jsonl": from_json,
    ".json": from_json,
    "": from_folder,
}


def read(config: DataConfig) -> Rows:
    """The rows at data.path, wherever that is.

    Raises FileNotFoundError when nothing is there, ValueError when it cannot be read.
    """
    path = Path(config.path)
    if not path.exists():
        return from_hub(config)
    reader = READERS.get("" if path.is_dir() else path.suffix)
    if reader is None:
        raise ValueError(
            f"data.path: {path} has a suffix no reader takes; known: folders, {', '.join(filter(None, READERS))}"
        )
    try:
        return reader(path, config)
    except (
        ValueError,
        DatasetGenerationError,
    ) as error:  # the latter says only that there is one; its cause says which
        raise ValueError(f"data.path: {path} cannot be read: {error.__cause__ or error}") from error


def from_hub(config: DataConfig) -> Rows:
    """A data set of the hub, by its id."""
    missing = f"data.path: no data set at {config.path!r}: not a file or folder here"
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or Path(config.path).suffix in READERS:
        raise FileNotFoundError(missing)
    try:
        return load_dataset(config.path, split=config.split, streaming=config.streaming)
    except Exception as error:  # datasets raises many kinds for "cannot be reached"; each means the same to the user
        raise FileNotFoundError(f"{missing}, nor a data set the hub gives ({type(error).__name__}: {error})") from error


def load_preferences(config: DataConfig) -> Rows:
    """Rows with prompt, chosen, rejected (pictures, not decoded) and, if the set has them, weight and margin.

    Raises FileNotFoundError when nothing is there, ValueError when columns are missing or no row is.
    """
    rows = read(config)
    if isinstance(rows, IterableDataset) and rows.column_names is None:
        rows = rows._resolve_features()
    columns = rows.column_names or []
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise ValueError(f"data.path: {config.path} lacks the column(s) {missing}; it has {columns}")
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"data.path: {config.path} holds no pairs")
    rows = rows.select_columns([name for name in (*REQUIRED, *NUMBERS) if name in columns])
    for name in PICTURES:
        rows = rows.cast_column(name, Image(decode=False))
    check_numbers(rows, config)
    if config.max_pairs is None:
        return rows
    return rows.take(config.max_pairs if isinstance(rows, IterableDataset) else min(len(rows), config.max_pairs))


def check_numbers(rows: Rows, config: DataConfig) -> None:
    """Raise ValueError when weight or margin do not hold numbers. They are not cast: that would copy the whole set."""
    for name in NUMBERS:
        feature = (rows.features or {}).get(name, Value("null"))
        if not (isinstance(feature, Value) and re.match(r"u?int|float|decimal|null", feature.dtype)):
            raise ValueError(f"data.path: the column {name} of {config.path} must hold numbers, it holds {feature}")
