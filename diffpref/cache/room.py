"""How large the cache folder may grow, and who may remove what from it."""

import fcntl
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

from diffpref.cache.store import SHARD
from diffpref.config import RunConfig, StoreConfig

GB = 10**9


def folder_of(config: RunConfig) -> Path:
    """Where a run's caches are."""
    return config.cache.folder or config.output_dir / "cache"


class Lock:
    """A run's hold on a cache folder: shared for its life, exclusive for the moment in which it removes entries, so
    that no run loses what it reads. The system gives it back however the run ends. On a file system without locks, no
    run removes anything."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, os.close, self.fd)
        self.share()

    def share(self) -> None:
        """Hold it with others; waits while another run removes entries."""
        with suppress(OSError):
            fcntl.flock(self.fd, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Hold it alone, if no other run holds it; else it stays as it was."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            self.share()
            return False


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(bytes_of(path) for path in folder.rglob("*"))


def bytes_of(path: Path) -> int:
    """Bytes of a file; 0 for what is none, or is gone by now: other runs write here, too."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def shards_by_age(folder: Path) -> list[Path]:
    """All shards of all encoders, those longest unused first."""
    shards = [path for path in folder.glob("*/*.safetensors") if SHARD.fullmatch(path.name)]
    return sorted((path for path in shards if path.parent.name.startswith(("latents-", "text-"))), key=age)


def age(path: Path) -> float:
    """When a run last used a shard."""
    return path.stat().st_mtime


def clear(folder: Path, excess: int, keep: set[Path]) -> None:
    """Remove shards that this run does not use until `excess` bytes are gone, or no such shard is left."""
    for path in shards_by_age(folder):
        if excess <= 0:
            return
        if path not in keep:
            excess -= bytes_of(path)
            path.unlink()


def make_room(folder: Path, lock: Lock, needed: int, keep: set[Path], config: StoreConfig) -> None:
    """See to it that `needed` more bytes fit under cache.max_gb and on the disk; only what no run uses is removed.

    Raises ValueError, with what could be changed, when they do not fit.
    """
    limit = int(config.max_gb * GB)

    def excess() -> int:
        return max(size_of(folder) + needed - limit, needed - shutil.disk_usage(folder).free)

    if lock.alone():
        for rest in folder.glob("*/.*.tmp"):  # of runs that were killed
            rest.unlink(missing_ok=True)
        if needed:
            clear(folder, excess(), keep)
        lock.share()
    if needed and excess() > 0:
        raise ValueError(
            f"cache: {needed / GB:.3g} GB are to be encoded into {folder}, beside {size_of(folder) / GB:.3g} GB in use;"
            f" cache.max_gb is {config.max_gb:g} and the disk has {shutil.disk_usage(folder).free / GB:.3g} GB free."
            " Raise cache.max_gb, name another cache.folder, lower cache.crops, or set cache.latents to false"
        )


def touch(paths: set[Path]) -> None:
    """Note that shards are in use now."""
    for path in paths:
        os.utime(path)
