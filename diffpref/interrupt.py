"""Ctrl-C and a scheduler's SIGTERM end a run at the next step, with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType


class Interrupt:
    """Inside, the first SIGINT or SIGTERM is only remembered (`signum`); a second SIGINT stops at once.

    torchrun passes on a Ctrl-C that its processes have had from the terminal already: what comes within a second of
    the first is the same one.
    """

    GRACE = 1.0  # seconds

    def __init__(self) -> None:
        self.signum, self.since = 0, 0.0

    def __bool__(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> "Interrupt":
        main = threading.current_thread() is threading.main_thread()  # Python takes handlers from no other
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self and signum == signal.SIGINT and time.monotonic() - self.since > self.GRACE:
            raise KeyboardInterrupt
        if not self:
            self.signum, self.since = signum, time.monotonic()
            os.write(
                2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"
            )  # safe in a handler


class Stopped(Exception):
    """A run that was asked to stop and has saved where it is."""

    def __init__(self, step: int, signum: int):
        super().__init__(f"stopped at step {step}; --train.resume_from_checkpoint latest goes on from there")
        self.signum = signum
