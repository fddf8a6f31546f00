"""What the training scripts do around their trainers: a user's mistake is one clear line, not a traceback."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from diffpref.config import RunConfig

RANK, WORLD = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")


class Runs(Protocol):
    """A trainer."""

    def run(self) -> dict[str, Any]: ...


def leave(message: str, code: int = 1) -> None:
    """One line and out. An error is said by every process that has it: it may be the only one."""
    if RANK == "0" or code == 1:
        print(message if WORLD == "1" else f"process {RANK}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


Run = TypeVar("Run", bound=RunConfig)


def launch(load: Callable[[], Run], trainer: Callable[[Run], Runs]) -> None:
    """Parse the command line and train.

    Args:
        load: Parses. Raises ValueError or FileNotFoundError for a mistake.
        trainer: Makes what runs; imports torch and not before, so that --help and mistakes need not wait.
    """
    try:
        config = load()
    except (ValueError, FileNotFoundError) as error:
        leave(f"error: {error}")
    else:
        run(config, trainer)


def run(config: Run, trainer: Callable[[Run], Runs]) -> None:
    """Train. What is wrong with data, disk or numbers is a line, and its traceback a file in the run's folder."""
    from diffpref.interrupt import Stopped

    try:
        made = trainer(config)
    except (ValueError, FileNotFoundError) as error:
        leave(f"error: {error}")
    try:
        made.run()
    except Stopped as stopped:
        leave(str(stopped), 128 + stopped.signum)
    except (ValueError, OSError, FloatingPointError) as error:
        note_traceback(config)
        leave(f"error: {error}")
    except KeyboardInterrupt:
        leave("stopped; --train.resume_from_checkpoint latest goes on from the last checkpoint, if there is one", 130)


def note_traceback(config: RunConfig) -> None:
    """Into the run's folder, as far as that can be written."""
    try:
        with (config.run_dir / ("traceback.txt" if RANK == "0" else f"traceback_{RANK}.txt")).open("w") as file:
            traceback.print_exc(file=file)
    except OSError:
        traceback.print_exc()
