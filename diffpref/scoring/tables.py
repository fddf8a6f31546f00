"""Parquet files: a row is an item."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.scoring.columns import recorded
from diffpref.scoring.items import FILE_NAMES, PROMPTS, Item, first_of, text_of, undecoded

ROWS = 32  # read at once, with their pictures


@dataclass(frozen=True)
class Table:
    """A parquet file.

    picture, prompt: the columns of its pictures and of its prompts (None: it has none).
    columns: what else is read.
    scores: those of them that are scores of an earlier run.
    """

    file: str
    picture: str
    prompt: str | None
    columns: tuple[str, ...]
    scores: tuple[str, ...] = ()

    def count(self) -> int:
        """From the end of the file."""
        return pq.read_metadata(self.file).num_rows

    def items(self) -> Iterator[Item]:
        """One a row."""
        names = list(dict.fromkeys([self.picture, *([self.prompt] if self.prompt else []), *self.columns]))
        number = 0
        with pq.ParquetFile(self.file) as table:
            for batch in table.iter_batches(batch_size=ROWS, columns=names):
                for values in batch.to_pylist():
                    yield self.item(number, values)
                    number += 1

    def item(self, number: int, values: dict[str, Any]) -> Item:
        """A row."""
        picture = undecoded(values[self.picture], str(Path(self.file).parent))
        return Item(
            where={"file": self.file, "row": number},
            picture=picture,
            prompt=text_of(values[self.prompt]) if self.prompt else None,
            columns={name: values[name] for name in self.columns},
            fault=None if picture else f"picture missing: the column {self.picture} is empty",
        )


def table(file: str, picture: str | None, prompt: str | None, keep: bool) -> Table:
    """A parquet file, looked at. `picture` and `prompt` name columns; None finds them. `keep`: also columns that hold
    bytes are read on.

    Raises ValueError when it cannot be read, or what its pictures are is not clear.
    """
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for asked in filter(None, (picture, prompt)):
        if asked not in schema.names:
            raise ValueError(f"{file} has no column {asked!r}; its columns are {', '.join(schema.names)}")
    picture = picture or picture_column(file, schema)
    prompt = prompt or first_of(PROMPTS, schema.names)
    others = [field.name for field in schema if keep or not holds_bytes(field.type)]
    path = schema.field(picture).type in (pa.string(), pa.large_string())  # worth keeping also as a column
    columns = tuple(n for n in others if n != prompt and (path or n != picture))
    return Table(file, picture, prompt, columns, tuple(recorded(schema) or ()))


def picture_column(file: str, schema: pa.Schema) -> str:
    """The column of pictures: `image`, or the only one that holds files, or one of paths. Raises ValueError."""
    names = [field.name for field in schema if holds_bytes(field.type) and not pa.types.is_list(field.type)]
    if "image" in schema.names or len(names) == 1:
        return "image" if "image" in schema.names else names[0]
    if not names and (path := first_of(FILE_NAMES, schema.names)):
        return path
    several = f"several columns of pictures, {', '.join(names)}" if names else "no column of pictures"
    raise ValueError(
        f"{file} has {several}; --image-column says which is meant (its columns: {', '.join(schema.names)})"
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column's values have bytes in them, as those of pictures do."""
    if pa.types.is_nested(kind):
        return any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
