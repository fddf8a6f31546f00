"""Find a set of preferences and check that it is one."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Image, Value, load_dataset

from diffpref.config import DataConfig

REQUIRED = ("prompt", "chosen", "rejected")
OPTIONAL = ("weight",)


def from_parquet(path: Path, split: str) -> Dataset:
    """One parquet file."""
    return load_dataset("parquet", data_files=str(path), split="train")


def from_json(path: Path, split: str) -> Dataset:
    """JSON lines whose pictures are paths, relative to the file."""
    rows = load_dataset("json", data_files=str(path), split="train")
    pictures = [name for name in ("chosen", "rejected") if name in rows.column_names]
    rows = rows.map(lambda row: {name: str(path.parent / row[name]) for name in pictures})
    for name in pictures:
        rows = rows.cast_column(name, Image())
    return rows


def from_folder(path: Path, split: str) -> Dataset:
    """A folder of parquet files named for the split, or an image folder with metadata.jsonl (chosen_file_name, …)."""
    shards = sorted(map(str, path.glob(f"**/{split}*.parquet")))
    if not shards and split == "train":  # files that bear no split's name
        shards = sorted(map(str, path.glob("**/*.parquet")))
    if shards:
        return load_dataset("parquet", data_files=shards, split="train")
    return load_dataset("imagefolder", data_dir=str(path), split=split)


READERS: dict[str, Callable[[Path, str], Dataset]] = {
    ".parquet": from_parquet,
    ".jsonl": from_json,
    ".json": from_json,
    "": from_folder,
}


def read(config: DataConfig) -> Dataset:
    """The rows at data.path, wherever that is. Raises FileNotFoundError when nothing is there."""
    path = Path(config.path)
    if not path.exists():
        return from_hub(config)
    reader = READERS.get("" if path.is_dir() else path.suffix)
    if reader is None:
        raise ValueError(
            f"data.path: {path} has a suffix no reader takes; known: folders, {', '.join(filter(None, READERS))}"
        )
    return reader(path, config.split)


def from_hub(config: DataConfig) -> Dataset:
    """A data set of the hub, by its id."""
    missing = f"data.path: no data set at {config.path!r}: not a file or folder here"
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or Path(config.path).suffix in READERS:
        raise FileNotFoundError(missing)
    try:
        return load_dataset(config.path, split=config.split)
    except Exception as error:  # datasets raises many kinds for "cannot be reached"; each means the same to the user
        raise FileNotFoundError(f"{missing}, nor a data set the hub gives ({type(error).__name__}: {error})") from error


def load_preferences(config: DataConfig) -> Dataset:
    """Rows with prompt, chosen, rejected (pictures, decoded on access) and optionally weight.

    Raises FileNotFoundError when nothing is there, ValueError when columns are missing or no row is.
    """
    rows = read(config)
    missing = [name for name in REQUIRED if name not in rows.column_names]
    if missing:
        raise ValueError(f"data.path: {config.path} lacks the column(s) {missing}; it has {rows.column_names}")
    if not len(rows):
        raise ValueError(f"data.path: {config.path} holds no pairs")
    rows = rows.select_columns([name for name in (*REQUIRED, *OPTIONAL) if name in rows.column_names])
    for name in ("chosen", "rejected"):
        if not isinstance(rows.features[name], Image):
            rows = rows.cast_column(name, Image())
    if "weight" in rows.column_names:
        rows = rows.cast_column("weight", Value("float32"))
        if any(weight is None or not 0 <= weight < float("inf") for weight in rows["weight"][:]):
            raise ValueError(f"data.path: {config.path} has weights that are missing, negative or not finite")
    return rows.select(range(min(len(rows), config.max_pairs or len(rows))))
