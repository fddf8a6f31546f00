"""diffpref inspect: what is in a set of preferences."""

from collections.abc import Sequence
from pathlib import Path

from diffpref.commands.arguments import Parser, check_target, data_arguments, positive


def parser() -> Parser:
    """Options of diffpref inspect."""
    options = Parser("diffpref inspect", description="Say what is in a set of preferences and draw some of it.")
    data_arguments(options)
    options.add_argument("--kind", default="auto", choices=("auto", "pairs", "lists", "likes", "captions"))
    options.add_argument("--scorers", nargs="+", default=[], metavar="COLUMN", help="columns whose votes decide")
    options.add_argument("--rejected-captions", metavar="HOW", help="rules, shuffle, a file or a function: see README")
    options.add_argument("--streaming", action="store_true", help="read rows as they come; best with --max")
    options.add_argument("--out", type=Path, metavar="PNG", help="write a contact sheet there")
    options.add_argument("--shown", type=positive, default=12, metavar="N", help="rows on the sheet (default: 12)")
    return options


def run(arguments: Sequence[str]) -> None:
    """Print a report, draw a contact sheet."""
    args = parser().parse_args(arguments)
    check_target(args.out, (".png", ".jpg", ".webp"))
    from diffpref.config import DataConfig
    from diffpref.data.source import load_preferences, named_format
    from diffpref.inspection import contact_sheet, report, survey

    config = DataConfig(
        path=args.data,
        split=args.split,
        format=args.format,
        kind=args.kind,
        scorers=args.scorers,
        rejected_captions=args.rejected_captions,
        streaming=args.streaming,
        max_pairs=args.max,
        ties="keep",  # they are counted, not left out
    )
    found = survey(load_preferences(config), config, args.shown)
    print(report(found, config, named_format(config)))
    if args.out:
        contact_sheet(found.sample, found.kind).save(args.out)
        print(f"contact sheet of {len(found.sample)} rows: {args.out}")
