"""diffpref lists-from-pairs: ranked lists out of pairs."""

from collections.abc import Sequence
from pathlib import Path

from diffpref.commands.arguments import Parser, check_target, data_arguments, positive


def parser() -> Parser:
    """Options of diffpref lists-from-pairs."""
    options = Parser(
        "diffpref lists-from-pairs",
        description="Make lists out of pairs: for each prompt, chains of pictures of which each beats the next.",
    )
    data_arguments(options)
    options.add_argument("out", type=Path, help="parquet file to write")
    options.add_argument("--longest", type=positive, default=8, metavar="K", help="pictures in a list (default: 8)")
    options.add_argument("--once", action="store_true", help="only the longest list of each prompt")
    options.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return options


def run(arguments: Sequence[str]) -> None:
    """Write a set of lists."""
    args = parser().parse_args(arguments)
    check_target(args.out, (".parquet",))
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already; --overwrite replaces it")
    if args.longest < 2:
        raise ValueError("--longest must be at least 2: a list of one says nothing")
    from diffpref.config import DataConfig
    from diffpref.data.mining import Mined, mine, write_lists

    config = DataConfig(path=args.data, split=args.split, format=args.format, max_pairs=args.max)
    mined = Mined()
    write_lists(mine(config, mined, args.longest, args.once), args.out)
    print("\n".join(mined.lines()))
    print(f"written to   {args.out}")
