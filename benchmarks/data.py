"""What the caches cost and save:  make bench   or:  python benchmarks/data.py

Variants take turns within a round, so that what else the machine does falls on all of them; ratios are formed within a
round. Memory is measured in processes of their own. Needs Linux (/proc).
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from worlds import FULL, QUICK, World, make

from diffpref.batch import PreferenceBatch
from diffpref.cache import open_cache
from diffpref.config import CacheConfig, Config, DataConfig, LoraSettings, ModelConfig, TrainConfig
from diffpref.data import training_loader
from diffpref.encode import TEXT_ENCODERS, present
from diffpref.engines import silence
from diffpref.report import environment, write_report
from diffpref.trainer import Trainer

SEED, WORKERS, DEFAULT_WORKERS = 0, (0, 2), 2
CACHES = ("none", "cache")
KINDS = {"kept": "none", "released": "cache"}  # encoders in memory -> the variant that trains so
MB = 1e6
Values = dict[str, list[float]]


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Of two variants, round by round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


# --- the pieces that are timed ----------------------------------------------------------------------------------------


def configured(world: World, folder: Path, cache: str) -> Config:
    """A run of a world, with both caches or none."""
    pipeline, pairs = make(world, folder)
    return Config(
        name=f"{world.name}-{cache}",
        output_dir=folder,
        model=ModelConfig(str(pipeline)),
        data=DataConfig(str(pairs), max_pairs=world.pairs, num_workers=0),
        lora=LoraSettings(),
        cache=CacheConfig(latents=cache == "cache", text=cache == "cache", folder=folder / f"{world.name}-cache"),
        train=TrainConfig(max_train_steps=1_000_000, train_batch_size=world.batch_size, seed=SEED),
    )


def timed(act: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def seconds_a_batch(
    trainer: Trainer, workers: int, act: Callable[[PreferenceBatch], Any], warm: int, count: int
) -> float:
    """Seconds from batch to batch, once `warm` ones have gone through."""
    config = replace(trainer.config, data=replace(trainer.config.data, num_workers=workers))
    place = {"start": 0, "rank": 0, "world": 1, "seed": SEED, "cache": trainer.cache}
    batches = iter(training_loader(trainer.checked.rows, trainer.sizes, config, **place))
    for _ in range(warm):
        act(next(batches))
    seconds = timed(lambda: [act(next(batches)) for _ in range(count)])
    batches.close()
    return seconds / count


def one_step(trainer: Trainer) -> Callable[[PreferenceBatch], None]:
    """A batch -> an optimiser step."""

    def step(batch: PreferenceBatch) -> None:
        trainer.learner.learn([batch], trainer.loop.journal)
        trainer.loop.step()

    return step


def build_and_open(trainer: Trainer, folder: Path) -> tuple[float, float]:
    """Seconds to build both caches in an empty folder, and to open them complete: all of it is checked then."""
    cache, data = (
        replace(trainer.config.cache, folder=folder),
        replace(trainer.config.data, num_workers=DEFAULT_WORKERS),
    )
    config = replace(trainer.config, cache=cache, data=data)
    rows, sizes, pipe = trainer.checked.rows, trainer.sizes, trainer.pipe

    def opened() -> float:
        return timed(lambda: open_cache(rows, sizes, config, pipe).close())

    return opened(), opened()


def megabytes(folder: Path) -> float:
    """Of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MB


def encoder_megabytes(trainer: Trainer) -> float:
    """Of the encoders' weights."""
    modules = present(trainer.pipe, ("vae", *TEXT_ENCODERS)).values()
    return sum(weight.nbytes for module in modules for weight in module.parameters()) / MB


# --- one world --------------------------------------------------------------------------------------------------------


def measure(world: World, folder: Path, rounds: int) -> dict[str, Any]:
    """All numbers of a world."""
    say(f"{world.name}: {world.what}")
    trainers = {cache: Trainer(configured(world, folder, cache)) for cache in CACHES}
    result = {"settings": asdict(world), "encoder_mb": encoder_megabytes(trainers["none"])}
    result["size"] = list(trainers["none"].sizes)
    result["build"] = build = measure_build(world, trainers["cache"], folder)
    result["data_encode"], rates = measure_encoding(world, trainers, rounds)
    result["step"], step_ratio = measure_steps(world, trainers, rounds)
    result["memory"], memory_ratios = measure_memory(world, folder)
    saved = result["step"]["none"]["median"] - result["step"]["cache"]["median"]
    result["break_even"] = break_even(build["seconds"]["median"], saved, world)
    result["ratios"] = rates | {"step_none_over_cache": step_ratio} | memory_ratios
    result["ratios"]["build_over_open"] = build.pop("over_open")
    return result


