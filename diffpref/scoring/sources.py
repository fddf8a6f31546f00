"""What the command names -> where items come from."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from diffpref.scoring.folders import SHARD, TABLE, Pictures, found
from diffpref.scoring.items import Item, Source
from diffpref.scoring.lines import Lines
from diffpref.scoring.shards import Shard
from diffpref.scoring.tables import Table, table

STDIN = "-"
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Reading:
    """How it is read. picture, prompt: columns of tables and shards, None finds them. keep: also their columns that
    hold bytes. sidecars: look for prompts beside picture files. apart: a file that is not looked at in folders, the one
    that will be written."""

    picture: str | None = None
    prompt: str | None = None
    keep: bool = False
    sidecars: bool = True
    apart: str | None = None


@dataclass(frozen=True)
class Sources:
    """Several, one after another."""

    parts: tuple[Source, ...]

    def counts(self) -> list[int | None]:
        """How many each has; None where only the end will tell."""
        return [part.count() for part in self.parts]

    def glance(self, counts: list[int | None]) -> Iterator[tuple[int, Item]]:
        """What can be looked at before the work, without opening a picture: every picture file, and the first row of
        each table and shard; with their numbers."""
        number = 0
        for part, count in zip(self.parts, counts, strict=True):
            if count is not None:
                looked_at = part.items() if isinstance(part, Pictures) else islice(part.items(), 1)
                yield from enumerate(looked_at, number)
                number += count

    def refuse_unclear_order(self) -> None:
        """Raise ValueError where numbers in names, 9.png and 10.png, make it a question which picture comes first."""
        for part in self.parts:
            files = part.files if isinstance(part, Pictures) else []
            counted = sorted(files, key=as_numbers)
            if files == sorted(files) != counted:
                one = next(one for one, other in zip(files, counted, strict=True) if one != other)
                raise ValueError(
                    f"--prompts: a line for each picture, but is {one} before {counted[files.index(one)]}, or after "
                    "it? Give a list with the names of the files (.csv or .jsonl)"
                )

    def scores(self) -> tuple[str, ...]:
        """The columns of tables that are scores of an earlier run."""
        return tuple(name for part in self.parts if isinstance(part, Table) for name in part.scores)

    def items(self) -> Iterator[Item]:
        """Those of the first, of the second, …"""
        for part in self.parts:
            yield from part.items()


def as_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts 9.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def sources(names: Sequence[str], reading: Reading, stdin: Iterable[bytes] | None = None) -> Sources:
    """Files, folders, globs and "-" -> their items. Nothing is opened but the ends of tables.

    Raises FileNotFoundError where nothing is, ValueError for what cannot be read.
    """
    if STDIN in names and len(names) > 1:
        raise ValueError('"-" reads all pairs from standard input; leave the other pictures out')
    if STDIN in names:
        return Sources((Lines(sys.stdin.buffer if stdin is None else stdin),))
    seen: set[str] = set()
    parts: list[Source] = []
    for name in names:
        new = [file for file in located(name, reading.apart) if file not in seen]
        seen.update(new)
        for kind, files in groupby(new, key=suffix):
            parts += of_kind(kind, list(files), name, reading)
    return Sources(tuple(parts))


def located(name: str, apart: str | None) -> list[str]:
    """The files that a name of the command line means. Raises FileNotFoundError where there are none."""
    if os.path.isdir(name):
        files, missing = found(name, apart), f"no pictures, parquet files or shards in the folder {name}"
    elif os.path.exists(name):
        return [refused(name)]
    elif glob.has_magic(name):
        files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file) and file != apart)
        missing = f"no file fits {name}"
    else:
        files, missing = [], f"there is no file or folder {name}"
    if not files:
        raise FileNotFoundError(missing)
    return files


def refused(name: str) -> str:
    """The name; ValueError for a list of pictures, which goes elsewhere."""
    if name.endswith(LISTS):
        raise ValueError(f'{name} is no picture; a list of prompts goes to --prompts, pairs to standard input ("-")')
    return name


def suffix(file: str) -> str:
    """.parquet, .tar, or nothing for pictures."""
    return next((kind for kind in (TABLE, SHARD) if file.lower().endswith(kind)), "")


def of_kind(kind: str, files: list[str], name: str, reading: Reading) -> list[Source]:
    """Sources of files of one kind, which a name of the command line means."""
    if kind == TABLE:
        return [table(file, reading.picture, reading.prompt, reading.keep) for file in files]
    if kind == SHARD:
        return [Shard(file, reading.picture, reading.prompt, reading.keep) for file in files]
    return [Pictures(files, beginning(name), reading.sidecars, listed=os.path.isdir(name))]


def beginning(name: str) -> str:
    """The folder that a name of the command line is, or that of its file, or that of a glob up to its first sign."""
    if os.path.isdir(name):
        return name
    return os.path.dirname(name if os.path.exists(name) else re.split(r"[*?[]", name)[0]) or "."
