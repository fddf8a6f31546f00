"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. What is there at the end is flushed to the disk and takes the place of `path`;
    after an error or a Ctrl-C nothing is left of it.

    Raises OSError, with the mend, where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # processes of several machines may meet here
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path} ({error}); what was finished before is kept: make room and start again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed processes left half written beside `path`."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
