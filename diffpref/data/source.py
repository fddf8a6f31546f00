"""Find a set of preferences and give it our columns. Nothing is decoded; checks.py looks at the rows."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from diffpref.config import DataConfig
from diffpref.data.canonical import Rows, is_number, is_path, recognise, to_canonical
from diffpref.data.captions import add_rejected_prompts
from diffpref.data.formats import FORMATS
from diffpref.data.joint import joint_pairs
from diffpref.data.kinds import KINDS
from diffpref.data.shards import from_shards

NUMBERS = ("weight", "margin", "probability")  # optional columns


def from_parquet(path: Path, config: DataConfig) -> Rows:
    """One parquet file; it has no splits, data.split does not matter."""
    return load_dataset("parquet", data_files=str(path), split="train", streaming=config.streaming)


def from_json(path: Path, config: DataConfig) -> Rows:
    """JSON lines, or one JSON list, whose pictures are paths, relative to the file; it has no splits, data.split does
    not matter."""
    with path.open("rb") as file:
        if not any(map(bytes.strip, file)):
            raise ValueError("it is empty")
    return load_dataset("json", data_files=str(path), split="train", streaming=config.streaming)


def from_tar(path: Path, config: DataConfig) -> Rows:
    """One webdataset shard."""
    return from_shards([str(path)], config.streaming)


FILES: dict[str, Callable[[list[str], DataConfig], Rows]] = {  # what a folder may hold, in this order
    "parquet": lambda files, c: load_dataset("parquet", data_files=files, split="train", streaming=c.streaming),
    "tar": lambda files, c: from_shards(files, c.streaming),
    "jsonl": lambda files, c: load_dataset("json", data_files=files, split="train", streaming=c.streaming),
    "json": lambda files, c: load_dataset("json", data_files=files, split="train", streaming=c.streaming),
}


def from_folder(path: Path, config: DataConfig) -> Rows:
    """A folder of parquet files, webdataset shards or JSON files named for the split, or an image folder with
    metadata.jsonl (chosen_file_name, …)."""
    if any(path.glob("**/metadata.*")):
        return load_dataset("imagefolder", data_dir=str(path), split=config.split, streaming=config.streaming)
    for suffix, reader in FILES.items():
        if files := split_files(path, suffix, config.split):
            return reader(files, config)
    raise FileNotFoundError(
        f"data.path: the folder {path} has neither parquet files of the split {config.split!r} nor a metadata.jsonl, "
        "nor shards (.tar) or JSON files of that split"
    )


def split_files(path: Path, suffix: str, split: str) -> list[str]:
    """The files of a split. Parquet files and shards that bear no split's name are those of train."""
    named = sorted(map(str, path.glob(f"**/{split}*.{suffix}")))
    if named or split != "train" or suffix.startswith("json"):  # other JSON files of a folder are often settings
        return named
    return sorted(map(str, path.glob(f"**/*.{suffix}")))


READERS: dict[str, Callable[[Path, DataConfig], Rows]] = {
    ".parquet": from_parquet,
    ".jsonl": from_json,
    ".json": from_json,
    ".tar": from_tar,
    "": from_folder,
}


def read(config: DataConfig) -> Rows:
    """The rows at data.path as they are, wherever that is.

    Raises FileNotFoundError when nothing is there, ValueError when it cannot be read.
    """
    path = Path(config.path)
    if not path.exists():
        return resolved(from_hub(config))
    reader = READERS.get("" if path.is_dir() else path.suffix)
    if reader is None:
        raise ValueError(
            f"data.path: {path} has a suffix no reader takes; known: folders, {', '.join(filter(None, READERS))}"
        )
    try:
        return resolved(reader(path, config))
    except (
        ValueError,
        DatasetGenerationError,
    ) as error:  # the latter says only that there is one; its cause says which
        raise ValueError(f"data.path: {path} cannot be read: {error.__cause__ or error}") from error


