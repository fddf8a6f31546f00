"""The table: in memory for the run, on disk for all that come after.

On disk it is a folder of safetensors shards, written whole or not at all and checked by checksums. Each holds some
cells with their errors; the first run to open a table that nobody else has open joins them to one that holds all cells
in order, four bytes each, NaN where there is nothing yet.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpref.batch import PreferenceBatch
from diffpref.cache.room import Lock
from diffpref.cache.store import ShardWriter, Store
from diffpref.cache.team import Team

OFTEN = 100  # optimiser steps after which new errors are written, and known to all processes


class TableFiles:
    """The shards of one table of so many cells."""

    def __init__(self, folder: Path, cells: int):
        self.store, self.cells = Store(folder), cells

    def clean(self) -> None:
        """Remove what is damaged; its errors are computed again."""
        damaged = [name for name, keys in self.store.shards.items() if not keys or self.store.damaged(name)]
        if damaged:
            self.store.drop(damaged)
            print(
                f"reference.draws: {len(damaged)} damaged file(s) removed from {self.store.folder}; their errors are"
                " computed again",
                flush=True,
            )

    def read(self) -> np.ndarray:
        """Errors of all cells, fp32, NaN where there are none."""
        found = np.full(self.cells, np.nan, np.float32)
        for entry in sorted(map(self.store.read, self.store.where), key=lambda entry: "cells" in entry):
            errors = entry["errors"].numpy()
            places = entry["cells"].numpy() if "cells" in entry else np.arange(self.cells)
            absent = np.isnan(found[places])  # the first to be written stays
            found[places[absent]] = errors[absent]
        return found

    def write(self, **entry: np.ndarray) -> None:
        """One shard."""
        key = hashlib.sha256(b"".join(values.tobytes() for values in entry.values())).hexdigest()[:32]
        with ShardWriter(self.store.folder) as writer:
            writer.add(key, {name: torch.from_numpy(values) for name, values in entry.items()})

    def join(self) -> None:
        """One shard instead of several."""
        several = list(self.store.shards)
        if len(several) > 1:
            self.write(errors=self.read())
            self.store.drop(several)
            self.store.scan()


class ReferenceTable:
    """e_ref of each (row, draw, item of the row) in one cell: mean (r − y)² over the elements, unweighted, fp32.

    What a batch needs and is not there is computed for the whole batch, kept, and then read from here, too: so a run
    that computes it, and one that finds it, go on with the same numbers.

    Args:
        files: On disk.
        width: Items of a row, at most: a row's draw has so many cells.
        team: All processes; `sync` is for all of them at once.
        device: Where errors are used. Which of them are known is known on the host, so nobody waits for the device.
        locks: Held while the table is in use.
    """

    def __init__(self, files: TableFiles, width: int, team: Team, device: torch.device, locks: tuple[Lock, ...] = ()):
        self.files, self.width, self.team, self.locks = files, width, team, locks
        found = files.read()
        self.known, self.values = ~np.isnan(found), torch.from_numpy(found).to(device)
        self.found, self.made, self.saved = int(self.known.sum()), 0, 0
        self.fresh: list[np.ndarray] = []  # cells that are not on disk yet
        self.steps = 0

    def cells(self, batch: PreferenceBatch) -> np.ndarray:
        """The cell of each item, [N]: (row·K + k)·width + its number in the row. Keys are those of `FixedDraws`."""
        group = batch.structure.group.numpy()  # the items of a group follow each other
        number = np.arange(len(group)) - np.searchsorted(group, group)
        return np.asarray(batch.keys)[group] * self.width + number

    def errors(self, cells: np.ndarray, compute: Callable[[], Tensor]) -> Tensor:
        """e_ref [N] of the items in these cells; `compute` gives those of all N."""
        if self.known[cells].all():
            self.saved += 1
        else:
            self.made += 1
            self.keep(cells, compute())
        return self.values[self.there(cells)]

    def there(self, values: np.ndarray) -> Tensor:
        """On the table's device, without waiting for it."""
        return torch.from_numpy(values).to(self.values.device, non_blocking=True)

    def keep(self, cells: np.ndarray, errors: Tensor) -> None:
        """Take the errors of cells that have none; of a cell that comes twice, the first."""
        fresh, place = np.unique(cells, return_index=True)
        absent = ~self.known[fresh]
        fresh, place = fresh[absent], place[absent]
        self.values[self.there(fresh)] = errors.detach().float()[self.there(place)]
        self.known[fresh] = True
        self.fresh.append(fresh)

    def step(self) -> None:
        """An optimiser step begins."""
        self.steps += 1
        if self.steps % OFTEN == 0:
            self.sync()

    def sync(self) -> None:
        """Write what is new, and make it known to all processes. Where two computed the same, the first one's stays.
        Raises OSError when it cannot be written."""
        mine = np.concatenate([np.zeros(0, np.int64), *self.fresh])
        shares = self.team.gather([(mine, self.values[self.there(mine)].cpu().numpy())])
        cells, errors = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        cells, place = np.unique(cells, return_index=True)
        errors = errors[place]
        self.values[self.there(cells)], self.known[cells], self.fresh = self.there(errors), True, []
        finite = np.isfinite(errors)  # others are of a model that is none, and nobody should find them
        if self.team.main and finite.any():
            self.files.write(cells=cells[finite], errors=errors[finite])

    def report(self) -> dict[str, dict[str, int]]:
        """What report.json has of it, over all processes; the first one says how much was saved."""
        made, saved = (sum(numbers) for numbers in zip(*self.team.gather([(self.made, self.saved)]), strict=True))
        kept = int(self.known.sum())
        if self.team.main:
            print(f"reference.draws: {saved} of {made + saved} passes of the reference saved; {kept} errors kept")
        return {"reference_draws": {"found": self.found, "kept": kept, "passes_made": made, "passes_saved": saved}}


def open_table(folder: Path, name: str, draws: int, width: int, team: Team, device: torch.device) -> ReferenceTable:
    """The table of this name in a cache folder, made if it is not there. Every process must call this.

    Args:
        folder: Of all caches.
        name: From `table_fingerprint`.
        draws: Of all rows together.
        width: Items of a row, at most.
        team: All processes.
        device: Where errors are used.
    """
    place, cells, locks = folder / f"reference-{name}", draws * width, ()
    if team.main:
        # The folder's own lock keeps others from tidying up there while this run writes.
        locks = (Lock(folder), Lock(place))
        files = TableFiles(place, cells)
        files.clean()
        if locks[1].alone():
            files.join()
            locks[1].share()
    team.wait()
    table = ReferenceTable(TableFiles(place, cells), width, team, device, locks)
    if team.main:
        print(f"reference.draws: {table.found} of {cells} errors of the reference are in {place}", flush=True)
    return table
