"""Pairs a second of a training step, against diffusers' example script:  python benchmarks/step.py --model emoji

The script's step as shipped, with workers, and with cached latents and text granted; this package's own trainer, and
the same with one lever moved at a time. Before anything is timed, all of them must compute the same loss, margins and
gradients. Variants take turns within a round; ratios are formed within a round. On a GPU:

    python benchmarks/step.py --model sd15 --device cuda --pairs 16
    python benchmarks/step.py --model sdxl --device cuda --pairs 8
"""

import argparse
import cProfile
import gc
import json
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from data import machine, say
from diffusers import DDPMScheduler
from stepping.bases import Bases, make_bases
from stepping.ceilings import ceilings
from stepping.clock import Turn
from stepping.counting import count
from stepping.equal import EXACT, HALF, Given, awaken, check, compare, draw, through_ours, through_script
from stepping.levers import LEVERS, Lever
from stepping.ours import Ours, configured, engine
from stepping.results import PREDICTIONS, about, conclude, table
from stepping.rows import read_rows
from stepping.script import PRECISIONS, Recipe, Script, with_lora
from stepping.toggles import toggles

from diffpref.engines import silence
from diffpref.report import write_report

SEED = 0
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "script": ("diffusers' script as shipped: no workers, encoders at each step", {}),
    "script_workers": ("the same with loader workers", {"workers": 4}),
    "script_cached": ("the same with latents and text granted out of memory", {"cached": True}),
}
PREPARING = 0.6  # share of the budget after which no further variant is made
PROFILED = 40  # lines


class Variant:
    """A side of the comparison with the state of its engine. what: in words.  make: makes the side."""

    def __init__(self, name: str, what: str, make: Callable[[], Script | Ours]):
        self.name, self.what, self.state = name, what, {}
        started = time.perf_counter()
        with engine(self.state):
            self.side = make()
        self.prepared = time.perf_counter() - started
        self.turns: list[Turn] = []

    def turn(self, warm: int, steps: int) -> None:
        """Time some steps."""
        with engine(self.state):
            self.turns.append(self.side.turn(warm, steps))

    def row(self) -> dict[str, Any]:
        """What it is, for the report."""
        lever = LEVERS.get(self.name)
        return {
            "what": self.what,
            "estimator_changed": bool(lever and lever.estimator),
            "prepared_seconds": self.prepared,
        }


# --- before the clock starts ------------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace) -> Recipe:
    """How the script is called: on a GPU as its page says, fp16 with checkpointing; else with its flags' defaults."""
    on_gpu = args.device == "cuda"
    precision, checkpointing = args.script_precision or ("fp16" if on_gpu else "no"), args.script_checkpointing
    again = on_gpu if checkpointing == "auto" else checkpointing == "true"
    return Recipe(batch=args.pairs, precision=precision, checkpointing=again)


def makers(bases: Bases, args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, Callable]]:
    """(name, what, how it is made) of each variant, in order of importance."""
    rows, base = read_rows(bases.pairs, args.set), recipe(args)
    for name, (what, changes) in SCRIPTS.items():
        called = replace(base, **changes)
        yield name, what, lambda called=called: Script(script_pipe(bases, called), rows, called, bases.resolution)
    chosen = args.levers if args.levers is not None else [n for n, lever in LEVERS.items() if args.device in lever.on]
    for name in ["ours", *(name for name in chosen if name != "ours")]:
        yield name, LEVERS[name].what, lambda name=name: ours(name, LEVERS[name], bases, args, folder)


def ours(name: str, lever: Lever, bases: Bases, args: argparse.Namespace, folder: Path) -> Ours:
    """A variant of this package."""
    return Ours(configured(name, lever, bases, recipe(args), args.set, folder), bases, lever)


def script_pipe(bases: Bases, called: Recipe) -> Any:
    """The weights in the script's precision; the SDXL script's VAE is always in fp32."""
    pipe = bases.at(PRECISIONS[called.precision])
    if getattr(pipe, "text_encoder_2", None) is not None:
        pipe.vae = bases.pipe.vae
    return pipe


def prepared(bases: Bases, args: argparse.Namespace, folder: Path, started: float) -> tuple[list[Variant], dict]:
    """(variants, why others were left out): what this machine cannot do, and what the budget has no time for."""
    variants, left_out = [], {}
    for name, what, make in makers(bases, args, folder):
        if time.perf_counter() - started > PREPARING * 60 * args.budget and name not in (*SCRIPTS, "ours"):
            left_out[name] = f"no time left in a budget of {args.budget:g} minutes"
            continue
        say(f"preparing {name}: {what}")
        try:
            variants.append(Variant(name, what, make))
        except (ValueError, NotImplementedError) as error:
            left_out[name] = str(error)
    return variants, left_out


