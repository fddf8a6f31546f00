"""The preference loss alone, forward and backward: times, bytes, launches, and how exact it is.

    python benchmarks/loss.py                            on a GPU: everything, less than ten minutes
    TRITON_INTERPRET=1 python benchmarks/loss.py         without one: what a CPU can prove

diffusers' formula, this package by PyTorch, the same compiled, by Triton, and by Triton in a CUDA graph. Each must
compute the same as fp64 does before it is timed. Times on a CPU are times of a CPU; Triton's interpreter is for
correctness and not timed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from data import machine, say
from lossy.cases import DTYPES, SHAPES, Case, Inputs, make
from lossy.clock import INSIDE, Act, cache_bytes, graphed, microseconds, sets_for_cold, spread
from lossy.counts import counted
from lossy.equal import Distance, Exact, check, distance, exact
from lossy.results import about, conclude, table
from lossy.ways import BY_TRITON, COMPILED, WAYS, Way, ready, run
from stepping.ceilings import copy_tbs
from tqdm import tqdm

from diffpref.report import write_report
from diffpref.triton_kernels.available import cannot_run

PAIRS = {"cuda": "1,4,16,64", "cpu": "1,4"}
SETS = {"cuda": 1000, "cpu": 8}  # most sets of inputs; a server's processor has caches of half a gigabyte
ROUNDS = 2  # turns that each way takes
COMPILING = 0.7  # most of a case's share of the budget that goes into compiling


class Bench:
    """One row after another, while there is time.

    Args:
        args: The command line.
        device: Where.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.started = args, device, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.copy, self.compiling = copy_tbs(device), 0.0  # TB/s; seconds that the last compilation took

    def left(self) -> float:
        """Seconds of the budget."""
        return self.args.budget - (time.perf_counter() - self.started)

    def measure(self, cases: list[Case]) -> None:
        """All of them."""
        for number, case in enumerate(bar := tqdm(cases, unit="case")):
            bar.set_description(case.name)
            reason = self.too_large(case) or ("the budget was spent" if self.left() < 0 else None)
            if reason:
                self.left_out[case.name] = reason
            else:
                self.of_case(case, self.left() / (len(cases) - number))

    def too_large(self, case: Case) -> str | None:
        """Why it cannot be had in memory: diffusers' formula holds about eight fp32 copies of a prediction."""
        need = case.bytes_min + 8 * 4 * case.elements
        have = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else self.args.most_gb * 1e9
        return f"it takes about {need / 1e9:.1f} GB" if need > have else None

    def of_case(self, case: Case, seconds: float) -> None:
        """Errors of all ways, then times of those that can be timed."""
        x = make(case, self.device, self.args.seed)
        true, rows, ways = exact(x), {}, {}
        for name in self.args.impl:
            if reason := self.impossible(name, case, seconds):
                self.left_out[f"{name}, {case.name}"] = reason
            else:
                ways[name] = self.prepared(name)
                rows[name] = self.row(name, case, ways[name], x, true)
        del true
        timed = {name: way for name, way in ways.items() if self.can_time(name)}
        for name, found in self.times(case, timed, seconds).items():
            rows[name] |= found
        self.rows += rows.values()

    def row(self, name: str, case: Case, way: Way, x: Inputs, true: Exact) -> dict[str, Any]:
        """All but the times. Raises ValueError for a way whose times would mean nothing."""
        found = self.distance(name, way, x, true)
        if way.timed:
            check(name, found, case)
        facts = {"impl": name, "shape": case.shape, "item": case.item, "pairs": case.pairs, "dtype": case.dtype}
        facts |= {"error": found.row(), "bytes_min": case.bytes_min, "floor_us": case.bytes_min / self.copy / 1e6}
        return facts | counted(name, partial(run, way, x), self.device) | self.syncs(way, x)

    def prepared(self, name: str) -> Way:
        """Compiled code is made anew."""
        if name in COMPILED:
            torch.compiler.reset()
            torch._inductor.metrics.reset()
        return ready(name)

    def distance(self, name: str, way: Way, x: Inputs, true: Exact) -> Distance:
        """From fp64; compiled code is made by it."""
        started = time.perf_counter()
        found = distance(way, x, true)
        if name in COMPILED:
            self.compiling = time.perf_counter() - started
        return found

    def impossible(self, name: str, case: Case, seconds: float) -> str | None:
        """Why a way cannot be had."""
        if WAYS[name].graph and self.device.type != "cuda":
            return "CUDA graphs want a GPU"
        if name in BY_TRITON and (reason := cannot_run(self.device)):
            return reason
        if name in BY_TRITON and self.device.type == "cpu" and case.pairs > self.args.interpreted:
            return f"more pairs than are sent through Triton's interpreter ({self.args.interpreted})"
        if name in COMPILED and self.device.type == "cpu" and case.pairs > 1:
            return "on a CPU compiled for one pair only"
        if name in COMPILED and self.compiling > COMPILING * seconds:
            return f"the last compilation took {self.compiling:.0f} s, of {seconds:.0f} s that this case has"
        return None

    def can_time(self, name: str) -> bool:
        """On a CPU, Triton's kernels run through its interpreter."""
        return WAYS[name].timed and not (name in BY_TRITON and self.device.type == "cpu")

    def syncs(self, way: Way, x: Inputs) -> dict[str, str | None]:
        """On a GPU, what CUDA itself says of a wait for the device, if there is one."""
        if self.device.type != "cuda":
            return {}
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(way, x)
        except RuntimeError as error:
            return {"sync": str(error).splitlines()[0]}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"sync": None}

    def times(self, case: Case, ways: dict[str, Way], seconds: float) -> dict[str, dict[str, Any]]:
        """Hot and cold, ROUNDS turns each."""
        count = min(sets_for_cold(case.bytes_min, self.device), self.args.most_sets)
        sets = [make(case, self.device, self.args.seed + i) for i in range(count)]
        share = min(self.args.each, 0.5 * seconds / max(1, 2 * ROUNDS * len(ways)))
        hot = {name: self.acts(way, sets[:1]) for name, way in ways.items()}
        cold = {name: self.acts(way, sets) for name, way in ways.items()}
        runs: dict[str, dict[str, list]] = {name: {"hot": [], "cold": []} for name in ways}
        for _ in range(ROUNDS):
            for name, kind in product(ways, ("hot", "cold")):
                acts, calls = (hot if kind == "hot" else cold)[name]
                runs[name][kind].append([us / calls for us in microseconds(acts, self.device, share)])
        of_sets = {"cold_bytes": count * case.bytes_min, "cache_bytes": cache_bytes(self.device)}
        return {name: {f"{k}_us": spread(found) for k, found in of.items()} | of_sets for name, of in runs.items()}

    def acts(self, way: Way, sets: list[Inputs]) -> tuple[list[Act], int]:
        """(what is called and timed, how many losses that is)."""
        acts = [partial(run, way, x) for x in sets]
        return ([graphed(acts)], max(INSIDE, len(acts))) if way.graph else (acts, 1)


