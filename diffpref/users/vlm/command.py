"""diffpref user describe: users' pairs -> what a vision-language model makes of them."""

from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from diffpref.commands.arguments import Parser, check_target, data_arguments, positive

SUFFIXES = (".safetensors",)
PAIRS = range(2, 9)  # fewer say little, and more are beyond what most models were trained with
DESCRIPTION = """Show a vision-language model a few pairs of each user; keep its hidden states (PPD, arXiv 2501.06655).

PAIRS have a prompt, a chosen and a rejected picture, and user_id; without that column all are one user's. Each user is
shown with --pairs of their pairs, drawn at random; with --sets several times, with other pairs each time.

--out holds states [L,U] for each: of the embeddings and of every layer, at the last token of a profile that the model
writes, or with --tokens 0 of the prompt, which is far cheaper. It also holds the profiles. It is made as it comes, in
OUT.unfinished; after a crash or Ctrl-C the same command goes on from there, and also from a finished file where PAIRS
have come to hold more users, or --sets is more."""


def parser() -> Parser:
    """Options of diffpref user describe."""
    options = Parser("diffpref user describe", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    data_arguments(options, "data", metavar="PAIRS")
    add = options.add_argument
    add("--model", required=True, help="folder or hub id, such as llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    add("--revision", help="branch, tag or commit of it on the hub")
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors")
    add("--pairs", type=few, default=4, metavar="N", help=f"shown at once, {PAIRS[0]} to {PAIRS[-1]} (default: 4)")
    add("--sets", type=positive, default=1, metavar="N", help="sets of pairs of a user, none in two (default: 1)")
    add("--tokens", type=int, default=512, metavar="N", help="of a profile at most; 0: none is written (default: 512)")
    add("--user", default="me", metavar="NAME", help="whose pairs they are, without user_id (default: me)")
    add("--seed", type=int, default=0, help="of the draw of pairs (default: 0)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's")
    add("--device", help="such as cuda:1 or cpu (default: a GPU, if there is one)")
    add("--overwrite", action="store_true", help="begin anew, whatever is there")
    return options


def few(text: str) -> int:
    """Pairs that are shown at once."""
    if not text.isdigit() or int(text) not in PAIRS:
        raise ArgumentTypeError(f"must be a number from {PAIRS[0]} to {PAIRS[-1]}, got {text!r}")
    return int(text)


def describe(arguments: Sequence[str]) -> None:
    """Describe; print what came of it. Raises ValueError where nobody could be described."""
    args = parser().parse_args(arguments)
    check_target(args.out, SUFFIXES)
    if args.tokens < 0:
        raise ValueError(f"--tokens must not be negative, got {args.tokens}")
    from diffpref.config import DataConfig  # torch and transformers: --help should not wait for them
    from diffpref.users.vlm.describer import load_describer
    from diffpref.users.vlm.pairs import ask
    from diffpref.users.vlm.run import Made, describe_all, summary

    config = DataConfig(args.data, args.split, args.format, "pairs", max_pairs=args.max)
    asked = ask(config, args.user, pairs=args.pairs, sets=args.sets, seed=args.seed)
    for line in asked.left.lines(args.pairs):
        print(line, flush=True)
    describer = load_describer(args.model, args.revision, tokens=args.tokens, dtype=args.dtype, device=args.device)
    facts = describer.facts | {"pairs": args.pairs, "seed": args.seed}
    with Made(args.out, facts, args.overwrite) as made:
        outcome = describe_all(asked, describer, made, args.data)
        made.finish([(chunk.user, chunk.number) for chunk in asked.chunks])
    print("\n".join(summary(made, outcome)))
