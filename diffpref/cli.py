"""The command `diffpref`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A subcommand: the module in diffpref.commands whose function `run` takes its arguments, and a line of help."""

    module: str
    help: str

    @property
    def run(self) -> Callable[[Sequence[str]], None]:
        """Imported when it is called for: --help should not wait for the others."""
        return import_module(f"diffpref.commands.{self.module}").run


COMMANDS = {
    "train": Command("train", "tune a model; the options are those of diffpref/train.py"),
    "inspect": Command("inspect", "say what is in a set of preferences and draw some of it"),
    "lists-from-pairs": Command("lists_from_pairs", "make ranked lists out of pairs"),
    "sample": Command("sample", "draw pictures with several pipelines, to be ranked"),
    "score": Command("score", "score pictures with preference models"),
    "rank": Command("rank", "make preferences out of scores"),
    "user": Command("user", "read a taste from a few choices: user embed, mix, describe, train"),
    "scorer": Command("scorer", "train a preference model, or measure one: scorer train, scorer eval"),
}


def usage() -> str:
    """What there is."""
    lines = [f"  {name:<18}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: diffpref COMMAND …", "", *lines, "", "diffpref COMMAND --help says more."])


def main() -> None:
    """Run a subcommand; a user's mistake is one clear line, not a traceback."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        return
    try:
        if name not in COMMANDS:
            raise ValueError(f"no command is called {name!r}; there are {', '.join(COMMANDS)}")
        COMMANDS[name].run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
