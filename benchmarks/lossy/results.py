"""What a run of benchmarks/loss.py writes and prints."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stepping.results import git, installed, on_device

from diffpref.report import environment
from lossy.ways import WAYS

PREDICTIONS = Path(__file__).parent / "predictions.json"
OURS = ("ours", "compile", "triton_errors", "triton", "triton_graph")
GOAL = 0.1  # of the formula's error in the logit


def about(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code, and what was expected before they were there."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "command": " ".join(["python", "benchmarks/loss.py", *sys.argv[1:]]),
        "settings": settings,
        "environment": environment() | {"triton": installed("triton")} | on_device(device),
        "times_are_of": "a GPU" if device.type == "cuda" else "a CPU: they say nothing about a GPU",
        "git": git(),
        "torch_threads": torch.get_num_threads(),
        "seed": args.seed,
        "load_average_at_start": list(os.getloadavg()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "predictions": json.loads(PREDICTIONS.read_text()),
        "implementations": {name: way.what for name, way in WAYS.items()},
    }


def conclude(report: dict[str, Any], rows: list[dict[str, Any]], left_out: dict[str, str], copy: float) -> None:
    """Ratios to diffusers' formula and to the floor, into the rows; the rows into the report."""
    formula = {case_of(row): row for row in rows if row["impl"] == "eager"}
    for row in rows:
        of_formula = formula.get(case_of(row))
        if of_formula and row["impl"] in OURS:
            row["logit_error_over_formula"] = row["error"]["logit"] / of_formula["error"]["logit"]
        for kind in ("hot_us", "cold_us"):
            if kind in row:
                add_gap(row, kind)
                if of_formula and kind in of_formula:
                    row[f"{kind[:-3]}_times_as_fast"] = of_formula[kind]["p50"] / row[kind]["p50"]
    report |= {"copy_tbs": copy, "rows": rows, "left_out": left_out, "logit": logits(rows)}
    report["load_average_at_end"] = list(os.getloadavg())


def case_of(row: dict[str, Any]) -> tuple:
    """Which case a row is of."""
    return row["shape"], row["dtype"], row["pairs"]


def add_gap(row: dict[str, Any], kind: str) -> None:
    """Bytes a second, counting each wide tensor once, and how many times longer than a copy of so many it takes."""
    median = row[kind]["p50"]
    row[kind] |= {"tbs": row["bytes_min"] / median / 1e6, "gap": median / row["floor_us"]}


def logits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst error in the logit against the formula's, of each implementation, and whether all reach the goal."""
    worst: dict[str, float] = {}
    for row in rows:
        if (found := row.get("logit_error_over_formula")) is not None:
            worst[row["impl"]] = max(found, worst.get(row["impl"], 0.0))
    return {"worst_over_formula": worst, "goal": GOAL, "reached": bool(worst) and max(worst.values()) <= GOAL}


HEAD = (
    "| case | implementation | cold µs | 20–80 % | hot µs | x eager, cold | TB/s | x floor | launches | waits"
    " | MB moved (least) | error: loss | logit | gradient | logit / eager's |"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table; what was not measured is left empty."""
    cold, hot = row.get("cold_us"), row.get("hot_us")
    times = rates = [""] * 3
    if cold is not None and hot is not None:
        times = [number(cold["p50"]), f"{number(cold['p20'])}–{number(cold['p80'])}", number(hot["p50"])]
        rates = [number(row.get("cold_times_as_fast")), number(cold["tbs"]), number(cold["gap"])]
    moved = f"{number(row.get('bytes', 0) / 1e6) if 'bytes' in row else ''} ({number(row['bytes_min'] / 1e6)})"
    error = row["error"]
    cells = [f"{row['shape']}, {row['pairs']}, {row['dtype']}", row["impl"], *times, *rates]
    cells += [number(row.get("launches")), number(row.get("waits")), moved]
    cells += [f"{error[key]:.1e}" for key in ("loss", "logit", "gradient")]
    return "| " + " | ".join([*cells, number(row.get("logit_error_over_formula"))]) + " |"


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The numbers in plain words."""
    found = report["logit"]
    worst = ", ".join(f"{name} {value:.2g}" for name, value in found["worst_over_formula"].items()) or "not measured"
    load = [report[f"load_average_at_{when}"][0] for when in ("start", "end")]
    return "\n".join(
        [
            f"\n{report['environment']['hardware']}; times are of {report['times_are_of']}",
            "",
            HEAD,
            "|" + "---|" * (HEAD.count("|") - 1),
            *(line(row) for row in report["rows"]),
            "",
            f"Floor: each wide tensor once, at the {report['copy_tbs']:.3g} TB/s of a copy measured in this process.",
            f"Error of the logit over that of diffusers' formula, the worst row of each: {worst}"
            f" (goal {found['goal']}: {'reached' if found['reached'] else 'not reached'}).",
            *(f"Waits: {case_of(row)}, {row['impl']}: {row['sync']}" for row in report["rows"] if row.get("sync")),
            *(f"Left out: {name}: {why}" for name, why in report["left_out"].items()),
            f"Load average {load[0]:.1f} at the start, {load[1]:.1f} at the end.",
        ]
    )
