"""diffpref user: embeddings of people's tastes."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from diffpref.commands.arguments import Parser, check_target, data_arguments, run_action

USAGE = """usage: diffpref user embed PAIRS … | mix A B … | describe PAIRS … | pick STATES … | train …

  embed     a few pairs of pictures -> the embedding of a taste, with an encoder
  mix       two embeddings -> one between them
  describe  the same pairs -> what a vision-language model has in mind of their user
  pick      one user of a file that describe wrote -> their embedding
  train     train an encoder of users; the options are those of diffpref/users/meta/train.py

diffpref user embed --help and so on say more. `diffpref sample --user me.safetensors` draws for a user."""

SUFFIXES = (".safetensors",)


def embed_parser() -> Parser:
    """Options of diffpref user embed."""
    options = Parser("diffpref user embed", description="Make the embedding of a user out of a few of their choices.")
    data_arguments(options, "pairs", metavar="PAIRS")
    options.add_argument("--encoder", required=True, metavar="FOLDER", help="of an encoder, or of a run that used one")
    options.add_argument("--whose", metavar="USER", help="whose choices (column user_id), where there are several's")
    options.add_argument("--name", default="", help="what the embedding is called in messages")
    out_arguments(options)
    return options


def mix_parser() -> Parser:
    """Options of diffpref user mix."""
    options = Parser("diffpref user mix", description="Make a user between two: their directions are turned.")
    options.add_argument("first", type=Path, help="embedding of a user")
    options.add_argument("second", type=Path, help="embedding of another user, made with the same encoder")
    options.add_argument("--amount", type=float, default=0.5, metavar="A", help="0 the first, 1 the second (0.5)")
    out_arguments(options)
    return options


def out_arguments(options: Parser) -> None:
    """Where an embedding goes."""
    options.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    options.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def check_out(path: Path, overwrite: bool) -> None:
    """Raise before the work what would fail after it."""
    check_target(path, SUFFIXES)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; --overwrite replaces it")


def embed(arguments: Sequence[str]) -> None:
    """Read pairs, encode, write."""
    args = embed_parser().parse_args(arguments)
    check_out(args.out, args.overwrite)
    from diffpref.config import DataConfig
    from diffpref.users.few_shot import embedding_of, load_encoder, read_pairs

    # a row that cannot be used is an error: of four pairs, three would be another person
    config = DataConfig(args.pairs, args.split, args.format, max_pairs=args.max, faults="raise")
    user = embedding_of(read_pairs(config, args.whose), load_encoder(args.encoder), args.name)
    user.save(args.out)
    print(f"{user.pairs} choice{'s' if user.pairs > 1 else ''} -> {args.out} (width {user.width}, of {user.encoder})")


def mix(arguments: Sequence[str]) -> None:
    """Read two, mix, write."""
    args = mix_parser().parse_args(arguments)
    check_out(args.out, args.overwrite)
    from diffpref.users.embedding import UserEmbedding

    first, second = (UserEmbedding.load(path) for path in (args.first, args.second))
    first.mix(second, args.amount).save(args.out)
    print(f"{1 - args.amount:g} {args.first} + {args.amount:g} {args.second} -> {args.out}")


def pick_parser() -> Parser:
    """Options of diffpref user pick."""
    options = Parser("diffpref user pick", description="Take a user out of the file of many that describe writes.")
    options.add_argument("states", metavar="STATES", help=".safetensors file of diffpref user describe")
    options.add_argument("--whose", metavar="USER", help="which user, where there are several")
    options.add_argument("--set", type=int, default=0, metavar="N", help="by which set of their pairs (0)")
    out_arguments(options)
    return options


def pick(arguments: Sequence[str]) -> None:
    """Read many, write one."""
    args = pick_parser().parse_args(arguments)
    check_out(args.out, args.overwrite)
    from diffpref.users.vlm import as_embedding, read_states

    states = read_states(args.states)
    if args.whose is None and len(states.users) > 1:
        raise ValueError(f"{args.states} holds {len(states.users)} users; --whose says which one")
    try:
        user = as_embedding(states, args.whose or states.users[0], args.set)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    user.save(args.out)
    print(f"{user.name}, {len(user.states)} vectors of width {user.width} -> {args.out}")


def describe(arguments: Sequence[str]) -> None:
    """Ask a vision-language model."""
    from diffpref.users.vlm import describe as ask

    ask(arguments)


def train(arguments: Sequence[str]) -> None:
    """Run diffpref/users/meta/train.py with these arguments."""
    sys.argv = ["diffpref user train", *arguments]
    runpy.run_module("diffpref.users.meta.train", run_name="__main__")  # a script, as diffpref/scorer/train.py


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "embed": embed,
    "mix": mix,
    "describe": describe,
    "pick": pick,
    "train": train,
}


def run(arguments: Sequence[str]) -> None:
    """Run one of them."""
    run_action("diffpref user", ACTIONS, USAGE, arguments)
