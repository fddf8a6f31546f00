"""Syn-Pic in the small world: two pipelines draw, three scorers vote, RankDPO learns from their votes.

    python benchmarks/synpic.py            what is there already is not made again; --fresh begins anew
    python benchmarks/synpic.py --quick    shows that it works

    tuned      the quickstart's run, a quarter as long: the second pipeline
    users_a    affine heads on the bundled scorer's towers, each fitted to the choices of half of the users: they and
    users_b    the bundled scorer are the three that vote
    rankdpo    configs/synpic_rankdpo.yaml on lists of four pictures of each pipeline
    base_only  the same on the base's own four: what is learnt from votes alone, and not from better pictures

All from the concepts that preferences are trained on; the win rates are of the others, in pictures of seeds of their
own. The truth is looked at once the lists are written, to say how well the scorers know it.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from data import machine, say
from PIL import Image
from worlds import EMOJI, REPOSITORY

from diffpref.commands import inspect, rank, sample, score
from diffpref.config import load_config
from diffpref.data.pictures import open_picture
from diffpref.emoji_world.artwork import caption, load_artwork, split_concepts
from diffpref.emoji_world.classifier import concept_recognition
from diffpref.emoji_world.users import TRAIN, majority_utility
from diffpref.figures import before_after
from diffpref.report import environment, write_report, write_whole
from diffpref.scorer.config import load_scorer_config
from diffpref.scorer.measures.lists import list_measures
from diffpref.scorer.trainer import ScorerTrainer
from diffpref.synpic.ranking import Left, reasons
from diffpref.synpic.ranking import rank as rank_pictures
from diffpref.synpic.scored import Scored, read_scored
from diffpref.synpic.summary import agreement, wins_of
from diffpref.trainer import Trainer
from diffpref.winrate import win_rate

CONFIGS, BASE, PAIRS = REPOSITORY / "configs", EMOJI / "pipeline", EMOJI / "preferences" / "pairs.parquet"
GALLERY, RESULTS = REPOSITORY / "gallery" / "synpic", REPOSITORY / "benchmarks" / "results"
FIRST = 1000  # seed of what the win rates are of
SCORERS, HALVES = ("bundled", "users_a", "users_b"), {"users_a": (0, TRAIN // 2), "users_b": (TRAIN // 2, TRAIN)}


@dataclass(frozen=True)
class Scale:
    """How much is drawn and trained. prompts: of those there are, None for all.  seeds: of each pipeline and prompt.
    sampler: its steps.  tuned, heads, rankdpo: training steps.  images: of a prompt, for the win rates.  model: the
    scorer to begin with."""

    folder: Path
    prompts: int | None = None
    seeds: int = 4
    sampler: int = 16
    tuned: int = 60
    heads: int = 400
    rankdpo: int = 40
    images: int = 4
    model: str = "bundled"


# --- stages: each leaves one file, and is not run where that is -----------------------------------------------------


def once(path: Path, make: Callable[[], object]) -> Path:
    """The file, made if it is not there."""
    if not path.exists():
        say(f"making {path}")
        make()
    return path


def diffusion_run(scale: Scale, name: str, config: str, steps: int, *more: str) -> Path:
    """A training run's report; one that was stopped goes on. Pictures are drawn later, of all runs together."""
    line = ["--config", str(CONFIGS / config), "--name", name, "--output_dir", str(scale.folder), *more]
    line += ["--train.max_train_steps", str(steps), "--train.checkpointing_steps", "20"]
    line += ["--train.resume_from_checkpoint", "latest", "--sample.prompts", "[]", "--sample.validation_steps", "0"]
    line += ["--judge.judge", "null", "--judge.measures", "{}"]
    return once(scale.folder / name / "report.json", lambda: Trainer(load_config(line)).run())


def half_of_users(scale: Scale, name: str) -> Path:
    """The choices of some of the users."""
    first, end = HALVES[name]
    table = pq.read_table(PAIRS)
    chosen = pc.and_(pc.greater_equal(table["user_id"], first), pc.less(table["user_id"], end))
    path = scale.folder / f"{name}.parquet"
    return once(path, lambda: pq.write_table(table.filter(chosen), path))


