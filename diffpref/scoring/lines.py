"""Pairs from standard input: a line is an item."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from diffpref.scoring.items import FILE_NAMES, PROMPTS, Item, first_of, flat, text_of, undecoded


@dataclass(frozen=True)
class Lines:
    """Lines of bytes: path, a tab, prompt; or the path alone; or a JSON object with image and prompt, whose other keys
    become columns."""

    lines: Iterable[bytes]

    def count(self) -> None:
        """Not known before the end."""
        return None

    def items(self) -> Iterator[Item]:
        """One a line; lines that are blank are none."""
        for number, line in enumerate(self.lines, 1):
            if line.strip():
                yield item(number, line.rstrip(b"\r\n"))


def item(number: int, line: bytes) -> Item:
    """One line."""
    try:
        values = parsed(line.decode())
    except ValueError as error:
        return Item({"file": "standard input", "row": number}, fault=f"line damaged: {error}")
    picture, prompt = first_of(FILE_NAMES, values), first_of(PROMPTS, values)
    value = undecoded(values.get(picture), "")
    where = {"path": value["path"]} if value else {"file": "standard input", "row": number}
    return Item(
        where,
        value,
        text_of(values.get(prompt)),
        flat({name: found for name, found in values.items() if name not in (picture, prompt)}),
        fault=None if value else f"picture missing: the line names none of {', '.join(FILE_NAMES)}",
    )


def parsed(line: str) -> dict[str, Any]:
    """The values of a line. Raises ValueError when it is neither of what is known."""
    if not line.lstrip().startswith("{"):
        path, tab, prompt = line.partition("\t")
        return {"image": path} | ({"prompt": prompt} if tab else {})
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is needed, not a {type(values).__name__}")
    return values