def break_even(build: float, saved: float, world: World) -> dict[str, Any]:
    """Training steps, and passes over the set, after which the caches have paid; none where a step saves no time."""
    steps = build / saved if saved > 0 else None
    epochs = steps * world.batch_size / world.pairs if steps else None
    return {"seconds_saved_a_step": saved, "steps": steps, "epochs": epochs}


def measure_build(world: World, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Building and opening, in empty folders; the last one built is what the trainer goes on with."""
    say("  building the caches")
    folders = [folder / f"{world.name}-build-{number}" for number in range(world.builds)]
    builds, opens = zip(*[build_and_open(trainer, place) for place in folders], strict=True)
    folders[-1].rename(trainer.config.cache.folder)
    trainer.fill_cache()
    entries = len(trainer.cache.pictures.where)
    return {
        "pictures": entries,
        "prompts": len(trainer.cache.prompts.where),
        "seconds": summary(builds),
        "pictures_per_second": summary([entries / seconds for seconds in builds]),
        "open_seconds": summary(opens),
        "mb_on_disk": megabytes(trainer.config.cache.folder),
        "over_open": ratio(builds, opens),
    }


def measure_encoding(world: World, trainers: dict[str, Trainer], rounds: int) -> tuple[dict, dict]:
    """Pairs a second through loader and Encoder, without a denoiser -> (by variant, ratios)."""
    found: Values = {f"{cache}_workers_{workers}": [] for workers in WORKERS for cache in CACHES}
    for number in range(rounds):
        say(f"  loader and encoder, round {number + 1} of {rounds}")
        for workers in WORKERS:
            for cache, trainer in trainers.items():
                count = world.cached if cache == "cache" else world.batches
                trainer.encoder.prompts.clear()
                seconds = seconds_a_batch(trainer, workers, trainer.encoder, world.warm, count)
                found[f"{cache}_workers_{workers}"].append(world.batch_size / seconds)
    ratios = {
        f"pairs_cache_over_none_workers_{w}": ratio(found[f"cache_workers_{w}"], found[f"none_workers_{w}"])
        for w in WORKERS
    }
    ratios |= {f"pairs_workers_2_over_0_{c}": ratio(found[f"{c}_workers_2"], found[f"{c}_workers_0"]) for c in CACHES}
    return {name: summary(values) for name, values in found.items()}, ratios


def measure_steps(world: World, trainers: dict[str, Trainer], rounds: int) -> tuple[dict, dict]:
    """Seconds of a whole training step, with the two workers of the default -> (by variant, ratio)."""
    found: Values = {cache: [] for cache in CACHES}
    for number in range(rounds):
        say(f"  training steps, round {number + 1} of {rounds}")
        for cache, trainer in trainers.items():
            trainer.encoder.prompts.clear()
            found[cache].append(seconds_a_batch(trainer, DEFAULT_WORKERS, one_step(trainer), 1, world.steps))
    return {cache: summary(values) for cache, values in found.items()}, ratio(found["none"], found["cache"])


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(world: World, folder: Path) -> tuple[dict, dict]:
    """MB of a training process that keeps its encoders, and of one that lets them go -> (by kind, ratios)."""
    found = {}
    for kind in KINDS:
        say(f"  memory, encoders {kind}")
        task = json.dumps({"world": asdict(world), "folder": str(folder), "kind": kind})
        command = [sys.executable, __file__, "--memory", task]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[kind] = json.loads(output.splitlines()[-1])
    measures = {"peak_training_mb": "peak", "resident_mb": "resident"}
    return found, {
        f"memory_{short}_kept_over_released": summary([found["kept"][key] / found["released"][key]])
        for key, short in measures.items()
    }


def memory(task: dict[str, Any]) -> dict[str, float]:
    """In a process of its own: train a few steps and look at the memory before and after."""
    empty = status("VmRSS")
    world = World(**task["world"])
    trainer = Trainer(configured(world, Path(task["folder"]), KINDS[task["kind"]]))
    loaded = status("VmRSS")
    trainer.fill_cache()
    gc.collect()
    ready, until_ready = status("VmRSS"), status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
    seconds_a_batch(trainer, 0, one_step(trainer), 1, 1)
    training = status("VmHWM")  # not getrusage: its maximum counts the process that started this one
    return {
        "libraries_mb": empty,
        "loaded_mb": loaded,
        "ready_to_train_mb": ready,
        "peak_until_ready_mb": until_ready,
        "peak_training_mb": training,
        "resident_mb": status("VmRSS"),
        "peak_process_mb": max(until_ready, training),
    }


def status(key: str) -> float:
    """MB of this process, as the kernel counts them."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / MB


# --- the whole --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """What is being done."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """The hardware as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", environment()["hardware"].lower()).strip("-")


def about(quick: bool, rounds: int) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    return {
        "command": "python benchmarks/data.py" + " --quick" * quick,
        "environment": environment(),
        "ram_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "torch_threads": torch.get_num_threads(),
        "seed": SEED,
        "workers_in_builds_and_steps": DEFAULT_WORKERS,
        "rounds": rounds,
        "memory_rounds": 1,
        "load_average_at_start": list(os.getloadavg()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def line(what: str, values: dict[str, Any], unit: str) -> str:
    """A row of the table."""
    spread = f"{values['min']:.3g} – {values['max']:.3g}" if values["n"] > 1 else "once"
    return f"| {what} | {values['median']:.3g} {unit} | {spread} |"


def table(world: dict[str, Any]) -> str:
    """The numbers of a world in plain words."""
    build, ratios, memory = world["build"], world["ratios"], world["memory"]
    floor = summary([memory[kind]["libraries_mb"] for kind in KINDS])
    rows = [
        line(f"build the caches, {build['pictures']} pictures, {build['mb_on_disk']:.1f} MB", build["seconds"], "s"),
        line("pictures encoded", build["pictures_per_second"], "/s"),
        line("open the complete caches", build["open_seconds"], "s"),
        *(line(f"loader + encoder, {key.replace('_', ' ')}", v, "pairs/s") for key, v in world["data_encode"].items()),
        *(line(f"training step, {cache}", world["step"][cache], "s") for cache in CACHES),
        *(
            line(f"peak memory in training, encoders {kind}", summary([memory[kind]["peak_training_mb"]]), "MB")
            for kind in KINDS
        ),
        *(
            line(f"resident after a step, encoders {kind}", summary([memory[kind]["resident_mb"]]), "MB")
            for kind in KINDS
        ),
        line("of that, libraries before anything is loaded", floor, "MB"),
        *(line(key.replace("_", " "), values, "x") for key, values in ratios.items()),
    ]
    settings = world["settings"]
    head = f"\n{settings['what']}: {settings['pairs']} pairs, batches of {settings['batch_size']}"
    return "\n".join([head, "", "| what | median | min – max |", "|---|---|---|", *rows, paid(world["break_even"])])


def paid(even: dict[str, Any]) -> str:
    """The break-even in words."""
    if even["steps"] is None:
        return "\nA step saves no time here: the caches do not pay by time."
    return (
        f"\nThe caches have paid after {even['steps']:.0f} training steps ({even['epochs']:.2f} passes over the set)."
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: only shows that it works")
    parser.add_argument("--rounds", type=int, default=3, help="how often the variants take turns")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/data-<machine>.json when not given")
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    silence()
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return
    rounds = 1 if args.quick else args.rounds
    report = about(args.quick, rounds)
    with tempfile.TemporaryDirectory() as folder:
        report["worlds"] = {w.name: measure(w, Path(folder), rounds) for w in (QUICK if args.quick else FULL)}
    report["load_average_at_end"] = list(os.getloadavg())
    out = args.out or Path(__file__).parent / "results" / f"data-{machine()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    print(*(table(world) for world in report["worlds"].values()), sep="\n")
    load = [report[f"load_average_at_{when}"][0] for when in ("start", "end")]
    print(f"\nLoad average {load[0]:.1f} at the start, {load[1]:.1f} at the end; {out}")


if __name__ == "__main__":
    main()
