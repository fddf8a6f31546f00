"""The folder of one run: opened by one process at a time, never buried under another run."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from diffpref import checkpoint
from diffpref.config import RunConfig, differing, to_dict
from diffpref.metrics import truncate_lines


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint to go on from. Raises ValueError for one that cannot be, or where a run would be buried."""
    run_dir, which = config.run_dir, config.train.resume_from_checkpoint
    folder = checkpoint.find_checkpoint(run_dir, which) if which else None
    if folder is None:
        refuse_to_bury(config)
        return None
    if folder.resolve().parent != run_dir.resolve() and holds_a_run(run_dir):
        raise ValueError(f"{folder} belongs to another run than the one that {run_dir} holds; give another --name")
    refuse_another_run(folder, checkpoint.read_state(folder), config)
    return folder


def holds_a_run(run_dir: Path) -> bool:
    """Whether a run has left something that is not to be lost."""
    return any(run_dir.glob("checkpoint-*")) or (run_dir / "report.json").exists()


def refuse_to_bury(config: RunConfig) -> None:
    """Raise ValueError where a run begins that would overwrite another one."""
    latest = config.train.resume_from_checkpoint is not None
    if not holds_a_run(config.run_dir) or (config.overwrite and not latest):
        return
    other = "has no whole checkpoint to go on from" if latest else "go on with --train.resume_from_checkpoint latest"
    raise ValueError(
        f"{config.run_dir} holds a run already; {other}; give another --name, or start it afresh with --overwrite true"
        + " and without --train.resume_from_checkpoint" * latest
    )


def refuse_another_run(folder: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Raise ValueError, naming the keys, where going on would be another run than the one that was begun."""
    if state["step"] > config.train.max_train_steps:
        raise ValueError(f"{folder} is past train.max_train_steps {config.train.max_train_steps}")
    lines = differing(config, state["computed"])
    if lines:
        raise ValueError(
            f"{folder} was made with another configuration:\n  " + "\n  ".join(lines) + "\ngive these keys as they"
            " were, or begin another run under another --name"
        )


class RunFolder:
    """Open while a run lasts; the lock goes with the process, however that ends, and not with the loader's workers,
    which outlive a killed run by some seconds.

    Raises ValueError when another process has it open.
    """

    def __init__(self, config: RunConfig, resume: Path | None):
        self.path, self.config = config.run_dir, config
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock: int | None = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.lock)
            raise ValueError(f"{self.path} is in use by another run; wait for it, or give another --name") from error
        except OSError:  # a file system without locks
            pass
        os.register_at_fork(after_in_child=self.close)
        if resume is None:
            refuse_to_bury(config)  # again: another run may have ended here while the model was loaded
        self.prepare(resume)

    def prepare(self, resume: Path | None) -> None:
        """Empty it unless the run goes on, and write the resolved configuration into it."""
        if self.config.overwrite and self.config.train.resume_from_checkpoint is None:
            for old in self.path.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        checkpoint.sweep(self.path)
        step = checkpoint.read_state(resume)["step"] if resume else 0
        for later in checkpoint.checkpoints(self.path):
            if (
                int(later.name.split("-")[1]) > step
            ):  # of the branch that is left: latest must not take them for this one
                print(f"removing {later}: the run goes on from step {step}")
                checkpoint.discard(later)
        for log in ("metrics.jsonl", "faults.jsonl"):
            truncate_lines(self.path / log, step)
        (self.path / "config.yaml").write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False))

    def close(self) -> None:
        """Let another process have it."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
