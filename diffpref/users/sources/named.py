"""Users whom the data name in a column user_id."""

from typing import Any

from datasets import Dataset, IterableDataset

from diffpref.config import Config
from diffpref.data.columns import read_columns
from diffpref.data.groups import NOBODY

COLUMN = "user_id"


def named(user: Any) -> str | None:
    """The name of a group's user, or None for nobody."""
    return None if user is None or user == NOBODY or user != user else str(user)


def users_of(config: Config, rows: Dataset | IterableDataset) -> list[str]:
    """The names of all users of a set, sorted, so that they do not depend on the order of its rows.

    Raises ValueError, with the mend, for a set whose rows name none, and for a stream, whose users nobody knows before
    it has been read.
    """
    who = f"users.source {config.users.source}"
    if isinstance(rows, IterableDataset):
        raise ValueError(f"{who} needs to know all users before training; set data.streaming to false")
    mend = f"{who} needs to know whose rows these are: give {config.data.path} a column {COLUMN}, a name in each row"
    if COLUMN not in rows.column_names:
        raise ValueError(f"{mend}; it has {rows.column_names}")
    if not (names := names_in(rows)):
        raise ValueError(f"{mend}; the column is there, and names nobody")
    return names


def names_in(rows: Dataset) -> list[str]:
    """The names of all users of rows that may have some, sorted."""
    if COLUMN not in rows.column_names:
        return []
    names = {named(values[COLUMN]) for values in read_columns(rows, [COLUMN])} - {None}
    return sorted(str(name) for name in names)


def some(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
