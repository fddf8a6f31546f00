"""Work that loader processes do while this one encodes."""

import signal

from torch.utils.data import DataLoader, Dataset


def deaf(worker: int) -> None:
    """Ctrl-C is the main process's to handle: it writes what is encoded, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_workers(items: Dataset, workers: int) -> DataLoader:
    """The items of a data set in order, each as it is, made by so many processes."""
    workers = min(workers, len(items))
    return DataLoader(items, batch_size=None, num_workers=workers, worker_init_fn=deaf, collate_fn=as_it_is)


def as_it_is(item: object) -> object:
    """No batches, no conversion to tensors."""
    return item