# --- the whole --------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda or cpu; the former where there is one")
    parser.add_argument("--shapes", type=names_of(SHAPES), default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--pairs", help="such as 1,4,16,64 (the default on a GPU; 1,4 on a CPU)")
    parser.add_argument("--dtypes", type=names_of(DTYPES), default=["bf16", "fp32", "fp16"], help="of fp32,bf16,fp16")
    parser.add_argument("--impl", type=names_of(WAYS), default=list(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all (540); what is left out is named")
    parser.add_argument("--each", type=float, default=0.3, help="seconds of each turn of each way (0.3)")
    parser.add_argument("--shrunk", type=int, default=1, help="divide the sides of the shapes, to try it out")
    parser.add_argument("--interpreted", type=int, default=1, help="most pairs through Triton's interpreter (1)")
    parser.add_argument("--most-gb", type=float, default=4.0, help="memory that a case may take on a CPU (4)")
    parser.add_argument("--most-sets", type=int, help="most sets of inputs for cold times (1000; 8 on a CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/loss-<machine>.json if none")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.most_sets = args.most_sets or SETS[args.device]
    args.pairs = [int(pairs) for pairs in (args.pairs or PAIRS[args.device]).split(",")]
    return args


def names_of(known: dict[str, Any]):
    """A comma-separated list of these, as argparse wants its types."""

    def names(text: str) -> list[str]:
        for name in (found := text.split(",")):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; known: {', '.join(known)}")
        return found

    return names


def cases_of(args: argparse.Namespace) -> Iterator[Case]:
    """Small ones first, so that a budget is spent on what it can pay for."""
    for pairs, dtype, shape in product(sorted(args.pairs), args.dtypes, args.shapes):
        yield Case(shape, dtype, pairs, args.shrunk)


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    args = parse(sys.argv[1:] if argv is None else argv)
    device = torch.device(args.device)
    report = about(args, device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        bench = Bench(args, device)
        say(f"copies at {bench.copy:.3g} TB/s; at most {args.budget:.0f} s")
        try:
            bench.measure(list(cases_of(args)))
        except KeyboardInterrupt:
            bench.left_out["the rest"] = "stopped by hand"
    conclude(report, bench.rows, bench.left_out, bench.copy)
    out = args.out or Path(__file__).parent / "results" / f"loss-{machine()}.json"
    write_report(out, report)
    print(table(report))
    say(str(out))


if __name__ == "__main__":
    main()
