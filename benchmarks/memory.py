"""Peak memory of a training step by batch and setting, and what fits which card:  python benchmarks/memory.py

Without a GPU everything is computed: the published configurations run a step on tensors that have shapes and no
numbers, and the most that is alive at one moment is counted. With one, the same steps are measured beside that, on
random weights.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from data import machine, say
from stepping.architectures import ARCHITECTURES, TINY
from stepping.budgets import CARDS, CONTEXT, GB, SETTINGS, computed, measured, row
from stepping.results import PREDICTIONS, about, in_row

from diffpref.engines import silence
from diffpref.report import write_report

BATCHES = [1, 2, 4, 8, 16, 32, 64]  # pairs


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    report = about(args, torch.device(args.device)) | {"seed": None, "gb_for_the_context": CONTEXT, "models": {}}
    for name in args.models:
        architecture = (TINY if args.size == "tiny" else ARCHITECTURES)[name]
        report["models"][name] = rows = {}
        for setting in SETTINGS[: args.settings]:
            say(f"{name}, {setting.name}")
            rows[setting.name] = row(computed(name, architecture, setting, args.rank))
            if args.device == "cuda":
                peaks = measured(name, architecture, setting, BATCHES, args.rank)
                rows[setting.name]["measured_peak_bytes"] = peaks
    report["predictions"] = json.loads(PREDICTIONS.read_text())["memory_gib_an_image"]
    report["load_average_at_end"] = list(os.getloadavg())
    return report


def table(report: dict[str, Any]) -> str:
    """Pairs in a batch that fit, by card."""
    head = ["model", "setting", "weights GB", "a pair GB", *(f"{card} GB" for card in CARDS)]
    lines = [
        in_row([name, f"{setting}; {situation}", *line(found["bytes"]), *map(str, fits.values())])
        for name, settings in report["models"].items()
        for setting, found in settings.items()
        for situation, fits in found["pairs_that_fit"].items()
    ]
    title = "\nPairs a batch that fit (computed, not measured; 0: not even one)\n"
    return "\n".join([title, in_row(head), "|" + "---|" * len(head), *lines, *map(" ".join, measurements(report))])


def line(found: dict[str, int]) -> list[str]:
    """Sizes of a setting."""
    return [f"{found['denoiser'] / GB:.2f}", f"{found['pair'] / GB:.2f}"]


def measurements(report: dict[str, Any]) -> list[list[str]]:
    """Measured peaks in GB, where there are any."""
    return [
        [f"{name}, {setting}, measured:", *(f"{pairs}: {gigabytes(peak)}" for pairs, peak in peaks.items())]
        for name, settings in report["models"].items()
        for setting, found in settings.items()
        if (peaks := found.get("measured_peak_bytes"))
    ]


def gigabytes(peak: int | None) -> str:
    """In words."""
    return "does not fit" if peak is None else f"{peak / GB:.2f} GB"


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: the same classes made small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first so many")
    parser.add_argument("--out", type=Path, help="JSON file; results/memory-<machine>.json if not given")
    return parser.parse_args()


def main() -> None:
    """Compute or measure, write, print."""
    args = arguments()
    if unknown := [name for name in args.models if args.size == "tiny" and name not in TINY]:
        raise SystemExit(f"--size tiny: there is no small {', '.join(unknown)}; take --models {' '.join(TINY)}")
    silence()
    report = measure(args)
    out = args.out or Path(__file__).parent / "results" / f"memory-{machine()}.json"
    write_report(out, report)
    print(table(report))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
