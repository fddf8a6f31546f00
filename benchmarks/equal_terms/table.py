"""gallery/objectives/: the page, its numbers and its plots, out of whatever rows there are."""

import json
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from diffpref.emoji_world.preferences import LIST
from diffpref.emoji_world.votes import VOTERS
from equal_terms import plan, plots, rows, summary
from equal_terms.cell import prompts_of
from equal_terms.plan import CONTENDERS, LABELLED, NOISE, NOISY, STRATEGIES
from equal_terms.summary import Summary
from equal_terms.votes import KEPT_OUT
from equal_terms.work import Job

MISSING = "–"


def write(args: Namespace, jobs: dict[str, Job]) -> int:
    """Write the page; says what is missing. Returns 0."""
    known = rows.read(args.out)
    tables = {name: fill(job, known) for name, job in jobs.items()}
    made = [row for row in known.values() if row["scale"]["pairs"] in {job.scale.pairs for job in jobs.values()}]
    args.gallery.mkdir(parents=True, exist_ok=True)
    content = {"made_with": made_with(made, args), "scales": {n: vars(j.scale) for n, j in jobs.items()}} | tables
    (args.gallery / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, draw in {"win_rate": plots.forest, "label_noise": plots.label_noise, "ablation": plots.ablation}.items():
        there = tables[{"win_rate": "main", "label_noise": "noise", "ablation": "ablation"}[name]]
        if any("win_rate" in row for row in there):
            draw(there, args.gallery / f"{name}.png")
    (args.gallery / "README.md").write_text(page(content, args))
    print(f"{args.gallery}: {len(made)} rows of {args.out}; missing: {', '.join(missing(tables)) or 'nothing'}")
    return 0


def fill(job: Job, known: plan.Rows) -> list[Summary]:
    """The rows of a table, missing ones too."""
    prompts = prompts_of("test", job.scale, job.place)[0]
    if job.table == "main":
        return summary.main_rows(job.scale, known, prompts)
    return summary.grid_rows(job.cells(known), known, prompts)


def missing(tables: dict[str, list[Summary]]) -> list[str]:
    """Rows without a number."""
    return [f"{table}: {row['name']}" for table, there in tables.items() for row in there if not row["seeds"]]


def made_with(made: list[dict], args: Namespace) -> dict[str, Any]:
    """Machines, versions, commits and times of the rows."""

    def different(values: Iterable[Any]) -> list[Any]:
        return sorted(set(values))

    return {
        "rows": str(args.out.name),
        "cells": len(made),
        "hardware": different(row["environment"]["hardware"] for row in made),
        "versions": different(
            json.dumps({k: v for k, v in row["environment"].items() if k != "hardware"}) for row in made
        ),
        "commits": different(row["commit"] for row in made),
        "made": [min((row["made"] for row in made), default=""), max((row["made"] for row in made), default="")],
        "cpu_hours": round(sum(row["whole_cell"]["cpu_seconds"] for row in made) / 3600, 2),
        "load": [round(min(row["load"][0] for row in made), 1), round(max(row["load"][0] for row in made), 1)]
        if made
        else [],
    }


# --- the page --------------------------------------------------------------------------------------------------------


def rate(value: Summary) -> str:
    """0.93 [0.88, 0.97]"""
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def signed(value: Summary) -> str:
    """+0.03 [-0.02, +0.08]"""
    return f"{value['value']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def setting(row: Summary) -> str:
    """β and learning rate of a row that has them."""
    if "objective" not in row:
        return "sweep not complete"
    beta = row["objective"].get("beta")
    return (f"β {beta:g}, " if beta else "") + f"{row['rate']:.0e}".replace("e-0", "e-")


def main_line(row: Summary) -> str:
    """One line of the main table."""
    head = f"| {row['name']} | {row['view']} | {setting(row)} |"
    if "win_rate" not in row:
        return head + f" {'diverged' if row.get('diverged') else MISSING} |" + f" {MISSING} |" * 8
    costs, ranks, versus = row["cost"], row["ranking"], row.get("against_dpo")
    passes = f"{sum(costs['passes'].values()):.0f}"
    drifts = " | ".join(f"{1000 * row[key]:+.1f}" for key in ("drift_chosen", "drift_rejected"))
    seeds = "" if not row["diverged"] else f", {row['diverged']} diverged"
    return head + (
        f" {rate(row['win_rate'])} | {row['gain']:+.2f} | {signed(versus['gains']) if versus else MISSING} |"
        f" {row['recognised']:.2f} | {rate(ranks)} | {drifts} |"
        f" {passes} | {costs['cpu_seconds']:.0f} | {len(row['seeds'])}{seeds} |"
    )


MAIN_HEAD = (
    "| | labels | chosen setting | win rate vs base | gain | gain against dpo | concept recognised | held-out ranking |"
    " winner drift | loser drift | passes | CPU s | seeds |"
)


def by_gain(found: list[Summary]) -> list[Summary]:
    """Best win rate first, missing rows last."""
    return sorted(found, key=lambda row: -row["win_rate"]["value"] if "win_rate" in row else 1.0)


def verdicts(found: list[Summary]) -> list[str]:
    """What the comparison with dpo says of each row, in words; nothing where no row is compared."""
    groups: dict[str, list[str]] = {"better": [], "not told apart": [], "worse": []}
    for row in found:
        if versus := row.get("against_dpo"):
            won = versus["won"]
            kind = "better" if won["low"] > 0 else "worse" if won["high"] < 0 else "not told apart"
            groups[kind].append(f"{row['name']} ({signed(won)})")
    words = {
        "better": "Win rate higher than dpo's",
        "not told apart": "Not told apart from dpo (the interval of the difference holds zero): **no help shown**",
        "worse": "Lower than dpo's: **did not help**",
    }
    return [f"- {words[kind]}: {', '.join(names) or 'none'}." for kind, names in groups.items()]


def noise_table(found: list[Summary]) -> list[str]:
    """Win rate and gain of each objective at each share of wrong labels."""
    of = {row["name"]: row for row in found}
    lines = ["| | " + " | ".join(f"{p} % wrong" for p in NOISE) + " |", "|---" * (len(NOISE) + 1) + "|"]
    return lines + [f"| {n} | " + " | ".join(short(of.get(f"{n}, {p} %")) for p in NOISE) + " |" for n in NOISY]


def ablation_table(found: list[Summary]) -> list[str]:
    """Win rate and gain of each loss and label under each noise strategy."""
    of = {row["name"]: row for row in found}
    lines = ["| loss | labels | " + " | ".join(STRATEGIES) + " |", "|---" * (len(STRATEGIES) + 2) + "|"]
    for loss, label, _, _ in LABELLED:
        cells = " | ".join(short(of.get(f"{loss}, {label}, {strategy}")) for strategy in STRATEGIES)
        lines.append(f"| {loss} | {label} | {cells} |")
    return lines


def short(row: Summary | None) -> str:
    """A cell of a grid."""
    if row is None or "win_rate" not in row:
        return "diverged" if row and row.get("diverged") else MISSING
    return f"{rate(row['win_rate'])}, {row['gain']:+.2f}"


def page(content: dict, args: Namespace) -> str:
    """gallery/objectives/README.md."""
    scale, grid, made = content["scales"]["main"], content["scales"]["noise"], content["made_with"]
    count, each = scale["test"]
    lines = [
        "# Every objective on equal terms",
        "",
        "Written by `python benchmarks/objectives.py table` from the rows of"
        f" `benchmarks/results/{made['rows']}`; not written by hand. Numbers: [table.json](table.json).",
        "",
        *conditions(scale, made),
        "",
        "![win rates](win_rate.png)",
        "",
        "## The table",
        "",
        MAIN_HEAD,
        "|---" * 13 + "|",
        *map(main_line, by_gain(content["main"])),
        "",
        *legend(count, each, scale),
        "",
        "## What helped, and what did not",
        "",
        "Differences in win rate on the same pictures and seeds, with the interval over prompts; nothing is corrected"
        f" for the {len(CONTENDERS) - 1} comparisons, of which about one in twenty leaves zero out by chance.",
        "",
        *verdicts(content["main"]),
        "",
        *grids(content, grid),
        "## Read with care",
        "",
        *CARE,
        "",
    ]
    return "\n".join(lines)


def conditions(scale: Summary, made: Summary) -> list[str]:
    """How it was made."""
    steps = scale["pairs"] * 2 // plan.BATCH
    versions = "; ".join(", ".join(f"{k} {x}" for k, x in json.loads(v).items()) for v in made["versions"])
    return [
        f"Every row starts from the same pipeline (the emoji world's) and learns from the same votes: lists of {LIST}"
        f" pictures of one concept, each put in order by {VOTERS} simulated users with their noise. It sees"
        f" {scale['pairs']} pairs, each once, in {steps} steps of {plan.BATCH} pictures; a list of {LIST} counts as"
        f" {LIST // 2} pairs, so that all rows see as many pictures. LoRA of rank 16, logit-normal timesteps, as in the"
        " quickstart.",
        "",
        "Each row's β and learning rate were chosen by a sweep of at most four points at seed 0: the share of pictures"
        f" of {KEPT_OUT} validation concepts that win over the base's and still show their concept, equal shares by the"
        f" mean gain. The chosen point was then trained at {scale['seeds']} seeds and judged on concepts that neither"
        " labels nor sweep had seen.",
        "",
        f"Commands: `python benchmarks/objectives.py main --pairs {scale['pairs']}`, `noise`, `ablation`, `table`."
        f" Hardware: {'; '.join(made['hardware'])}, one thread a run; {made['cells']} runs, {made['cpu_hours']} CPU"
        f" hours, {made['made'][0]} to {made['made'][1]} UTC, load average {' to '.join(map(str, made['load']))}."
        f" Versions: {versions}. Commits: {', '.join(made['commits'])}.",
    ]


def legend(count: int, each: int, scale: Summary) -> list[str]:
    """What the columns mean."""
    pairs, draws = scale["ranking"]
    n = count * each * scale["seeds"]
    return [
        f"- **win rate**: {count} held-out concepts × {each} seeds × {scale['seeds']} trainings, n = {n}; judge: the"
        " majority's true utility. Intervals everywhere: 95 %, bootstrap over prompts (over pairs for ranking).",
        "- **gain**: mean difference in that utility. Win rates near 1 say little; the gain still tells rows apart.",
        f"- **held-out ranking**: of {pairs} pairs of other concepts in their true order, how many have the larger"
        f" implicit reward at the better picture ({draws} draws of timestep and noise each, the same for all rows).",
        "- **drift**: error of the policy less that of the base at those pairs' pictures, × 1000; above zero, it has"
        " become worse at them.",
        "- **passes**, **CPU s**: pictures through the denoiser, and seconds of one core, for 1000 pairs. CPU seconds"
        " were taken on a machine with other work and vary by it; passes do not.",
    ]


def seeds_of(table: list[dict]) -> str:
    """How many trainings the cells of a grid have, in words."""
    counts = sorted({len(row["seeds"]) for row in table if row["seeds"]})
    words = " or ".join(f"{n} seed{'s' * (n > 1)}" for n in counts) or "no seeds yet"
    single = " An interval of one seed does not hold what another seed would change." if 1 in counts else ""
    return f"Cells have {words}.{single}"


def grids(content: dict, scale: Summary) -> list[str]:
    """The two other tables."""
    each = f"{scale['pairs']} pairs, {scale['test'][0] * scale['test'][1]} pictures of each training"
    return [
        "## Wrong labels",
        "",
        f"A share of the pairs is turned round, the same ones for all; kto gets the two sides of each pair as likes."
        f" {each}; win rate and gain. {seeds_of(content['noise'])}",
        "",
        "![label noise](label_noise.png)",
        "",
        *noise_table(content["noise"]),
        "",
        "## Noise strategy × label × loss, on the same lists",
        "",
        "All six pairs of a list in one group (hard: dpo, conservative: cdpo, soft: osp, smoothed: smpo), or the list"
        f" as one. {each}; win rate and gain. {seeds_of(content['ablation'])}",
        "",
        "Cells that do not exist: Plackett-Luce takes an order only, so soft scores change nothing; conservative and"
        " smoothed labels are defined for a pair, not for a list. RankDPO takes the order (hard) or the shares of votes"
        " (soft).",
        "",
        "![ablation](ablation.png)",
        "",
        *ablation_table(content["ablation"]),
        "",
    ]


CARE = [
    "- The world is a toy: 32×32 pictures of 109 concepts, a pipeline that largely remembers its artwork, short runs."
    " What ranks first here need not do so on a large model.",
    "- The judge is noiseless: it is the very utility behind the votes' mean user. Real judges are noisy and"
    " can be gamed.",
    "- The sweep is coarse, and each row is judged at one point of it. Two rows that differ by less than their sweep's"
    " own steps are not told apart.",
    "- Held-out pairs and validation prompts share their concepts; the settings were chosen by pictures, not by"
    " ranking.",
    "- text_dpo and text_kto are told only which prompt belongs to a chosen picture, and dcpo and dove compare across"
    " prompts: they answer another question, and the taste reaches them only through which pictures were chosen.",
]
