"""diffpref rank: preferences out of scores."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffpref.commands.arguments import Parser, check_target

COMPARISONS = ("all", "best_worst", "adjacent")  # the keys of the table of that name; its module takes a while to load
BY = ("votes", "majority", "mean")


def parser() -> Parser:
    """Options of diffpref rank."""
    options = Parser(
        "diffpref rank",
        description="Make preferences of scored pictures: those of one prompt are a list, or pairs.",
    )
    add = options.add_argument
    add("scored", type=Path, nargs="+", help="parquet files of diffpref score, or folders of them")
    add("--out", type=Path, required=True, metavar="PARQUET", help="file to write")
    said = "share of the comparisons that a picture wins, over scorers and others; share of the others that most"
    add("--by", choices=BY, default="votes", help=f"{said} scorers put below it; or mean of normalised scores")
    whose = "whose scores (default: what diffpref score recorded; without a record, the one column of fractions)"
    add("--scorers", nargs="+", default=[], metavar="COLUMN", help=whose)
    add("--group-by", nargs="+", default=[], metavar="COLUMN", help="what pictures must share beside their prompt")
    add("--pairs", nargs="?", choices=COMPARISONS, const="best_worst", help="write pairs (best_worst), not lists")
    add("--min-gap", type=gap, default=0.0, metavar="G", help="leave out what differs by less between best and worst")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return options


def gap(text: str) -> float:
    """Of scores."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text!r}")
    return value


def run(arguments: Sequence[str]) -> None:
    """Rank, write, and say what came of it."""
    args = parser().parse_args(arguments)
    check_target(args.out, (".parquet",))
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already; --overwrite replaces it")
    from diffpref.synpic.preferences import check_names, write
    from diffpref.synpic.ranking import Left, rank
    from diffpref.synpic.scored import read_scored
    from diffpref.synpic.summary import lines

    pictures, scorers = read_scored(args.scored, args.scorers)
    check_names(scorers)
    left = Left()
    groups = rank(pictures, scorers, left, by=args.by, columns=args.group_by, min_gap=args.min_gap)
    written = write(rows(groups, scorers, args), args.out)
    print("\n".join(lines(groups, scorers, left, args.by)))
    print(f"written to   {args.out}: {written} {'pairs' if args.pairs else 'lists'}")


def rows(groups: Sequence[Any], scorers: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of the file, as they are written."""
    from tqdm.auto import tqdm

    from diffpref.synpic.preferences import Pictures, list_rows, pair_rows

    bar = tqdm(groups, "writing", unit="group", delay=1)
    if args.pairs:
        return pair_rows(bar, scorers, Pictures(), args.pairs, args.min_gap)
    return list_rows(bar, scorers, Pictures())