def equal_maths(variants: list[Variant], bases: Bases, beta: float) -> dict[str, Any]:
    """Differences of every variant of ours from the script's formula in fp32, by name.

    Raises Unequal for one that computes something else; in half precision the numbers are written, not judged.
    """
    mine = {v.name: v for v in variants if isinstance(v.side, Ours) and not LEVERS[v.name].estimator}
    given, expected = reference_of(mine["ours"].side, bases, beta)
    found = {}
    for name, variant in mine.items():
        awaken(variant.side.model, SEED)
        half = variant.side.trainer.dtype != torch.float32
        with engine(variant.state):
            found[name] = compare(through_ours(variant.side.trainer, given), expected, HALF if half else EXACT)
        if not half:
            check(name, found[name])
    return {name: differences.row() for name, differences in found.items()}


def reference_of(first: Ours, bases: Bases, beta: float) -> tuple[Given, tuple]:
    """What both sides are given, and what the script's formula makes of it in fp32."""
    pipe = bases.at(torch.float32)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    given = draw(first.trainer, first.batch(), scheduler)
    exact = with_lora(pipe.unet, Recipe(rank=first.trainer.config.lora.rank))
    awaken(exact, SEED)
    return given, through_script(exact, scheduler, given, beta)


def counted(variant: Variant) -> dict[str, Any] | None:
    """One step's counts; none where the step is compiled: its operations are not torch's."""
    if isinstance(variant.side, Ours) and variant.side.trainer.train.compile != "none":
        return None
    with engine(variant.state):
        return count(variant.side.once(), variant.side.model).row()


# --- the clock --------------------------------------------------------------------------------------------------------


def rounds(variants: list[Variant], args: argparse.Namespace, until: float) -> int:
    """All variants in turn, every other round backwards, at least once and as long as the budget lasts; returns how
    often."""
    longest = 0.0
    for number in range(args.rounds):
        if number and time.perf_counter() + longest > until:
            return number
        started = time.perf_counter()
        for variant in variants[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {args.rounds}: {variant.name}")
            variant.turn(args.warm, args.steps)
        longest = max(longest, time.perf_counter() - started)
    return args.rounds


def profile(variant: Variant, args: argparse.Namespace) -> None:
    """Where Python spends a turn."""
    profiler = cProfile.Profile()
    profiler.runcall(variant.turn, args.warm, args.steps)
    for measure in ("tottime", "cumtime"):
        pstats.Stats(profiler).sort_stats(measure).print_stats(PROFILED)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole report."""
    started, device = time.perf_counter(), torch.device(args.device)
    report = about(args, device) | {"script": asdict(recipe(args))}
    report["ceilings"] = ceilings(device)
    bases = make_bases(args.model, args.size, folder, args.set, device)
    variants, report["left_out"] = prepared(bases, args, folder, started)
    say("equal maths")
    report["base"], report["equal_maths"] = bases.what, equal_maths(variants, bases, recipe(args).beta)
    report["counts"] = {variant.name: counted(variant) for variant in variants}
    report["toggle"] = toggles(next(v for v in variants if v.name == "ours").side.model)
    gc.collect()
    if args.profile:
        profile(next(v for v in variants if v.name == args.profile), args)
    report["rounds"] = rounds(variants, args, started + 60 * args.budget)
    report["variants"] = {variant.name: variant.row() for variant in variants}
    conclude(report, {variant.name: variant.turns for variant in variants}, args.pairs)
    report["predictions"] = json.loads(PREDICTIONS.read_text())
    report["load_average_at_end"] = list(os.getloadavg())
    return report


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["emoji", "sd15", "sdxl"], default="emoji")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: the same classes made small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=16, help="in a batch")
    parser.add_argument("--set", type=int, default=128, help="pairs in the set")
    parser.add_argument(
        "--levers", nargs="*", choices=list(LEVERS), help="ours and these; all for the device if not given"
    )
    parser.add_argument("--script-precision", choices=list(PRECISIONS), help="fp16 on a GPU, else no, when not given")
    parser.add_argument(
        "--script-checkpointing", choices=["auto", "true", "false"], default="auto", help="auto: on a GPU"
    )
    parser.add_argument("--warm", type=int, default=2, help="steps of a turn before its clock starts")
    parser.add_argument("--steps", type=int, default=8, help="steps timed in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="how often the variants take turns, if the budget lasts")
    parser.add_argument("--budget", type=float, default=9.0, help="minutes")
    parser.add_argument("--profile", metavar="VARIANT", help="print where Python spends a turn of this variant")
    parser.add_argument(
        "--out", type=Path, help="JSON file; benchmarks/results/step-<model>-<machine>.json if not given"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave it out, or take --device cpu")
    silence()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, Path(folder))
    name = f"step-{args.model}{'-tiny' * (args.size == 'tiny')}-{machine()}.json"
    out = args.out or Path(__file__).parent / "results" / name
    write_report(out, report)
    print(table(report))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
