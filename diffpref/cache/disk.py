"""The cache of a run: opened, filled by all processes together, then read by loader processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from diffpref.cache.digests import picture_digests
from diffpref.cache.fingerprint import latents_fingerprint, picture_keys, prompt_key, text_fingerprint
from diffpref.cache.make import Maker, Pictures, Prompts, Sizes, restore
from diffpref.cache.room import Lock, folder_of, make_room, touch
from diffpref.cache.store import ShardWriter, Store
from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig, StoreConfig
from diffpref.data.kinds import kind_of
from diffpref.data.views import View
from diffpref.encode import freeze

Faults = dict[int, str]  # row -> why it cannot be cached
SHOWN = 10  # rows named


class DiskCache:
    """What the encoders made of a run's pictures and prompts. Readable from any process that it is handed to."""

    def __init__(self, crops: int, lock: Lock | None, digests: np.ndarray):
        self.crops, self.lock, self.digests = crops, lock, digests
        self.pictures: Store | None = None
        self.prompts: Store | None = None
        self.faults: Faults = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"lock": None}  # the process that opened the cache holds it for the others

    def latents(self, row: int, view: View) -> list[dict] | None:
        """For each picture of a row: moments [C',h,w], original (height, width), corner (top, left) of the crop.

        None when latents are not cached. Raises KeyError, with the reason, for a row that could not be.
        """
        if self.pictures is None:
            return None
        if row in self.faults:
            raise KeyError(self.faults[row])
        entries = [self.pictures.read(key) for key in picture_keys(self.digests[row], view)]
        places = [entry["place"].tolist() for entry in entries]
        return [
            {"moments": entry["moments"], "original": (h, w), "corner": (top, left)}
            for entry, (h, w, top, left) in zip(entries, places, strict=True)
        ]

    def conditioning(self, prompt: str) -> dict[str, Tensor] | None:
        """One prompt's tensors, without batch dimension; None when text is not cached. Raises KeyError for a prompt
        that is not in the set."""
        return None if self.prompts is None else restore(self.prompts.read(prompt_key(prompt)))

    def close(self) -> None:
        """Let other runs remove what this one has read."""
        if self.lock is not None:
            self.lock.close()


def open_cache(
    rows: Dataset,
    sizes: Sizes,
    config: Config,
    pipe: DiffusionPipeline,
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = Team.wait,
    gather: Callable[[list], list] = Team.gather,
) -> DiskCache:
    """Encode what is not on disk yet, all `world` processes together, and open what is.

    rows: the columns of their kind (pictures undecoded), optionally row, the number to name it by. sizes: (H, W) that
    all rows are trained at, or an array [rows, 2].
    wait: returns once all processes have called it, however long that takes. gather: the lists of all processes, one
    after the other. Every process must call this.

    Raises ValueError when it would not fit, or for a picture that is none (data.faults raise), OSError when it cannot
    be written. What was encoded before stays.
    """
    freeze(pipe)
    team, kind = Team(rank, world, wait, gather), kind_of(rows.column_names, config.data)
    folder = folder_of(config)
    lock = Lock(folder) if team.main else None
    team.wait()
    digests, faults = np.zeros((0, 0, 32), np.uint8), {}
    if config.cache.latents:
        digests, faults = picture_digests(rows, kind, folder, config.data.num_workers, team)
        settle(faults, rows, config, team)
    cache, work = DiskCache(config.cache.crops, lock, digests), []
    if config.cache.latents:
        cache.pictures = Store(folder / f"latents-{latents_fingerprint(pipe)}")
        work.append((cache.pictures, Pictures(rows, kind, sizes, config, pipe, digests)))
    if config.cache.text:
        cache.prompts = Store(folder / f"text-{text_fingerprint(pipe)}")
        work.append((cache.prompts, Prompts(rows, config, pipe)))
    if lock:
        find_room(folder, lock, work, config.cache)
    team.wait()
    for store, maker in work:
        faults |= fill(store, maker, rows, config, team)
    cache.faults = faults
    return cache


def find_room(folder: Path, lock: Lock, work: list[tuple[Store, Maker]], settings: StoreConfig) -> None:
    """Make room for what is missing, and note what is in use."""
    needed, keep = 0, set()
    for store, maker in work:
        missing = [key for key in maker.keys if key not in store]
        needed += maker.bytes_needed(missing) if missing else 0
        keep |= {store.folder / name for name in store.used(maker.keys)}
    touch(keep)
    make_room(folder, lock, needed, keep, settings)


def fill(store: Store, maker: Maker, rows: Dataset, config: RunConfig, team: Team) -> Faults:
    """Make the entries that are missing or damaged; returns the rows for which that could not be."""
    remove_damaged(store, maker, team)
    missing = [key for key in maker.keys if key not in store]
    parts, faults = team.share(maker.parts(missing)), {}

    def report(row: int, reason: str) -> None:
        faults[row] = reason
        if config.data.faults == "raise":
            settle(faults, rows, config, team)

    total, quiet = -(-len(missing) // team.world), not (team.main and missing)
    with ShardWriter(store.folder) as writer, tqdm(total=total, desc=f"encoding {maker.what}", disable=quiet) as bar:
        for key, entry in maker.make(parts, report):
            writer.add(key, entry)
            bar.update()
    faults = dict(team.together(list(faults.items())))
    settle(faults, rows, config, team)
    refresh(store, team)
    return faults


def remove_damaged(store: Store, maker: Maker, team: Team) -> None:
    """Check all that this run is to read, each process its share, and remove what is damaged."""
    store.scan()
    unreadable = [name for name, keys in store.shards.items() if not keys]
    mine = team.share([*store.used(maker.keys), *unreadable])
    bar = tqdm(mine, f"checking {maker.what}", disable=not (team.main and mine))
    damaged = team.together([name for name in bar if store.damaged(name)])
    if not damaged:
        return
    if team.main:
        count = store.drop(damaged)
        print(
            f"cache: {len(damaged)} damaged shard(s), {count} entries, removed from {store.folder}; encoding them again"
        )
    refresh(store, team)


def refresh(store: Store, team: Team) -> None:
    """Have the index and every process know what is on disk now."""
    if team.main:
        store.scan()
        store.write_index()
    team.wait()
    store.scan()


def settle(faults: Faults, rows: Dataset, config: RunConfig, team: Team) -> None:
    """Rows whose pictures cannot be used stop the run or are left out, named and counted."""
    numbers = rows.select_columns(["row"]) if "row" in rows.column_names else None
    names = {row: numbers[row]["row"] if numbers is not None else row for row in faults}
    lines = [f"row {names[row]} of {config.data.path}: {reason}" for row, reason in sorted(faults.items())]
    if lines and config.data.faults == "raise":
        raise ValueError(f"data.path: {lines[0]}")
    if lines and team.main:
        print(f"cache: {len(lines)} row(s) left out, whose pictures cannot be used:")
        print(*lines[:SHOWN], *["…"] * (len(lines) > SHOWN), sep="\n", flush=True)
