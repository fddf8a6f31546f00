"""What a run of benchmarks/step.py writes and prints; of benchmarks/memory.py, what its numbers depend on."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from data import ratio, summary

from diffpref.report import environment
from stepping.clock import Turn

ROOT = Path(__file__).resolve().parents[2]
PREDICTIONS = Path(__file__).parent / "predictions.json"
AGAINST = ("script", "script_workers", "script_cached", "ours")


def about(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "settings": settings,
        "environment": environment() | {"triton": installed("triton")} | on_device(device),
        "git": git(),
        "ram_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "torch_threads": torch.get_num_threads(),
        "seed": 0,
        "load_average_at_start": list(os.getloadavg()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed(name: str) -> str:
    """A version, or none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def on_device(device: torch.device) -> dict[str, str]:
    """Versions that matter on a GPU, and how much memory it has."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return found | {"driver": driver, "memory_gb": f"{properties.total_memory / 1e9:.1f}"}


def git() -> str:
    """The commit, and whether files differ from it; empty outside a repository."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


# --- conclusions ------------------------------------------------------------------------------------------------------


def conclude(report: dict[str, Any], turns: dict[str, list[Turn]], pairs: int) -> None:
    """Rates, ratios and shares of the limit, into the report's variants."""
    wall = {name: [turn.seconds for turn in made] for name, made in turns.items()}
    cpu = {name: [turn.cpu for turn in made] for name, made in turns.items()}
    for name, row in report["variants"].items():
        row["pairs_a_second"] = summary([pairs / s for s in wall[name]])
        row["seconds_a_step"], row["cpu_seconds_a_step"] = summary(wall[name]), summary(cpu[name])
        row["of_that_waiting_for_data"] = summary([turn.waited for turn in turns[name]])
        row["times_as_fast_as"] = {other: ratio(wall[other], wall[name]) for other in AGAINST}
        row["times_less_cpu_than"] = {other: ratio(cpu[other], cpu[name]) for other in AGAINST}
    add_floor(report, pairs)


def add_floor(report: dict[str, Any], pairs: int) -> None:
    """How far each variant is from what the device could do if it did nothing but the FLOPs of ours (policy, its
    backward pass, reference; all else cached) at the rate of products of matrices."""
    flop = report["counts"]["ours"]["flop"]
    half = report["settings"]["device"] == "cuda"
    rate = report["ceilings"]["matmul_bfloat16_tflops" if half else "matmul_float32_tflops"]
    floor = flop / rate / 1e12
    report["floor"] = {"flop_a_pair": flop / pairs, "seconds_a_step": floor, "pairs_a_second": pairs / floor}
    for row in report["variants"].values():
        row["share_of_limit"] = floor / row["seconds_a_step"]["median"]


COLUMNS = ("variant", "pairs/s", "min – max", *(f"x {name}" for name in AGAINST), "CPU s", "data", "limit")
COUNTED = ("operations", "waits", "saved MB")


def line(name: str, row: dict[str, Any], counts: dict[str, Any] | None) -> str:
    """A variant in the table."""
    rate, seconds = row["pairs_a_second"], row["seconds_a_step"]["median"]
    cells = [name + " (other estimator)" * row["estimator_changed"], f"{rate['median']:.3g}"]
    cells += [f"{rate['min']:.3g} – {rate['max']:.3g}"]
    cells += [f"{row['times_as_fast_as'][other]['median']:.2f}" for other in AGAINST]
    cells += [
        f"{row['cpu_seconds_a_step']['median']:.3g}",
        f"{row['of_that_waiting_for_data']['median'] / seconds:.0%}",
    ]
    cells += [f"{row['share_of_limit']:.0%}"]
    seen = counts and [str(counts["operations"]), str(sum(counts["waits"].values())), f"{counts['saved'] / 1e6:.0f}"]
    return in_row([*cells, *(seen or [""] * len(COUNTED))])


def in_row(cells: Iterable[str]) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def table(report: dict[str, Any]) -> str:
    """The numbers in plain words."""
    rows = [line(name, row, report["counts"][name]) for name, row in report["variants"].items()]
    floor, toggle = report["floor"], report["toggle"]
    margins = max(found["margin_difference"] for found in report["equal_maths"].values() if found["within"])
    return "\n".join(
        [
            f"\n{report['base']}, {report['settings']['pairs']} pairs a step, {report['rounds']} rounds of"
            f" {report['settings']['steps']} steps",
            "",
            in_row([*COLUMNS, *COUNTED]),
            "|" + "---|" * len([*COLUMNS, *COUNTED]),
            *rows,
            "",
            f"Limit: {floor['pairs_a_second']:.3g} pairs/s, {floor['flop_a_pair'] / 1e12:.3g} TFLOP a pair at the rate"
            " of this machine's products of matrices.",
            f"Equal maths: cosine of the gradients at least {least(report):.6f}, margins at most {margins:.1e} apart.",
            f"Adapter off and on: {toggle['public_ms']:.2f} ms the public way, {toggle['flag_ms']:.3f} ms by a flag"
            f" ({toggle['layers']} layers).",
            *(f"Left out: {name}: {why}" for name, why in report["left_out"].items()),
            f"Load average {report['load_average_at_start'][0]:.1f} at the start,"
            f" {report['load_average_at_end'][0]:.1f} at the end.",
        ]
    )


def least(report: dict[str, Any]) -> float:
    """The smallest cosine of what is judged."""
    return min(found["cosine"] for found in report["equal_maths"].values() if found["within"])
