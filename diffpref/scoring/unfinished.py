"""Rows on disk as they come: `scores.csv.unfinished/`, a folder of small parquet files beside the target.

Whatever ends a run, what it has scored lies there, readable as it is; the same command goes on with it. Only a finished
run makes the target.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.report import write_whole
from diffpref.scoring.columns import KINDS, to_table
from diffpref.scoring.folders import UNFINISHED
from diffpref.scoring.items import Item
from diffpref.scoring.judging import IMAGE

ROWS, BYTES, SECONDS = 256, 32_000_000, 20.0  # a file is written when one of them is reached
SEEN = b"diffpref_seen"  # metadata of a file: digest of all items up to its end


class Unfinished:
    """The rows of a run, appended. A context: leaving it, however, writes what is not on disk yet. One process has it
    open, up to `close`.

    Args:
        target: What the run is to make.
        request: What was asked for, JSON values; a folder of another request is refused.
        kinds: Of the columns whose kind is known.
        fresh: Throw away what is there.

    Raises:
        ValueError: what is there belongs to another request, or another process has it open.
    """

    def __init__(self, target: Path, request: dict[str, Any], kinds: dict[str, pa.DataType], fresh: bool = False):
        self.folder = target.with_name(target.name + UNFINISHED)
        self.kinds = KINDS | kinds
        self.rows: list[dict[str, Any]] = []
        self.weight, self.since = 0, time.monotonic()
        self.lock: int | None = locked(self.folder)
        try:
            self.begin(request, fresh)
        except BaseException:
            self.close()
            raise

    def begin(self, request: dict[str, Any], fresh: bool) -> None:
        """Look at what is there. Raises ValueError as the class."""
        for part in self.parts() if fresh else ():
            part.unlink()
        self.agree(request)
        self.done = sum(pq.read_metadata(part).num_rows for part in self.parts())
        self.seen = pq.read_schema(self.parts()[-1]).metadata[SEEN].decode() if self.done else ""

    def agree(self, request: dict[str, Any]) -> None:
        """Raise ValueError when rows are there that answer another request."""
        path = self.folder / "_request.json"
        asked = json.loads(path.read_text()) if path.exists() and self.parts() else request
        other = [name for name in request if asked.get(name) != request[name]]
        if other:
            raise ValueError(
                f"{self.folder} holds a run that was not finished, with other {', '.join(other)}; "
                "the same command goes on with it, --fresh throws it away"
            )
        write_whole(path, json.dumps(request, ensure_ascii=False))

    def parts(self) -> list[Path]:
        """The files, in order."""
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def skip(self, items: Iterator[Item]) -> Iterator[Item]:
        """Items without those that are done. Raises ValueError when those are no longer the same."""
        seen, number = "", 0
        while number < self.done and (item := next(items, None)) is not None:
            seen, number = digest(seen, item.name, item.prompt), number + 1
        if seen != self.seen:
            raise ValueError(
                f"{self.folder} holds {self.done} rows of other pictures or prompts than those that are there now; "
                "--fresh throws them away and begins anew"
            )
        yield from items

    def add(self, item: Item, row: dict[str, Any]) -> None:
        """One more row, that of this item."""
        self.rows.append(row)
        self.seen = digest(self.seen, item.name, item.prompt)
        self.weight += len((row.get(IMAGE) or {}).get("bytes") or b"")
        if len(self.rows) >= ROWS or self.weight >= BYTES or time.monotonic() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet. Interrupted, it can be done again: the file is named by its first row."""
        if self.rows:
            table = to_table(self.rows, self.kinds).replace_schema_metadata({SEEN: self.seen.encode()})
            part = self.folder / f"{self.done:010d}.parquet"
            pq.write_table(table, half := part.with_suffix(".half"))
            os.replace(half, part)
            self.done, self.rows, self.weight = self.done + len(self.rows), [], 0
        self.since = time.monotonic()

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def schemas(self) -> Iterator[pa.Schema]:
        """Of the files."""
        return (pq.read_schema(part).remove_metadata() for part in self.parts())

    def tables(self) -> Iterator[pa.Table]:
        """The files, one after another."""
        return (pq.read_table(part) for part in self.parts())

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The rows that are there, without their pictures."""
        for part in self.parts():
            names = [name for name in pq.read_schema(part).names if name != IMAGE]
            yield from pq.read_table(part, columns=names).to_pylist()

    def remove(self) -> None:
        """Nothing is left of it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another process have it."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def locked(folder: Path) -> int:
    """Make the folder, and hold it while what is returned is open. Raises ValueError where another process does."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its run ended just now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(f"{folder} is in use by another run; wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            return lock
        if folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
        os.close(lock)  # its run ended and removed it between the two steps


def digest(before: str, name: str, prompt: str | None) -> str:
    """Of all items up to this one."""
    return hashlib.sha256(json.dumps([before, name, prompt]).encode()).hexdigest()
