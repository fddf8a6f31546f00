"""Which prompt goes with which picture: what --prompts says, lists in folders, files beside pictures."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpref.scoring.items import FILE_NAMES, PROMPTS, Item, first_of

LISTS = (".jsonl", ".csv")  # files that name pictures
TEXT = ".txt"  # one line a picture
METADATA = tuple(f"metadata{suffix}" for suffix in LISTS)  # looked for in a folder of pictures


@dataclass(frozen=True)
class Same:
    """One prompt for all."""

    prompt: str

    def of(self, item: Item, number: int) -> str | None:
        """The prompt of an item, the number'th from 0."""
        return self.prompt


@dataclass(frozen=True)
class Lined:
    """The prompt of the first picture, of the second, …"""

    prompts: list[str]

    def of(self, item: Item, number: int) -> str | None:
        """As `Same.of`."""
        return self.prompts[number] if number < len(self.prompts) else None


@dataclass(frozen=True)
class Named:
    """Prompts by the name of a picture's file, which begins in `folder`, in the folder that the command names, or where
    the command runs. A bare name is that of a picture there, and not of one in a folder below."""

    prompts: dict[str, str]
    folder: str

    def of(self, item: Item, number: int) -> str | None:
        """As `Same.of`; None for a picture that the list does not name."""
        path = item.where.get("path") or item.where.get("key")
        if not path:
            return None
        folders = filter(None, (self.folder, item.root))
        names = [*(os.path.relpath(path, folder) for folder in folders), os.path.normpath(path)]
        return next((self.prompts[name] for name in names if name in self.prompts), None)


Said = Same | Lined | Named


def said(value: str) -> Said:
    """What --prompts gives: a prompt, or the file it names. Raises FileNotFoundError or ValueError."""
    kind = Path(value).suffix
    if kind not in (TEXT, *LISTS):
        return Same(prompted(value, "--prompts"))
    if not os.path.exists(value):
        raise FileNotFoundError(f"--prompts: there is no file {value}")
    return lined(value) if kind == TEXT else named(value)


def prompted(prompt: str, whose: str) -> str:
    """The prompt, if there is one. Raises ValueError."""
    if not prompt.strip():
        raise ValueError(f"{whose}: the prompt is empty")
    return prompt


def lined(path: str) -> Same | Lined:
    """A file of prompts, one a line; one alone is for all pictures."""
    lines = in_lines(path)
    prompts = [prompted(line, f"{path}, line {number}").strip() for number, line in enumerate(lines, 1)]
    if not prompts:
        raise ValueError(f"--prompts: {path} is empty")
    return Lined(prompts) if len(prompts) > 1 else Same(prompts[0])


def named(path: str) -> Named:
    """A list with a picture's file and its prompt in each row. Raises ValueError for rows that lack one, and for two
    prompts of one picture."""
    prompts: dict[str, str] = {}
    for number, row in enumerate(rows(path), 1):
        file, prompt = (row.get(first_of(names, row) or "") for names in (FILE_NAMES, PROMPTS))
        if not isinstance(file, str) or not isinstance(prompt, str):
            raise ValueError(
                f"{path}, row {number}: a picture's file ({', '.join(FILE_NAMES)}) and its prompt "
                f"({', '.join(PROMPTS)}) are needed, it has {', '.join(map(str, row)) or 'nothing'}"
            )
        if prompts.setdefault(os.path.normpath(file), prompt) != prompt:
            raise ValueError(f"{path}, row {number}: another prompt of {file} stands in a row above")
    return Named(prompts, str(Path(path).parent))


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a head, or of JSON lines."""
    lines = in_lines(path)
    if path.endswith(".csv"):
        yield from csv.DictReader(lines)
        return
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no JSON object: {error}") from error


def in_lines(path: str) -> io.StringIO:
    """A text file, to be read by lines. They end at newlines alone: str.splitlines also splits at U+2028 and the like,
    which a prompt may hold. Raises ValueError as `read_text`."""
    return io.StringIO(read_text(path))


def read_text(path: str) -> str:
    """A text file. Raises ValueError when it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def metadata(folder: str) -> tuple[str, Named] | None:
    """The list of prompts in a folder, if there is one, and its file. Raises ValueError where there are two, or one is
    broken."""
    paths = [path for name in METADATA if os.path.exists(path := os.path.join(folder, name))]
    if len(paths) > 1:
        raise ValueError(f"{paths[0]} and {paths[1]} both give prompts; leave one out")
    try:
        return (paths[0], named(paths[0])) if paths else None
    except ValueError as error:
        raise ValueError(f"{error} (--no-sidecars does not read it)") from error


def agreed(name: str, words: dict[str, str | None]) -> str | None:
    """The prompt of an item out of those that several give, by who gives it; None where none does. Raises ValueError
    where they differ."""
    there = {whose: text.strip() for whose, text in words.items() if text is not None}
    if len(set(there.values())) > 1:
        told = "; ".join(f"{whose} says {text!r}" for whose, text in there.items())
        raise ValueError(
            f"{name} has two prompts: {told}. Leave one out (--no-sidecars does not look for prompts beside pictures)"
        )
    return next(iter(there.values()), None)


def prompt_of(item: Item, number: int, given: Said | None) -> str | None:
    """The prompt that an item brings, or that --prompts gives. Raises ValueError where these differ."""
    if given is None:
        return item.prompt
    return agreed(item.name, {"its own place": item.prompt, "--prompts": given.of(item, number)})


def with_prompts(items: Iterable[Item], given: Said | None) -> Iterator[Item]:
    """Items with their prompts. Raises ValueError as `prompt_of`."""
    for number, item in enumerate(items):
        item.prompt = prompt_of(item, number, given)
        yield item
