"""Personalised tuning in the emoji world: your taste from a few pairs.

    python benchmarks/personalization.py bound      what one who knows the model of users makes of 1 to 16 pairs
    python benchmarks/personalization.py run --personal runs/personal --impersonal runs/quickstart

`run` draws what is missing, in the order of what decides first, measures all that is there after each part, and may
be killed and given again. --personal is the folder of a run that trained a user adapter: user_adapter.safetensors,
user_encoder/ and, if one was trained along, the LoRA. The judge is each user's own true utility, which no training saw.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# One thread: small matrices. OpenMP reads these when torch is loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from data import about, machine, say  # noqa: E402
from personal import around, bayes, beside, outcomes, people, show  # noqa: E402
from personal.bound import bound, choices_of  # noqa: E402
from personal.conditions import FULL, Plan, Scale, spaced  # noqa: E402
from personal.draw import How, Model, Studio  # noqa: E402
from personal.known import Reader, predictions  # noqa: E402
from personal.page import page  # noqa: E402
from worlds import EMOJI, REPOSITORY  # noqa: E402

from diffpref.engines import silence  # noqa: E402
from diffpref.report import write_report, write_whole  # noqa: E402
from diffpref.scorer.measures.bootstrap import mean  # noqa: E402
from diffpref.users.few_shot import load_encoder  # noqa: E402

RESULTS, GALLERY = REPOSITORY / "benchmarks" / "results", REPOSITORY / "gallery" / "personalization"
CONDITIONS = ("4", "16", "1", "oracle", "2", "8")  # of right users' pictures, what decides first
EXTRAS = ("between", "around", "spread")
QUICK = Scale({}, couples=2, between=2, around=(2, 2), spread=(2, 2), candidates=2)


# --- the bound --------------------------------------------------------------------------------------------------------


def before_training(args: argparse.Namespace) -> None:
    """The bound over pictures that are there before anything is trained."""
    of = people.held_out()
    offers = {
        "8 samples": choices_of(of, 8, artwork=False),
        "all samples": choices_of(of, None, artwork=False),
        "samples and artwork": choices_of(of, None, artwork=True),
    }
    found = bound(people.new_users(args.users), lambda _: offers, of, args.crowd)
    report = header(args) | {"drawn": args.crowd, "pictures": len(of.prompts), "comparisons": len(of.pairs)}
    write_report(args.out or RESULTS / f"personalization-bound-{machine()}.json", report | {"bound": found})
    tell(found)


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    facts = about(False, 1)
    names = ("environment", "ram_gb", "torch_threads", "load_average_at_start", "started")
    seeds = {"choices": people.SEED, "crowd": bayes.SEED}
    return (
        {"command": f"python benchmarks/personalization.py {args.stage}"}
        | {k: facts[k] for k in names}
        | {"seeds": seeds}
    )


def tell(rows: dict[str, Any]) -> None:
    """A table."""
    columns = [name for name in next(iter(rows.values())) if name != "effective"]
    print(f"| pairs | {' | '.join(columns)} | effective |\n|{'---|' * (len(columns) + 2)}")
    for n, row in rows.items():
        print(f"| {n} | {' | '.join(text(row[c]) for c in columns)} | {row['effective']['min']:.0f} |")


def text(found: dict[str, Any]) -> str:
    """With the interval."""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


# --- the experiment ---------------------------------------------------------------------------------------------------


def experiment(args: argparse.Namespace) -> None:
    """Draw and measure, part after part."""
    silence()
    how = How(steps=args.steps, bf16=args.bf16)
    runs = {"base": None, "impersonal": args.impersonal, "personal": args.personal}
    models = {name: Model(EMOJI / "pipeline", run, how) for name, run in runs.items()}
    models["personal"].scale = args.scale
    studio = Studio(args.folder, models)
    reader = Reader(load_encoder(args.personal))
    known = reader.everyone(people.new_users(args.users))
    plan = Plan(known, people.prompts(args.prompts), studio, scale_of(args))
    report = header(args) | {
        "runs": {k: str(run) for k, run in runs.items()},
        "drawing": vars(how) | {"scale": args.scale},
        "chosen": shown(plan),
    }
    report |= before_pictures(reader, plan, args.crowd)
    after = args.out or RESULTS / f"personalization-{machine()}.json"
    contest = outcomes.Contest(plan, {}, {model: plan.general(model) for model in ("base", "impersonal", "null")})
    for condition in args.conditions:
        part(contest, reader, condition, report)
        write_report(after, report)
        say(f"{condition}: {headline(report)}")
    report["bound"] = beside.bounds(contest, people.held_out(), args.crowd)
    write_report(after, report)
    say(f"numbers: {after}")
    if "4" in contest.right:  # the page is about four pairs
        pictures(plan, contest, report, args.gallery)
        say(f"page: {args.gallery / 'README.md'}")


def scale_of(args: argparse.Namespace) -> Scale:
    """How much is drawn."""
    scale = QUICK if args.quick else FULL
    return replace(scale, every=scale.every | {name: int(n) for name, n in (one.split("=") for one in args.every)})


def shown(plan: Plan) -> dict[str, Any]:
    """How much of everything."""
    couples = [(a.user.user_id, b.user.user_id) for a, b in plan.couples]
    sheet = [plan.people[i].user.user_id for i in on_sheet(plan)]
    counts = {"prompts_of": {c: len(plan.numbers(c)) for c in CONDITIONS}}
    return {"users": len(plan.people), "prompts": len(plan.prompts), "couples": couples, "sheet": sheet} | counts


def before_pictures(reader: Reader, plan: Plan, crowd: int) -> dict[str, Any]:
    """What needs none: predictions, and users found again."""
    of, users = people.held_out(), [one.user for one in plan.people]
    names = of.prompts[of.pairs[:, 0]].tolist()
    ids = [user.user_id for user in users]
    accuracy = {
        n: outcomes.Grid(values, ids, names).measured(mean)
        for n, values in predictions(reader, plan.people, of).items()
    }
    again = {
        str(n): {
            "encoder": outcomes.retrieval(outcomes.retrieved(plan.people, n), ids),
            "bound": beside.recognised(users, n, crowd),
        }
        for n in (4, 16)
    }
    return {"accuracy": accuracy, "retrieval": again, "win_rates": {}}


def part(contest: outcomes.Contest, reader: Reader, name: str, report: dict[str, Any]) -> None:
    """One of the conditions or extras."""
    if name in EXTRAS:
        report[REPORTED[name]] = PARTS[name](contest, reader)
        return
    contest.right[name] = contest.plan.right(name)
    report |= {"impersonal": contest.impersonal(), "nobody": contest.nobody()}
    report["win_rates"][name] = contest.against(name)
    report.setdefault("concept_recognition", {})[name] = contest.fidelity(name)
    pairs = [(more, less) for more, less in ORDER if {more, less} <= contest.right.keys()]
    report["differences"] = {
        f"{more} - {less}": {f"over {rival}": contest.more(more, less, rival) for rival in ("base", "impersonal")}
        for more, less in pairs
    }


ORDER = (("4", "1"), ("16", "4"), ("16", "1"), ("oracle", "16"), ("2", "1"), ("4", "2"), ("8", "4"), ("16", "8"))


def between(contest: outcomes.Contest, reader: Reader) -> dict[str, Any]:
    """The way from one user to another."""
    return outcomes.interpolation(contest.plan, contest.plan.between())


def neighbourhood(contest: outcomes.Contest, reader: Reader) -> dict[str, Any]:
    """RPS."""
    kept = around.drawn(contest.plan, reader)
    return around.outcome(contest.plan, kept, contest.right["4"], contest.general["base"])


def spread(contest: outcomes.Contest, reader: Reader) -> dict[str, Any]:
    """Diversity."""
    return outcomes.diversity(contest.plan, contest.plan.spread(), contest.general)


PARTS: dict[str, Callable[[outcomes.Contest, Reader], dict[str, Any]]] = {
    "between": between,
    "around": neighbourhood,
    "spread": spread,
}
REPORTED = {"between": "interpolation", "around": "rps", "spread": "diversity"}


def headline(report: dict[str, Any]) -> str:
    """Win rates so far."""
    wins = {n: row["over base"] for n, row in report["win_rates"].items()}
    return ", ".join(f"{n} pairs {text(row)}" for n, row in wins.items())


def pictures(plan: Plan, contest: outcomes.Contest, report: dict[str, Any], gallery: Path) -> None:
    """The page, its plots and its sheet."""
    gallery.mkdir(parents=True, exist_ok=True)
    show.figure(report, gallery / "curves.png")
    show.sheet(plan, contest, gallery / "sheet.png", on_sheet(plan), spaced(len(plan.prompts), 8))
    write_whole(gallery / "README.md", page(report))


def on_sheet(plan: Plan) -> list[int]:
    """Users by number, every so-manieth: not the best ones."""
    return list(range(0, len(plan.people), max(len(plan.people) // 8, 1)))[:8]


# --- the command ------------------------------------------------------------------------------------------------------

STAGES = {"bound": before_training, "run": experiment}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--personal", type=Path, default=Path("runs/personal"), help="run with a user adapter")
    parser.add_argument("--impersonal", type=Path, default=Path("runs/quickstart"), help="run with a LoRA alone")
    parser.add_argument("--conditions", nargs="+", default=[*CONDITIONS, *EXTRAS], choices=[*CONDITIONS, *EXTRAS])
    parser.add_argument("--users", type=int, help="the first so many of the 56")
    parser.add_argument("--prompts", type=int, help="the first so many of the 36")
    parser.add_argument("--every", nargs="+", default=[], help="4=2: of the prompts every second, for 4 pairs")
    parser.add_argument("--crowd", type=int, default=bayes.DRAWN, help="users by which the population is stood for")
    parser.add_argument("--steps", type=int, default=16, help="of the sampler")
    parser.add_argument("--scale", type=float, default=1.0, help="of the user adapter")
    parser.add_argument("--bf16", action="store_true", help="draw in bfloat16, all models alike: twice as fast on some")
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that it works")
    parser.add_argument("--folder", type=Path, default=Path("runs/personalization"), help="where pictures are kept")
    parser.add_argument("--gallery", type=Path, default=GALLERY, help="folder of the sheet")
    parser.add_argument("--out", type=Path, help="JSON file; one in benchmarks/results/ if none")
    args = parser.parse_args(argv)
    if "around" in args.conditions and "4" not in args.conditions:
        parser.error("--conditions: around is compared with the pictures of 4 pairs; name 4 as well, before it")
    torch.set_num_threads(1)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
