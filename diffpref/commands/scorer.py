"""diffpref scorer: train a preference model, or measure one."""

import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import Parser, check_target, data_arguments, positive, run_action

UNSAID = ("out", "plot", "seed", "by_user")  # options that a report does not repeat
USAGE = """usage: diffpref scorer eval … | diffpref scorer train …

  eval    measure scorers on preferences
  train   train one; the options are those of diffpref/scorer/train.py

diffpref scorer eval --help and diffpref scorer train --help say more."""


def parser() -> Parser:
    """Options of diffpref scorer eval."""
    options = Parser("diffpref scorer eval", description="Measure scorers on preferences of any format and kind.")
    options.add_argument(
        "--model", nargs="+", default=["bundled"], metavar="NAME", help="scorers: names, folders, files (bundled)"
    )
    data_arguments(options, "--data", required=True)
    options.add_argument("--kind", default="auto", choices=("auto", "pairs", "lists", "captions"))
    options.add_argument("--truth", metavar="COLUMN", help="column: probability that the chosen picture is preferred")
    options.add_argument("--aspects", nargs="+", default=[], metavar="COLUMN", help="columns: 1 chosen better, -1, 0")
    options.add_argument("--calibration", metavar="DATA", help="other pairs: they choose the thresholds of ties")
    options.add_argument(
        "--fit-temperature", action="store_true", help="fit it on --calibration, or in-sample without that"
    )
    options.add_argument("--personal", action="store_true", help="judge each choice as its own user would")
    options.add_argument("--prompts-alike", action="store_true", help="each prompt counts the same in the accuracy")
    options.add_argument("--by-user", action="store_true", help="show the users of least accuracy; JSON has all")
    options.add_argument("--batch-size", type=positive, default=32, metavar="N", help="pictures at once (32)")
    options.add_argument("--workers", type=positive, metavar="N", help="threads that open pictures (one a core, to 8)")
    options.add_argument("--device", help="where scorers compute (a GPU if there is one)")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    options.add_argument("--out", type=Path, metavar="JSON", help="write everything there")
    options.add_argument("--plot", type=Path, metavar="PNG", help="draw the reliability there")
    return options


def evaluate(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    args = parser().parse_args(arguments)
    check_target(args.out, (".json",))
    check_target(args.plot, (".png",))
    if len(set(args.model)) < len(args.model):
        raise ValueError(f"--model names a scorer twice: {' '.join(args.model)}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")
    from diffpref.scorer.measures import Resampling  # torch and open_clip: --help should not wait for them
    from diffpref.scorer.outcome import plot, table, write_json

    outcome = measured(args, Resampling(seed=args.seed))
    print(table(outcome, by_user=args.by_user))
    if args.out:
        write_json(args.out, outcome)
        print(f"report: {args.out}")
    if args.plot:
        plot(args.plot, outcome.results)
        print(f"reliability: {args.plot}")


def measured(args: Namespace, resampling: Any) -> Any:
    """The Outcome of these options. Scorers are loaded first: one that is not there should not wait for the others."""
    from diffpref.config import DataConfig
    from diffpref.scorer.evaluation import evaluate, fit, judge
    from diffpref.scorer.evidence import read_evidence
    from diffpref.scorer.measures.pairs import with_winner
    from diffpref.scorer.outcome import Outcome
    from diffpref.scorer.weights import checked_device

    if args.device is not None:
        checked_device(args.device)
    scorers = named({name: loaded(name, args.device) for name in args.model})
    config = DataConfig(args.data, args.split, args.format, args.kind, max_pairs=args.max, aspects=args.aspects)
    evidence = read_evidence(config, args.truth, personal=args.personal)
    with_winner(evidence.label)  # raises now what would be raised when all is scored
    settings = {"batch_size": args.batch_size, "workers": args.workers}
    judgements = [judge(scorer, evidence, name=name, **settings) for name, scorer in scorers.items()]
    if args.calibration:
        other = read_evidence(
            replace(config, path=args.calibration, aspects=[], max_pairs=None), personal=args.personal
        )
        judged = [judge(scorer, other, name=name, **settings) for name, scorer in scorers.items()]
        fits = [fit(one, other, args.calibration, temperature=args.fit_temperature) for one in judged]
    else:
        fits = [fit(one, evidence, "", temperature=args.fit_temperature) for one in judgements]
    results, gaps = evaluate(judgements, evidence, fits, resampling, prompts_alike=args.prompts_alike)
    asked = {name: value for name, value in vars(args).items() if name not in UNSAID}
    return Outcome(asked, evidence, judgements, results, gaps, resampling)


def loaded(name: str, device: str | None) -> Any:
    """A scorer by its name. Raises ValueError, also where its package is not installed."""
    from diffpref.scorer.plugins import load_scorer

    try:
        return load_scorer(name, **({} if device is None else {"device": device}))
    except ImportError as error:
        raise ValueError(str(error)) from error


def named(scorers: dict[str, Any]) -> dict[str, Any]:
    """Scorers by what they are asked for -> by what they are called in tables: one of a folder or file as it calls
    itself, unless another is called so, too."""
    names = {asked: scorer.name if Path(asked).exists() else asked for asked, scorer in scorers.items()}
    known = list(names.values())
    return {name if known.count(name) == 1 else asked: scorers[asked] for asked, name in names.items()}


def train(arguments: Sequence[str]) -> None:
    """Run diffpref/scorer/train.py with these arguments; for several processes use accelerate launch."""
    sys.argv = ["diffpref scorer train", *arguments]
    runpy.run_module("diffpref.scorer.train", run_name="__main__")  # it is a script: imported, it would exist twice


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {"eval": evaluate, "train": train}


def run(arguments: Sequence[str]) -> None:
    """Run one of the two."""
    run_action("diffpref scorer", ACTIONS, USAGE, arguments)
