"""Batches for the loop, decoded ahead by worker processes."""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffpref.batch import PreferenceBatch
from diffpref.config import RunConfig
from diffpref.data.groups import Asked, Decode, GroupCache, PreferenceGroups, collate
from diffpref.data.kinds import kind_of
from diffpref.data.sampler import BucketStream, TrainingStream
from diffpref.data.streaming import RowStream, StreamSampler
from diffpref.noise import FIXED_SEED, FixedDraws


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, a scheduler's SIGTERM every one of a job; workers must live until the
    main process has saved and ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """No collation: the batches are whole."""
    return batch


class Batches(TorchDataset):
    """Lists of items -> batches. A ValueError is given back: raised, torch would wrap it in a worker's traceback."""

    def __init__(self, groups: PreferenceGroups):
        self.groups = groups

    def __getitem__(self, items: list) -> PreferenceBatch | ValueError:
        try:
            return collate([self.groups[item] for item in items])
        except ValueError as error:
            return ValueError(str(error))


class Loader:
    """The batches of one process, in order; iterate it once.

    Args:
        groups: Makes groups of items.
        sampler: Says which items, in lists.
        config: Workers, and batches that each decodes ahead.
    """

    def __init__(self, groups: PreferenceGroups, sampler: TrainingStream | StreamSampler, config: RunConfig):
        self.groups, self.sampler, self.faults = groups, sampler, config.data.faults
        workers = config.data.num_workers
        self.batches = DataLoader(
            Batches(groups),
            batch_size=None,
            sampler=sampler,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=config.data.prefetch_factor if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # the loader's own: it would take a draw from dropout's, once at each start
        )
        self.state: dict[str, Any] = {}

    def __iter__(self) -> Iterator[PreferenceBatch]:
        streamed = isinstance(self.sampler, StreamSampler)
        for batch in self.batches:
            yield self.stand_in(batch) if streamed else self.sound(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where a stream stood after the last batch that was handed out, as JSON values; {} for sets that are not
        streamed: their position is the step."""
        return self.state

    @property
    def dropped(self) -> dict[str, int]:
        """Rows of a stream left out so far, as far as it is read, by reason; {} for sets that are checked before."""
        return dict(self.sampler.stream.dropped) if isinstance(self.sampler, StreamSampler) else {}

    def sound(self, batch: PreferenceBatch | ValueError) -> PreferenceBatch:
        """The batch, unless it is an error."""
        if isinstance(batch, ValueError):
            raise batch
        return batch

    def stand_in(self, batch: PreferenceBatch | ValueError) -> PreferenceBatch:
        """A streamed batch. One with a group that could not be decoded is made again here, where the rows are that
        follow in its block: workers hold no other rows."""
        record = self.sampler.pending.pop(0)
        if isinstance(batch, ValueError) and self.faults == "skip":
            batch = collate([self.groups.first_usable(block.following(i), key) for block, i, key in record.groups])
        self.state = record.state
        return self.sound(batch)


def training_loader(
    rows: Dataset | IterableDataset,
    sizes: tuple[int, int] | np.ndarray,
    config: RunConfig,
    *,
    start: int,
    rank: int,
    world: int,
    seed: int,
    cache: GroupCache | None = None,
    decode: Decode | None = None,
    asked: Asked | None = None,
    state: dict[str, Any] | None = None,
    draws: int | None = None,
) -> Loader:
    """The batches of one process from optimiser step `start` to the last.

    Args:
        rows: As `check` leaves them.
        sizes: As `pair_sizes` gives them.
        config: data, and train's batch size, accumulation and last step.
        start: Optimiser steps already done.
        rank: Of this process.
        world: Processes.
        seed: Of the order and the augmentation.
        cache: What is encoded already.
        asked: Whom the groups are trained for.
        decode: Makes tensors of pictures in another way than by cutting them to `sizes`.
        state: What `Loader.state_dict` gave at step `start`. A stream without it is read from the beginning.
        draws: Give every row so many fixed draws, the same for every seed; a stream has none.
    """
    train, streamed = config.train, isinstance(rows, IterableDataset)
    kind = kind_of(rows.column_names, config.data)
    split = (train.train_batch_size, train.gradient_accumulation_steps, range(start, train.max_train_steps))
    place = {"rank": rank, "world": world}
    if streamed:
        sampler = StreamSampler(RowStream(rows, config.data, seed, rank == 0, state), *split, **place)
    elif isinstance(sizes, tuple):
        sampler = TrainingStream(len(rows), seed, *split, **place)
    else:
        sampler = BucketStream(sizes, seed, *split, **place)
    if isinstance(sampler, StreamSampler):
        return Loader(PreferenceGroups(None, kind, config.data, sizes, seed, cache, decode, asked), sampler, config)
    fixed, drawn = (FixedDraws(draws, sampler.rows), FIXED_SEED) if draws else (None, seed)
    return Loader(PreferenceGroups(rows, kind, config.data, sizes, drawn, cache, decode, asked, fixed), sampler, config)