def scorer_run(scale: Scale, name: str) -> Path:
    """A head on the bundled scorer's towers; the folder of the result."""
    line = ["--name", name, "--output_dir", str(scale.folder), "--data.path", str(half_of_users(scale, name))]
    line += ["--model.pretrained_model_name_or_path", scale.model, "--head.name", "affine", "--data.num_workers", "0"]
    line += [
        "--train.max_train_steps",
        str(scale.heads),
        "--train.train_batch_size",
        "64",
        "--train.learning_rate",
        "3e-3",
    ]
    line += ["--cache.folder", str(scale.folder / "cache"), "--train.resume_from_checkpoint", "latest"]
    once(scale.folder / name / "report.json", lambda: ScorerTrainer(load_scorer_config(line)).run())
    return scale.folder / name / "scorer"


def draw(scale: Scale, name: str, runs: Sequence[str], prompts: Path, seeds: str) -> Path:
    """diffpref sample: pictures of the base and of the base with the adapters of some runs."""
    line = ["--pipeline", *(f"{name}={BASE}" for name in ("base", *runs)), "--prompts", str(prompts)]
    line += ["--lora", *(f"{name}={scale.folder / name}" for name in runs), "--seeds", seeds, "--guidance", "1.5"]
    line += ["--steps", str(scale.sampler), "--batch-size", "24", "--out", str(scale.folder / name)]
    sample.run(line)
    return scale.folder / name


def prompts(scale: Scale, name: str, held_out: bool) -> Path:
    """A file of the concepts that preferences are trained on, or of the others."""
    path = scale.folder / f"{name}.txt"
    concepts = split_concepts(load_artwork().concepts)[held_out][: scale.prompts]
    path.write_text("\n".join(caption(concept) for concept in concepts) + "\n")
    return path


def judge(scale: Scale, pictures: Path) -> Path:
    """diffpref score, by all scorers at once."""
    models = [f"bundled={scale.model}", *(f"{name}={scorer_run(scale, name)}" for name in HALVES)]
    out = scale.folder / "scored.parquet"
    return once(out, lambda: score.run([str(pictures), "--model", *models, "--out", str(out)]))


def vote(scale: Scale, scored: Path, name: str) -> Path:
    """diffpref rank, by votes as RankDPO's."""
    line = [str(scored), "--scorers", *SCORERS, "--by", "votes", "--out"]
    path = scale.folder / f"{name}.parquet"
    return once(path, lambda: rank.run([*line, str(path)]))


def of_base(scale: Scale, scored: Path) -> Path:
    """The rows of the base's own pictures."""
    path, table = scale.folder / "scored-base.parquet", pq.read_table(scored)
    return once(path, lambda: pq.write_table(table.filter(pc.equal(table["pipeline"], "base")), path))


# --- numbers --------------------------------------------------------------------------------------------------------


