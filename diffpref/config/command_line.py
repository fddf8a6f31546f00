"""YAML file, then dotted overrides on the command line (`--train.learning_rate 1e-4`) -> Config.

Unknown keys, wrong types and impossible values are errors that name the key.
"""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from diffpref.config.limits import validate
from diffpref.config.sections import Config, RunConfig


def config_parser(cls: type[RunConfig]) -> ArgumentParser:
    """The command line of a run."""
    what = (cls.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(prog="train.py", description=what, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(cls, as_group=False)
    return parser


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for f in fields(cls):
        nested = is_dataclass(f.type)
        keys += known_keys(f.type, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


UNKNOWN_KEY = (
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
    r"nrecognized arguments: --([\w.]+)",
)


def explain(error: Exception, cls: type) -> str:
    """A parser's error with, for a key that does not exist, the nearest one that does."""
    message = str(error)
    unknown = next((m for m in (re.search(p, message) for p in UNKNOWN_KEY) if m), None)
    if not unknown:
        return message
    key = ".".join(unknown.groups())
    near = difflib.get_close_matches(key, known_keys(cls), n=1, cutoff=0.5)
    near = near or [k for k in known_keys(cls) if k.endswith("." + key)][:1]
    return f"unknown configuration key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


Run = TypeVar("Run", bound=RunConfig)


def load(argv: Sequence[str] | None, cls: type[Run]) -> Run:
    """Parse a command line into a configuration of this class, unchecked. Raises ValueError, naming the key, for what
    it does not have."""
    parser = config_parser(cls)
    try:
        parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        instance = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(explain(error, cls)) from error
    return cls(**{f.name: getattr(instance, f.name) for f in fields(cls)})


def load_config(argv: Sequence[str] | None = None) -> Config:
    """Parse a command line. Raises ValueError, naming the key, for anything a run cannot use."""
    return validate(load(argv, Config))
