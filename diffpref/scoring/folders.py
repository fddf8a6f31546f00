"""Picture files, named or found in folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from diffpref.scorer.inputs import SUFFIXES
from diffpref.scoring.items import Item
from diffpref.scoring.prompts import TEXT, Named, agreed, metadata, read_text

TABLE, SHARD = ".parquet", ".tar"
UNFINISHED = ".unfinished"  # ends the name of a folder with the rows of a run that goes on, or was stopped
READ = (*sorted(SUFFIXES), TABLE, SHARD)  # what is looked for in folders


@dataclass(frozen=True)
class Pictures:
    """Files of pictures, and the folder that their name on the command line begins in. sidecars: look for prompts in
    the text files beside them.  listed: and in the folder's metadata.jsonl or metadata.csv."""

    files: list[str]
    root: str
    sidecars: bool
    listed: bool

    def count(self) -> int:
        """All of them."""
        return len(self.files)

    def items(self) -> Iterator[Item]:
        """One a file. Raises ValueError where a text file and the folder's list differ."""
        listed = metadata(self.root) if self.sidecars and self.listed else None
        for file in self.files:
            item = Item({"path": file}, picture={"bytes": None, "path": file}, root=self.root)
            if self.sidecars:
                find_prompt(item, listed)
            yield item


def find_prompt(item: Item, listed: tuple[str, Named] | None) -> None:
    """Give a picture the prompt that stands beside it, if one does."""
    beside = os.path.splitext(item.name)[0] + TEXT
    try:
        words = {beside: read_text(beside) if os.path.exists(beside) else None}
    except ValueError as error:
        item.fault = f"prompt damaged: {error}"
        return
    if listed:
        words[listed[0]] = listed[1].of(item, 0)
    item.prompt = agreed(item.name, words)


def found(folder: str, apart: str | None = None) -> list[str]:
    """What can be read in a folder and the folders in it, sorted by name, but for one file. What is hidden is not
    looked at, nor what a run of `diffpref score` has not finished."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(UNFINISHED)]
        files += [os.path.join(place, name) for name in names if readable(name)]
    return sorted(file for file in files if apart is None or os.path.abspath(file) != os.path.abspath(apart))


def readable(name: str) -> bool:
    """Whether a file's name says that it holds pictures."""
    return name.lower().endswith(READ) and not name.startswith(".")
