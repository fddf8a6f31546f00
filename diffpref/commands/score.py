"""diffpref score: pictures -> scores."""

import os
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import Parser, check_target, positive

SUFFIXES = (".parquet", ".csv", ".jsonl")
DESCRIPTION = """Score pictures, each with its prompt, with one or several preference models.

IMAGES are picture files, globs, folders (with the folders in them, sorted by name), parquet files with a column of
pictures (what `diffpref sample` writes), webdataset shards (17.jpg with 17.txt or 17.json), or "-": lines from standard
input, a path, a tab and a prompt, or JSON objects with image and prompt.

The prompt of a picture comes from --prompts, from its row (prompt, caption or text), from the text file beside it
(17.txt beside 17.png), or from metadata.jsonl or metadata.csv in the folder that was named. Where two differ it is an
error.

--out holds a row for each picture, in order: path (or file and row, or file and key), prompt, the other columns of its
row, a column for each model, and error: why it has no score. It is written as it comes, to OUT.unfinished; after a
crash or Ctrl-C the same command goes on from there. A file OUT that is there is not replaced without --overwrite.
Columns that hold bytes go there only with --keep-images. A parquet file also says which of its columns are scores,
those of an earlier run among them: `diffpref rank` asks these."""


def parser() -> Parser:
    """Options of diffpref score."""
    options = Parser("diffpref score", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("images", nargs="+", metavar="IMAGES")
    options.add_argument(
        "--prompts",
        metavar="TEXT|FILE",
        help="one prompt for all; or a .txt file with one line a picture, in order; or a .jsonl or .csv file with "
        "file_name and prompt",
    )
    options.add_argument(
        "--model",
        nargs="+",
        default=["bundled"],
        metavar="MODEL",
        help="names of scorers or folders of them (default: bundled); NAME=MODEL says what its column is called",
    )
    options.add_argument("--out", type=Path, metavar="FILE", help=".parquet, .csv or .jsonl; else the best are shown")
    options.add_argument("--shown", type=positive, default=20, metavar="N", help="rows shown (default: 20)")
    options.add_argument("--keep-images", action="store_true", help="copy the pictures into the parquet file")
    options.add_argument("--batch-size", type=positive, default=32, metavar="N", help="judged at once (default: 32)")
    options.add_argument(
        "--workers", type=whole, metavar="N", help="threads that open pictures (default: one a core, at most 8)"
    )
    options.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU, if there is one)")
    options.add_argument("--fresh", action="store_true", help="throw away what an unfinished run has left")
    options.add_argument("--overwrite", action="store_true", help="replace a file OUT that is there")
    options.add_argument("--no-sidecars", action="store_true", help="do not look for prompts beside pictures")
    options.add_argument("--image-column", metavar="NAME", help="pictures' column in parquet files and shards")
    options.add_argument("--prompt-column", metavar="NAME", help="prompts' column in parquet files and shards")
    return options


def whole(text: str) -> int:
    """A number of things, or none."""
    if not text.isdigit():
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def run(arguments: Sequence[str]) -> None:
    """Score; print a summary."""
    args = parser().parse_args(arguments)
    check_target(args.out, SUFFIXES)
    if args.keep_images and (args.out is None or args.out.suffix != ".parquet"):
        raise ValueError("--keep-images: only parquet files hold pictures; --out must end with .parquet")
    models = named(args.model)
    from diffpref.scoring.prompts import said, with_prompts
    from diffpref.scoring.run import Plan, check, refuse_to_replace, score_all
    from diffpref.scoring.sources import Reading, sources

    refuse_to_replace(args.out, args.overwrite)
    place = str(args.out) if args.out else None
    reading = Reading(args.image_column, args.prompt_column, args.keep_images, not args.no_sidecars, place)
    found, given = sources(args.images, reading), said(args.prompts) if args.prompts is not None else None
    total, prompted = check(found, given)
    scorers = load(models, {"device": args.device} if args.device else {})
    if not prompted and any(scorer.needs_prompt for scorer in scorers.values()):
        raise ValueError("no picture has a prompt; --help says where they come from")
    plan = Plan(
        out=args.out,
        batch_size=args.batch_size,
        workers=min(os.cpu_count() or 1, 8) if args.workers is None else args.workers,
        keep=args.keep_images,
        request=request(args, models),
        fresh=args.fresh,
        overwrite=args.overwrite,
        shown=args.shown,
        carried=found.scores(),
    )
    score_all(with_prompts(found.items(), given), total, scorers, plan)


def named(models: Sequence[str]) -> list[tuple[str | None, str]]:
    """NAME=MODEL -> its two halves; a model alone has no name yet. Raises ValueError for one that is said twice."""
    pairs = [halves(text) for text in models]
    for texts in ([name for name, _ in pairs if name is not None], [model for name, model in pairs if name is None]):
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"--model: {twice[0]} is there twice")
    return pairs


def halves(text: str) -> tuple[str | None, str]:
    """NAME=MODEL, unless all of it is a path."""
    name, sign, model = text.partition("=")
    return (name, model) if sign and not os.path.exists(text) else (None, text)


def load(models: Sequence[tuple[str | None, str]], options: dict[str, Any]) -> dict[str, Any]:
    """Scorers by the names of their columns; `options` go to what loads them. ValueError: two columns of one name."""
    from diffpref.scorer.plugins import load_scorer
    from diffpref.scoring.columns import KINDS
    from diffpref.scoring.judging import IMAGE

    scorers: dict[str, Any] = {}
    for name, model in models:
        try:
            scorer = load_scorer(model, **options)
        except ImportError as error:  # of a package that this scorer needs
            raise ValueError(f"--model {model}: {error}") from error
        name = name or scorer.name
        if name in (*scorers, *KINDS, IMAGE):
            raise ValueError(f"--model: the column {name} is taken; --model NAME={model} gives it another name")
        scorers[name] = scorer
    return scorers


def request(args: Any, models: Sequence[tuple[str | None, str]]) -> dict[str, Any]:
    """What must be the same for a run to go on with what another began. Prompts and pictures are compared by name."""
    return {
        "models": [[name, model, stamps(model)] for name, model in models],
        "columns": [args.image_column, args.prompt_column],
        "pictures kept": args.keep_images,
    }


def stamps(model: str) -> list[list[Any]]:
    """Sizes and times of a model's files, where it lies here: another model may take their place."""
    path = Path(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