def resolved(rows: Rows) -> Rows:
    """Rows with their columns known. A stream of JSON knows them only once its beginning is read."""
    return rows._resolve_features() if isinstance(rows, IterableDataset) and rows.column_names is None else rows


def from_hub(config: DataConfig) -> Rows:
    """A data set of the hub, by its id."""
    missing = f"data.path: no data set at {config.path!r}: not a file or folder here"
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or Path(config.path).suffix in READERS:
        raise FileNotFoundError(missing)
    try:
        return load_dataset(config.path, split=config.split, streaming=config.streaming)
    except Exception as error:  # datasets raises many kinds for "cannot be reached"; each means the same to the user
        raise FileNotFoundError(f"{missing}, nor a data set the hub gives ({type(error).__name__}: {error})") from error


def load_preferences(config: DataConfig, numbers: bool = False) -> Rows:
    """Rows with the columns of one of our kinds (formats.py); pictures are not decoded. With `numbers` a column given
    has what each of data.scorers gave, for users who weigh them, and nobody votes.

    Raises FileNotFoundError when nothing is there, ValueError when the columns are those of no known format or no row
    is there.
    """
    rows = canonical(read(config), config, numbers)
    if config.max_pairs is not None:
        most = config.max_pairs
        rows = rows.take(most if isinstance(rows, IterableDataset) else min(len(rows), most))
    return completed(rows, config)


def canonical(rows: Rows, config: DataConfig, numbers: bool = False) -> Rows:
    """Rows as they were read -> our columns. Raises ValueError as `load_preferences`."""
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"data.path: {config.path} holds no rows")
    name = recognise(list(rows.column_names or []), config)
    rows = to_canonical(rows, name, config, picture_folder(rows, name, config), numbers)
    check_numbers(rows, config)
    return rows


def named_format(config: DataConfig) -> str:
    """The name of the format that a set is read as. Raises as `load_preferences`."""
    return recognise(list(read(config).column_names or []), config)


def completed(rows: Rows, config: DataConfig) -> Rows:
    """With the other prompts that data.joint and data.rejected_captions bring. Raises ValueError where they cannot."""
    if config.joint and config.rejected_captions:
        raise ValueError("data.joint and data.rejected_captions both say what the other prompt is; set one of them")
    if config.joint:
        return joint_pairs(rows, config)
    if config.rejected_captions is not None:
        return add_rejected_prompts(rows, config)
    if set(rows.column_names or ()) & {"label", "rejected_prompt", "chosen", "images"}:
        return rows
    raise ValueError(
        f"data.path: {config.path} has pictures with their prompts, and nothing to compare them with; "
        "data.rejected_captions adds prompts that fit worse"
    )


def picture_folder(rows: Rows, name: str, config: DataConfig) -> Path | None:
    """Where paths of pictures begin: the folder of the file, or the one in it that bears the file's or the split's name
    (as the archives of HPDv2 unpack). None for a set of the hub."""
    path = Path(config.path)
    if not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    column = FORMATS[name].columns[KINDS[FORMATS[name].kind].pictures[0]]
    if not is_path((rows.features or {}).get(column)):
        return folder
    first = first_path(rows, column)
    near = [folder, folder / path.stem, folder / config.split]
    return next((place for place in near if first and (place / first).exists()), folder)


def first_path(rows: Rows, column: str) -> str:
    """The first picture of the first row, or nothing."""
    some = rows.select_columns([column])
    value = next(iter(some if isinstance(some, IterableDataset) else some.select(range(1))))[column]
    return value if isinstance(value, str) else next(iter(value or [""])) or ""


def check_numbers(rows: Rows, config: DataConfig) -> None:
    """Raise ValueError when weight, margin or probability do not hold numbers. They are not cast: that would copy the
    whole set."""
    for name in NUMBERS:
        feature = (rows.features or {}).get(name, Value("null"))
        if not is_number(feature):
            raise ValueError(f"data.path: the column {name} of {config.path} must hold numbers, it holds {feature}")