def drawn(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> a row of the shards, with its picture opened."""
    shards = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    return {row["key"]: row | {"image": open_picture(row["image"])} for shard in shards for row in shard}


def truths(folder: Path) -> dict[str, float]:
    """Key -> the majority's true utility of a picture, which neither scorers nor training saw."""
    rows = drawn(folder)
    values = majority_utility([row["image"] for row in rows.values()], [row["prompt"] for row in rows.values()])
    return dict(zip(rows, values.tolist(), strict=True))


@dataclass(frozen=True)
class Drawn:
    """The pictures of one pipeline, in an order that is the same for all. scores, recognised: of each."""

    images: list[Image.Image]
    prompts: list[str]
    scores: np.ndarray
    recognised: float


def by_pipeline(folder: Path) -> dict[str, Drawn]:
    """Judged pictures by pipeline."""
    together: dict[str, list[dict[str, Any]]] = {}
    for row in drawn(folder).values():
        together.setdefault(row["pipeline"], []).append(row)
    found = {}
    for name, rows in together.items():
        images, said = [row["image"] for row in rows], [row["prompt"] for row in rows]
        recognised = float(np.mean(concept_recognition(images, said)))
        found[name] = Drawn(images, said, majority_utility(images, said), recognised)
    return found


def verdicts(evaluated: dict[str, Drawn]) -> dict[str, dict[str, Any]]:
    """Win rates against the base of all the others, seed by seed."""
    base = evaluated["base"]
    return {
        name: {
            "win_rate": win_rate(one.scores, base.scores, one.prompts).as_dict(),
            "gain": float((one.scores - base.scores).mean() / base.scores.std()),
            "concept_recognition": {"before": base.recognised, "after": one.recognised},
        }
        for name, one in evaluated.items()
        if one is not base
    }


def knowledge(pictures: list[Scored], truth: dict[str, float]) -> dict[str, Any]:
    """Kendall's tau-b with the truth of each scorer and of their votes, over prompts."""
    left = Left()
    groups = rank_pictures(pictures, SCORERS, left)
    known = [np.array([truth[one.about["key"]] for one in group.pictures]) for group in groups]
    said = {name: [np.array(group.table[i]) for group in groups] for i, name in enumerate(SCORERS)}
    said["votes"] = [np.array(group.scores) for group in groups]
    names = {"prompt": [group.pictures[0].prompt for group in groups]}
    taus = {
        name: list_measures(list(zip(scores, known, strict=True)), names)["Kendall tau-b"].as_dict()
        for name, scores in said.items()
    }
    between = {f"{a}, {b}": {"value": tau, "n": n} for (a, b), (tau, n) in agreement(groups, SCORERS).items()}
    best = {"votes": wins_of(groups), "groups": len(groups), "left_out": reasons(left)}
    return {"truth": taus, "agreement": between, "best": best}


def numbers(scale: Scale, scored: Path, evaluated: dict[str, Drawn], quick: bool) -> dict[str, Any]:
    """All of them, for JSON."""
    every, _ = read_scored([scored], SCORERS)
    won, kept = verdicts(evaluated), ("steps", "groups_seen", "groups_in_set", "seconds")
    reports = {name: json.loads((scale.folder / name / "report.json").read_text()) for name in (*won, *HALVES)}
    return {
        "command": "python benchmarks/synpic.py" + " --quick" * quick,
        "environment": environment(),
        "pictures": len(every),
        "prompts": len({one.prompt for one in every}),
        "seeds": scale.seeds,
        **knowledge(every, truths(scale.folder / "pictures")),
        "heads": {name: reports[name]["after"]["accuracy"] for name in HALVES},
        "runs": {name: said | {key: reports[name][key] for key in kept} for name, said in won.items()},
    }


# --- the page -------------------------------------------------------------------------------------------------------

WORDS = {
    "tuned": "the second pipeline: Diffusion-DPO on the users' pairs",
    "rankdpo": "RankDPO from the base, on both pipelines' pictures",
    "base_only": "RankDPO from the base, on the base's own pictures",
}


def interval(value: dict[str, Any], digits: int = 2) -> str:
    """A number with its interval."""
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def run_line(name: str, run: dict[str, Any]) -> str:
    """A row of the table of runs."""
    rate, concept = run["win_rate"], run["concept_recognition"]
    return (
        f"| `{name}`: {WORDS[name]} | {run['steps']} steps, {run['groups_in_set']} in the set | {interval(rate)} |"
        f" {rate['n']} | {rate['ties']} | {run['gain']:+.2f} | {concept['before']:.2f} → {concept['after']:.2f} |"
    )


def page(found: dict[str, Any]) -> str:
    """gallery/synpic/README.md, from the numbers alone."""
    best, runs = found["best"], found["runs"]
    won = ", ".join(f"{name} {share:.2f}" for name, share in best["votes"].items())
    known = {name: found["truth"][name] for name in (*SCORERS, "votes")}
    taus = [f"| {name} | {interval(tau)} | {tau['n']} |" for name, tau in known.items()]
    agree = "; ".join(f"{pair} {tau['value']:.2f}" for pair, tau in found["agreement"].items())
    heads = ", ".join(f"{name} {interval(a)} (n={a['n']})" for name, a in found["heads"].items())
    return f"""# Synthetic preferences: two pipelines, three scorers, RankDPO

Made by `{found["command"]}` from the JSON in benchmarks/results; not written by hand.

![before and after](before_after.png)

Syn-Pic (Karthik et al. 2024) by this library's commands: `diffpref sample` draws {found["pictures"]} pictures,
{found["seeds"]} of each of two pipelines for {found["prompts"]} prompts; `diffpref score` has three scorers judge them;
`diffpref rank` makes lists with vote fractions of them; `configs/synpic_rankdpo.yaml` trains on the lists. No person,
simulated or not, looks at these pictures.

There are people behind it all the same: the bundled scorer was trained on choices of the simulated users, the second
pipeline on others of theirs. `users_a` and `users_b` are affine heads on the bundled scorer's own towers, each fitted
to the pairs of half of the users: three views, but not independent ones. Accuracy on pairs of prompts held out:
{heads}.

## Does it work?

Win rate over the base on 36 concepts of which there was no preference and no picture; judge: the simulated majority's
true utility. Intervals: 95 %, bootstrap over prompts. One seed. `base_only` shows what the votes teach without better
pictures. Gain: of the mean utility, in standard deviations of the base's pictures.

| run | trained | win rate vs base | n | ties | gain | concept recognised |
|---|---|---|---|---|---|---|
{chr(10).join(run_line(name, runs[name]) for name in WORDS)}

## Do the scorers know the taste?

Kendall's tau-b between a scorer's order of the {2 * found["seeds"]} pictures of a prompt and that of the truth, mean
over prompts.

| | tau-b with the truth | prompts |
|---|---|---|
{chr(10).join(taus)}

With one another: {agree}.

The best picture of a prompt, by votes: {won} of {best["groups"]} lists ({best["left_out"]}).

![lists, as diffpref inspect shows them](lists.png)

Hardware: {found["environment"]["hardware"]}, shared with other work.
"""


def show(scale: Scale, found: dict[str, Any], evaluated: dict[str, Drawn], gallery: Path) -> None:
    """The page and its pictures."""
    gallery.mkdir(parents=True, exist_ok=True)
    base, after, rate = evaluated["base"], evaluated["rankdpo"], found["runs"]["rankdpo"]["win_rate"]
    before_after(
        base.images,
        after.images,
        base.prompts,
        gallery / "before_after.png",
        scores=(base.scores, after.scores),
        title="RankDPO on synthetic preferences",
        subtitle=f"win rate against the base {interval(rate)}, n={rate['n']}",
    )
    inspect.run([str(scale.folder / "lists.parquet"), "--out", str(gallery / "lists.png"), "--shown", "8"])
    write_whole(gallery / "README.md", page(found))


# --- the whole ------------------------------------------------------------------------------------------------------


def everything(scale: Scale) -> tuple[Path, dict[str, Drawn]]:
    """From the base to scores, preferences, and judged pictures of every run."""
    scale.folder.mkdir(parents=True, exist_ok=True)
    diffusion_run(scale, "tuned", "quickstart.yaml", scale.tuned)
    trained_on, others = prompts(scale, "prompts", held_out=False), prompts(scale, "held_out", held_out=True)
    scored = judge(scale, draw(scale, "pictures", ["tuned"], trained_on, str(scale.seeds)))
    lists = {"rankdpo": vote(scale, scored, "lists"), "base_only": vote(scale, of_base(scale, scored), "lists-base")}
    for name, path in lists.items():
        diffusion_run(scale, name, "synpic_rankdpo.yaml", scale.rankdpo, "--data.path", str(path))
    seeds = f"{FIRST}-{FIRST + scale.images - 1}"
    return scored, by_pipeline(draw(scale, "evaluation", ["tuned", *lists], others, seeds))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few pictures and steps, into --folder/quick")
    parser.add_argument("--fresh", action="store_true", help="throw away what is there")
    parser.add_argument("--model", default="bundled", help="the scorer to begin with: bundled, or a folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/synpic"), help="where everything is kept")
    args = parser.parse_args(argv)
    small = {"prompts": 6, "seeds": 2, "sampler": 2, "tuned": 2, "heads": 4, "rankdpo": 2, "images": 1}
    scale = Scale(
        args.folder / "quick" if args.quick else args.folder, model=args.model, **(small if args.quick else {})
    )
    if args.fresh:
        shutil.rmtree(scale.folder, ignore_errors=True)
    scored, evaluated = everything(scale)
    found = numbers(scale, scored, evaluated, args.quick)
    out = scale.folder / "synpic.json" if args.quick else RESULTS / f"synpic-{machine()}.json"
    write_report(out, found)
    show(scale, json.loads(out.read_text()), evaluated, scale.folder / "gallery" if args.quick else GALLERY)
    say(f"numbers: {out}")


if __name__ == "__main__":
    main()
