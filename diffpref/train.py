"""Tune a diffusion model on preferences:  accelerate launch diffpref/train.py --config configs/quickstart.yaml"""

import os
import sys
import traceback

from diffpref.config import Config, load_config

RANK, WORLD = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")


def leave(message: str, code: int = 1) -> None:
    """One line and out. An error is said by every process that has it: it may be the only one."""
    if RANK == "0" or code == 1:
        print(message if WORLD == "1" else f"process {RANK}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def run(config: Config) -> None:
    """Train. What is wrong with data, disk or numbers is a line, and its traceback a file in the run's folder."""
    from diffpref.interrupt import Stopped
    from diffpref.trainer import Trainer  # after parsing: --help and mistakes should not wait for torch

    try:
        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        leave(f"error: {error}")
    try:
        trainer.run()
    except Stopped as stopped:
        leave(str(stopped), 128 + stopped.signum)
    except (ValueError, OSError, FloatingPointError) as error:
        note_traceback(config)
        leave(f"error: {error}")
    except KeyboardInterrupt:
        leave("stopped; --train.resume_from_checkpoint latest goes on from the last checkpoint, if there is one", 130)


def note_traceback(config: Config) -> None:
    """Into the run's folder, as far as that can be written."""
    try:
        with (config.run_dir / ("traceback.txt" if RANK == "0" else f"traceback_{RANK}.txt")).open("w") as file:
            traceback.print_exc(file=file)
    except OSError:
        traceback.print_exc()


def main() -> None:
    """Parse the command line and run; a user's mistake is one clear line, not a traceback."""
    try:
        config = load_config()
    except (ValueError, FileNotFoundError) as error:
        leave(f"error: {error}")
    else:
        run(config)


if __name__ == "__main__":
    main()
