"""Webdataset shards (.tar): the files that share a name up to its first dot are an item.

What they are called is as in data/shards.py. Here they are read as a stream, and a sample that lacks something is a
fault of its own: the others are still scored.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from diffpref.data.shards import ALONE, column
from diffpref.scoring.items import PROMPTS, Item, first_of, flat, text_of, undecoded

TEXTS = ("txt", "text", "cls", "id")  # what is neither of these nor JSON stays bytes
PICTURES = ("image", "gif", "bmp", "tif", "tiff", "avif")  # columns; data/shards.py calls the usual suffixes image
BROKEN = (tarfile.TarError, OSError, EOFError)


@dataclass(frozen=True)
class Shard:
    """An archive. picture, prompt: names of columns; None finds them. keep: also what is bytes becomes a column."""

    file: str
    picture: str | None
    prompt: str | None
    keep: bool

    def count(self) -> int:
        """From the headers of its files. Raises ValueError when it is no archive."""
        number, last = 0, None
        try:
            for name, _ in files(self.file):
                key = parts(name)[0]
                number, last = number + (key != last), key
        except BROKEN as error:
            if not number:
                raise ValueError(f"{self.file} cannot be read: {error}") from error
        return number

    def items(self) -> Iterator[Item]:
        """One a sample. Where the archive breaks off, one more that says so."""
        try:
            for key, sample in groupby(files(self.file), key=lambda file: parts(file[0])[0]):
                yield self.item(key, {parts(name)[1]: read() for name, read in sample})
        except BROKEN as error:
            yield Item({"file": self.file, "key": "what follows"}, fault=f"shard damaged: {error}")

    def item(self, key: str, sample: dict[str, bytes]) -> Item:
        """The files of a sample, by what follows the dot."""
        item = Item({"file": self.file, "key": key})
        try:
            values = decoded(sample)
            picture = self.picture or picture_name(values)
        except ValueError as error:
            item.fault = str(error)
            return item
        prompt = self.prompt or first_of(PROMPTS, values) or "prompt"
        item.picture, item.prompt = undecoded(values.get(picture), ""), text_of(values.get(prompt))
        kept = {name: value for name, value in values.items() if self.keep or not isinstance(value, bytes)}
        item.columns = flat({name: value for name, value in kept.items() if name not in (picture, prompt)})
        item.fault = None if item.picture else f"picture missing: the sample has {', '.join(sample)}"
        return item


def files(file: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files of an archive: name, and what reads it before the next one is asked for."""
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # or it remembers all it has seen
            if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                yield member.name, archive.extractfile(member).read


def parts(name: str) -> tuple[str, str]:
    """`a/17.image_0.png` -> a/17, image_0.png."""
    path = PurePosixPath(name)
    key, _, kind = path.name.partition(".")
    return str(path.with_name(key)), kind.lower()


def decoded(sample: dict[str, bytes]) -> dict[str, Any]:
    """Columns; those of the JSON file beside the others. Raises ValueError for what cannot be read."""
    values: dict[str, Any] = {}
    for kind, content in sample.items():
        try:
            if kind == "json":
                values |= json.loads(content)
            else:
                values[column(kind)] = content.decode() if kind.split(".")[-1] in TEXTS else content
        except (ValueError, TypeError) as error:  # no UTF-8, no JSON, a JSON value that is no object
            raise ValueError(f"sample damaged: its {kind} file cannot be read ({error})") from error
    return values


def picture_name(values: dict[str, Any]) -> str:
    """The column of the picture. Raises ValueError where several may be meant."""
    names = [n for n, v in values.items() if isinstance(v, bytes) and n.split("_")[0] in (*PICTURES, *ALONE)]
    if len(names) > 1 and "image" not in names:
        raise ValueError(f"several pictures: {', '.join(names)}; --image-column says which is meant")
    return "image" if "image" in names or not names else names[0]
