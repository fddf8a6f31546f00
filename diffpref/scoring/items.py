"""What is scored: a picture that is not opened yet, its prompt, and what else is known of it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

PROMPTS = ("prompt", "caption", "text")  # what a prompt is called, the first that is there
FILE_NAMES = ("file_name", "path", "image", "file")  # what a picture's file is called in a list of prompts


@dataclass
class Item:
    """One picture with its prompt.

    where: the columns that say where it lies: path, or file and row, or file and key.
    picture: undecoded, {"bytes", "path"} as data/pictures.py takes it; None where there is a fault.
    prompt: None where nothing says it yet.
    columns: what else its row holds.
    root: of a picture file, the folder that the command names, itself or by what lies in it.
    fault: why it cannot be scored, as far as known before it is opened.
    """

    where: dict[str, Any]
    picture: dict[str, Any] | None = None
    prompt: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return called(self.where)


class Source(Protocol):
    """Where items come from."""

    def count(self) -> int | None:
        """How many there are; None where only the end will tell."""
        ...

    def items(self) -> Iterator[Item]:
        """They, in an order that is always the same."""
        ...


def called(columns: dict[str, Any]) -> str:
    """The name of an item, out of the columns that say where it lies."""
    file, row, key = (columns.get(name) for name in ("file", "row", "key"))
    if file is None:
        return str(columns.get("path"))
    return f"{file}, row {row}" if key is None else f"{file}, {key}"


def undecoded(value: Any, folder: str) -> dict[str, Any] | None:
    """A cell that holds a picture -> {"bytes", "path"}; None if it holds none.

    Paths begin in `folder`, that of the file they are written in, or else where the command runs.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, path = None, content
    if not isinstance(content, bytes | None) or not (content is not None or isinstance(path, str) and path):
        return None
    if content is None and os.path.exists(beside := os.path.join(folder, path)):
        path = beside
    return {"bytes": content, "path": path}


def first_of(names: tuple[str, ...], columns: Any) -> str | None:
    """The first of some names that is among the columns."""
    return next((name for name in names if name in columns), None)


def text_of(value: Any) -> str | None:
    """A cell that holds a prompt; anything but text is none."""
    return value if isinstance(value, str) else None


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """What a JSON object holds, as columns: lists and objects in it stay JSON."""
    return {name: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for name, v in values.items()}
