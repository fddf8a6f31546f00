"""Which pairs stand for which user."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from diffpref.config import DataConfig
from diffpref.data.checks import is_filter, look
from diffpref.data.columns import read_columns
from diffpref.data.kinds import Row
from diffpref.data.pictures import open_picture, read_bytes
from diffpref.data.source import load_preferences

T = TypeVar("T")
SIDES = ("chosen", "rejected")
SHOWN = 5  # users and faults that a message names


@dataclass(frozen=True)
class Shown:
    """A pair of pictures under a caption, as the model is shown it."""

    caption: str
    preferred: Image.Image
    dispreferred: Image.Image


@dataclass(frozen=True)
class Chunk:
    """A set of pairs of one user: the numbers of their rows. `number` says which of the user's sets, from 0; no two
    share a pair."""

    user: str
    number: int
    rows: tuple[int, ...]


@dataclass
class Left:
    """What is not asked: users with fewer pairs than needed, rows with a fault, rows that name nobody.

    short: user -> usable pairs.  faults: row -> why it cannot be used.  owners: row with a fault -> its user.
    """

    short: dict[str, int] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    nobody: int = 0

    def lines(self, pairs: int) -> list[str]:
        """All of it in words."""
        users = some(f"{user} ({number})" for user, number in self.short.items())
        faults = some(f"{self.owners[row]}, row {row}: {text}" for row, text in self.faults.items())
        said = {
            f"{len(self.short)} users with fewer than {pairs} usable pairs: {users}": self.short,
            f"{len(self.faults)} pairs that cannot be used: {faults}": self.faults,
            f"{self.nobody} pairs that name no user": self.nobody,
        }
        return [f"left out: {line}" for line, there in said.items() if there]


@dataclass(frozen=True)
class Asked:
    """The sets of pairs to be shown, out of rows of which nothing is decoded yet."""

    rows: Dataset
    chunks: list[Chunk]
    left: Left

    def read(self, chunk: Chunk, what: Callable[[Row], T]) -> list[T]:
        """What `what` makes of each row of a set. Raises ValueError that names the row."""
        made = []
        for number in chunk.rows:
            try:
                made.append(what(self.rows[number]))
            except (ValueError, OSError) as error:
                raise ValueError(f"row {number}, {error}") from error
        return made


def ask(config: DataConfig, nobody: str, *, pairs: int = 4, sets: int = 1, seed: int = 0) -> Asked:
    """Up to `sets` sets of so many pairs of each user, drawn without replacement. `nobody` is the user of data that
    have no column user_id.

    Raises FileNotFoundError or ValueError as `load_preferences`, and ValueError for what has no pairs and where no user
    has enough of them.
    """
    rows, left = load_preferences(config), Left()
    if not isinstance(rows, Dataset) or not {"prompt", *SIDES} <= set(rows.column_names):
        raise ValueError(f"{config.path} holds no pairs: rows with prompt, chosen and rejected")
    owned = by_user(rows, config, nobody, left)
    left.short = {user: len(numbers) for user, numbers in owned.items() if len(numbers) < pairs}
    chunks = [chunk for user, numbers in owned.items() for chunk in cut(user, numbers, pairs, sets, seed)]
    if not chunks:
        raise ValueError("\n".join([f"{config.path}: no user has {pairs} usable pairs", *left.lines(pairs)]))
    return Asked(rows, chunks, left)


def by_user(rows: Dataset, config: DataConfig, nobody: str, left: Left) -> dict[str, list[int]]:
    """User -> numbers of usable rows. Ties are left out in silence, faults are noted."""
    owned: dict[str, list[int]] = defaultdict(list)
    users: Iterable[Any] = [nobody] * len(rows)
    if "user_id" in rows.column_names:
        users = (values["user_id"] for values in read_columns(rows, ["user_id"]))
    bar = tqdm(range(len(rows)), "looking at the rows", unit="row", delay=3, leave=False)
    for user, (row, reason, _) in zip(users, look(rows, bar, config), strict=True):
        if user is None:
            left.nobody += 1
            continue
        usable = owned[str(user)]
        if not reason:
            usable.append(row)
        elif not is_filter(reason):
            left.faults[row], left.owners[row] = reason, str(user)
    return owned


def cut(user: str, rows: list[int], pairs: int, sets: int, seed: int) -> Iterator[Chunk]:
    """Sets of so many pairs. The draw depends on the seed, the user and the user's rows alone."""
    drawn = random.Random(f"{seed} {user}").sample(rows, len(rows))
    for number in range(min(sets, len(rows) // pairs)):
        yield Chunk(user, number, tuple(drawn[number * pairs : (number + 1) * pairs]))


def row_digest(row: Row) -> str:
    """Stands for a prompt and the bytes of its two pictures: 32 hexadecimal digits. Raises ValueError or
    FileNotFoundError that says which picture is broken."""
    digest = hashlib.sha256(row["prompt"].encode("utf-8", "surrogatepass"))
    for side in SIDES:
        digest.update(hashlib.sha256(named(side, row, read_bytes)).digest())
    return digest.hexdigest()[:32]


def shown(row: Row) -> Shown:
    """A row, decoded. Raises as `row_digest`."""
    return Shown(row["prompt"], *(named(side, row, open_picture) for side in SIDES))


def named(side: str, row: Row, read: Any) -> Any:
    """What `read` makes of a picture; its errors say which one."""
    try:
        return read(row[side])
    except (ValueError, OSError) as error:
        raise ValueError(f"{side}: {error}") from error


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more."""
    names = list(names)
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
