"""What subcommands share: their parser, kinds of arguments, and checks before long work."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake is a ValueError, which the command says in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help says what there is")


def positive(text: str) -> int:
    """A number of things."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def data_arguments(parser: argparse.ArgumentParser, name: str = "data", **settings: Any) -> None:
    """What says which rows are meant; the names are those of the configuration's section data. `name` and `settings`
    are of the argument that says where they are."""
    parser.add_argument(name, help="parquet, JSON or .tar file, folder of them, or hub id", **settings)
    parser.add_argument("--format", default="auto", help="whose columns the set has; auto tells by their names")
    parser.add_argument("--split", default="train", help="which split of it (default: train)")
    parser.add_argument("--max", type=positive, metavar="N", help="look only at the first N rows")


def run_action(
    command: str, actions: dict[str, Callable[[Sequence[str]], object]], usage: str, arguments: Sequence[str]
) -> None:
    """Run one of a command's actions. Raises ValueError for one that it has not."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage)
    elif name in actions:
        actions[name](arguments[1:])
    else:
        raise ValueError(f"{command} has no {name!r}; there are {', '.join(actions)}")


def check_target(path: Path | None, suffixes: Sequence[str]) -> None:
    """Raise before long work what would fail after it."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end with one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {path.name} to")
