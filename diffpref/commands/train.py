"""diffpref train: the training script, without a launcher."""

import runpy
import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """Run diffpref/train.py with these arguments; for several processes use accelerate launch."""
    sys.argv = ["diffpref train", *arguments]
    runpy.run_module("diffpref.train", run_name="__main__")  # it is a script: imported, it would exist twice
