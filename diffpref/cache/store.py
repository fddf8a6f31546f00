"""Entries on disk: safetensors shards of bounded size, found through an index, checked by checksums.

A shard is written beside, then renamed, so a run that is killed leaves whole shards and no half ones. The index only
saves time: it is rebuilt from the shards wherever it does not fit them.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffpref.cache.fingerprint import raw

SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")  # other files in the folder are none of ours
ENTRIES, BYTES = 512, 64 << 20  # of a shard, at most
OPEN = 128  # shards that a process keeps open: opening takes 2 ms, and their headers 25 MB

Entry = dict[str, Tensor]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises OSError, with the mend, when the disk is full."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cache.folder: cannot write {path} ({error.strerror}); what was encoded before is kept:"
            " free some space there or name another cache.folder, and start again",
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def checksum(entry: Entry) -> int:
    """Over the names, kinds and bytes of an entry's tensors."""
    crc = 0
    for name, tensor in sorted(entry.items()):
        crc = zlib.crc32(raw(tensor), zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc))
    return crc


class ShardWriter:
    """Collects entries, all with tensors of the same names, and writes a shard whenever one is full, and at the end."""

    def __init__(self, folder: Path, entries: int = ENTRIES, nbytes: int = BYTES):
        self.folder, self.limits, self.held, self.bytes = folder, (entries, nbytes), {}, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, OSError):  # what is encoded is kept, unless it cannot be written
            self.flush()

    def add(self, key: str, entry: Entry) -> None:
        """Take one entry; what is full is written."""
        self.held[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        self.bytes += sum(tensor.nbytes for tensor in entry.values())
        if len(self.held) >= self.limits[0] or self.bytes >= self.limits[1]:
            self.flush()

    def flush(self) -> None:
        """Write the entries held as one shard, named by their keys."""
        if not self.held:
            return
        held, self.held, self.bytes = self.held, {}, 0
        name = hashlib.sha256(" ".join(held).encode()).hexdigest()[:32]
        crc = {key: checksum(entry) for key, entry in held.items()}
        metadata = {"crc": json.dumps(crc), "fields": json.dumps(sorted(next(iter(held.values()))))}
        tensors = {f"{key}.{field}": tensor for key, entry in held.items() for field, tensor in entry.items()}
        write_atomically(self.folder / f"{name}.safetensors", save(tensors, metadata))


class Store:
    """One encoder's entries, in one folder.

    shards: file name -> keys of its entries, none where the header is damaged. where: key -> its shard's file name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pid, self.handles = 0, {}
        self.scan()

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pid": 0, "handles": {}}  # each process opens shards for itself

    # --- which entries there are ------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Look at what is in the folder: by the index, and by the header of each shard that it does not fit."""
        index, self.shards = self.read_index(), {}
        for path in sorted(self.folder.iterdir()):
            if SHARD.fullmatch(path.name):
                known = index.get(path.name, {})
                fits = known.get("bytes") == path.stat().st_size
                self.shards[path.name] = known["keys"] if fits else header_keys(path)
        self.where = {key: name for name, keys in self.shards.items() for key in keys}

    def read_index(self) -> dict[str, dict]:
        """Shard's name -> its bytes and keys; nothing when there is no index, or a damaged one."""
        try:
            index = json.loads((self.folder / "index.json").read_text())
            return {name: {"bytes": int(shard["bytes"]), "keys": list(shard["keys"])} for name, shard in index.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write_index(self) -> None:
        """Write down what `scan` found."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.shards}
        index = {name: {"bytes": sizes[name], "keys": keys} for name, keys in self.shards.items()}
        write_atomically(self.folder / "index.json", json.dumps(index).encode())

    def used(self, keys: Iterable[str]) -> list[str]:
        """The shards that hold any of these entries, in order."""
        return sorted({self.where[key] for key in keys if key in self.where})

    def drop(self, names: Iterable[str]) -> int:
        """Remove shards; returns how many entries are gone with them."""
        before = len(self.where)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            self.shards.pop(name, None)
        self.where = {key: name for name, keys in self.shards.items() for key in keys}
        return before - len(self.where)

    def damaged(self, name: str) -> bool:
        """Whether anything in a shard is not as it was written."""
        try:
            with opened(self.folder / name) as shard:
                crc, fields = (json.loads(shard.metadata()[part]) for part in ("crc", "fields"))
                if list(crc) != self.shards[name]:
                    return True
                return any(checksum(entry_of(shard, key, fields)) != expected for key, expected in crc.items())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return True

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, key: str) -> Entry:
        """The tensors of an entry. Raises KeyError for one that is not there."""
        if key not in self:
            reason = "it could not be made, or the rows differ from those cached"
            raise KeyError(f"{self.folder} has no entry {key}: {reason}")
        shard, fields = self.open(self.where[key])
        return entry_of(shard, key, fields)

    def open(self, name: str) -> tuple[safe_open, list[str]]:
        """A shard, opened by this very process, and the names of its entries' tensors."""
        if self.pid != os.getpid():
            self.pid, self.handles = os.getpid(), {}
        if name not in self.handles:
            while len(self.handles) >= OPEN:
                del self.handles[next(iter(self.handles))]
            shard = opened(self.folder / name)
            self.handles[name] = shard, json.loads(shard.metadata()["fields"])
        return self.handles[name]


def opened(path: Path) -> safe_open:
    """A shard, open. Read and not mapped: where a mapped file turns out shorter, or its disk is gone, the system kills
    the process instead of raising an error."""
    return safe_open(path, "pt", backend="pread")


def header_keys(path: Path) -> list[str]:
    """The keys of a shard's entries, none when its header is damaged."""
    try:
        with opened(path) as shard:
            return list(json.loads(shard.metadata()["crc"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return []


def entry_of(shard: safe_open, key: str, fields: list[str]) -> Entry:
    """One entry out of an open shard."""
    return {field: shard.get_tensor(f"{key}.{field}") for field in fields}
