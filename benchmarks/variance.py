"""How much do a step's gradients vary with timesteps and noise, and what is done about it at no cost?

    python benchmarks/variance.py

Gradients of the DPO loss with respect to the quickstart's LoRA, pair by pair in the emoji world, where a run starts and
at the trained adapter that ships; see spread/estimates.py for what is made of them. All ways cost the same number of
forward passes. Gradients are kept in runs/variance/, step by step: a command that was killed goes on.
"""

import argparse
import os
from pathlib import Path
from typing import Any

# One thread: the model is tiny. OpenMP reads these when torch is loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100", "HF_HUB_OFFLINE": "1"}

from data import about, machine, say  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from spread.draws import CONDITIONS, SKETCH, WAYS, Condition, Plan, configuration, gradients  # noqa: E402
from spread.estimates import Row, measured  # noqa: E402

from diffpref.engines import silence  # noqa: E402
from diffpref.figures import CHOSEN, INK, PLAIN, REJECTED, SOFT  # noqa: E402
from diffpref.report import write_report  # noqa: E402

RUNS = Path(__file__).parents[1] / "runs" / "variance"
DRAWN = {  # what the picture shows -> the number's name, below "ratio/"
    "independent noise (another objective)": "independent",
    "half the pairs, each twice, ε and −ε, same t": "a pair twice, mirrored",
    "half the pairs, each twice, ε and −ε": "a pair twice, mirrored, fresh timestep",
    "half the pairs, each twice": "a pair twice",
    "ε and −ε in neighbouring pairs": "antithetic neighbours",
    "stratified timesteps": "stratified",
}
COLOURS = (PLAIN, CHOSEN, REJECTED)


def figure(conditions: dict[str, dict[str, Row]], path: Path) -> None:
    """A row for each way, its variance over that of independent draws."""
    drawing = Figure(figsize=(8.5, 4.6), layout="constrained")
    FigureCanvasAgg(drawing)
    axis = drawing.subplots()
    for number, (name, found) in enumerate(conditions.items()):
        draw(axis, found, (1 - number) * 0.22, COLOURS[number % len(COLOURS)], name)
    axis.axvline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_yticks(range(len(DRAWN)), list(DRAWN))
    axis.set_xlabel("variance of a step's gradient over that of iid timesteps and shared noise", fontsize=8, color=SOFT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=SOFT)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    title = "Equal numbers of forward passes; 95 % intervals over steps"
    drawing.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    drawing.savefig(path, dpi=110)


def draw(axis: Axes, found: dict[str, Row], shift: float, colour: str, name: str) -> None:
    """One condition's points."""
    for place, key in enumerate(DRAWN.values()):
        row = found[f"ratio/{key}"]
        y = place + shift
        if None not in row.values():
            axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6)
        axis.plot(row["value"], y, color=colour, marker="o", markersize=4, label=name if place == 0 else None)


def tell(conditions: dict[str, dict[str, Row]]) -> None:
    """The table."""
    print(f"\n| what | {' | '.join(conditions)} |\n|{'---|' * (len(conditions) + 1)}")
    for key in next(iter(conditions.values())):
        print(f"| {key} | {' | '.join(text(found[key]) for found in conditions.values())} |")


def text(row: Row) -> str:
    """With the interval."""
    value, low, high = ("–" if v is None else f"{v:.3g}" for v in row.values())
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Measure, write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="steps at each condition (16)")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step (16)")
    parser.add_argument("--conditions", type=int, default=len(CONDITIONS), help="only the first so many (3)")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and adapter")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where gradients are kept")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/variance-<machine>.json if none")
    parser.add_argument("--figure", type=Path, help="PNG file; beside the JSON file if none")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: an interval needs two steps or more")
    silence()
    chosen = CONDITIONS[: args.conditions]
    plan = Plan(args.folder, args.steps, args.pairs, args.seed)
    passes = plan.steps * plan.pairs * len(WAYS) * len(chosen)
    say(f"{passes} gradients of a pair, about {passes * 0.18 / 60:.0f} minutes on one core, less what is on disk")
    report = header(plan, chosen)
    report["conditions"] = {c.name: measured(gradients(c, plan), c.noise) for c in chosen}
    out = args.out or Path(__file__).parent / "results" / f"variance-{machine()}.json"
    write_report(out, report)
    figure(report["conditions"], args.figure or out.with_suffix(".png"))
    tell(report["conditions"])


def header(plan: Plan, chosen: tuple[Condition, ...]) -> dict[str, Any]:
    """What the numbers depend on."""
    facts = about(False, 1)
    names = ("environment", "ram_gb", "torch_threads", "load_average_at_start", "started")
    config = configuration(plan)
    return (
        {"command": f"python benchmarks/variance.py --steps {plan.steps} --conditions {len(chosen)}"}
        | {key: facts[key] for key in names}
        | {"steps": plan.steps, "pairs_a_step": plan.pairs, "seed": plan.seed, "sketch": SKETCH, "ways": WAYS}
        | {"lora": config.lora, "objective": {"name": config.objective.name, "beta": config.objective.beta}}
        | {"noise": {c.name: c.noise for c in chosen}}
    )


if __name__ == "__main__":
    main()
