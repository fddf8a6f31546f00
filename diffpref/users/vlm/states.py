"""The file of many users' states, which training and sampling read.

A safetensors file: `states` [E,L,U], of E entries, one for each set of pairs of each user; `entries`, bytes, a JSON
list that says whose; and metadata that say how they were made.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpref.cache.store import opened
from diffpref.synpic.files import written_whole
from diffpref.users.embedding import UserEmbedding

FORMAT = "diffpref user states 1"


@dataclass(frozen=True)
class Pair:
    """A pair that was shown: its row in the data, and what stands for its prompt and pictures."""

    row: int
    prompt: str
    digest: str


@dataclass(frozen=True)
class Entry:
    """A set of pairs of one user.

    number: which of the user's sets, from 0.  data: where the rows are from.  text: what the model wrote of them.
    """

    user: str
    number: int
    data: str
    pairs: tuple[Pair, ...]
    text: str

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Entry":
        """Out of JSON."""
        return cls(**values | {"pairs": tuple(Pair(**pair) for pair in values["pairs"])})

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its pairs."""
        return tuple(pair.digest for pair in self.pairs)


class States:
    """A file of users, open for reading; an entry's states are read when they are asked for. Pickles: each process
    opens the file for itself.

    Attributes:
        id: Stands for the model and how it was asked: states of one id compare.
        facts: What else is known of how they were made.
        users: Their names, in order.
        entries: Of all users' sets of pairs.
        length, width: L and U of a user's states [L,U].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of another kind.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.pid, self.handle = Path(path), 0, None
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}; diffpref user describe makes one")
        try:
            self.read_facts()
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of users' states, or is damaged ({error})") from error
        self.numbers: dict[str, list[int]] = {}
        for place, entry in enumerate(self.entries):
            self.numbers.setdefault(entry.user, []).append(place)
        self.users = tuple(self.numbers)

    def read_facts(self) -> None:
        """All but the states."""
        metadata = self.open().metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        self.facts: dict[str, Any] = json.loads(metadata["facts"])
        self.id = str(self.facts["id"])
        content = json.loads(self.open().get_tensor("entries").numpy().tobytes())
        self.entries = tuple(map(Entry.read, content))
        count, self.length, self.width = self.open().get_slice("states").get_shape()
        if count != len(self.entries):
            raise ValueError(f"it has {count} states of {len(self.entries)} entries")

    def open(self) -> safe_open:
        """The file, opened by this very process."""
        if self.handle is None or self.pid != os.getpid():
            self.pid, self.handle = os.getpid(), opened(self.path)
        return self.handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pid": 0, "handle": None}

    def __contains__(self, user: Any) -> bool:
        return str(user) in self.numbers

    def state(self, place: int) -> Tensor:
        """Of the entry at this place, [L,U], as it was stored."""
        return self.open().get_slice("states")[place]

    def places(self, user: Any, without: int | None = None) -> list[int]:
        """Where the entries of a user are, less those that were shown the pair of the row `without`, there or in a row
        like it. Raises KeyError for a user who is not there."""
        if user not in self:
            raise KeyError(f"{self.path} has no user {str(user)!r}, but {len(self.users)} others")
        own = self.numbers[str(user)]
        alike = {pair.digest for i in own for pair in self.entries[i].pairs if pair.row == without}
        return [i for i in own if not alike & set(self.entries[i].digests)]

    def of(self, user: Any, key: int) -> Tensor:
        """States of a user, [L,U] fp32. Of several sets `key` draws one, the same in every process. Raises KeyError for
        a user who is not there."""
        return self.state(drawn(self.places(user), user, key)).float()

    def apart_from(self, row: int, user: Any, key: int) -> Tensor | None:
        """The same, never of a set that was shown this row of the data; None where there is no other."""
        places = self.places(user, without=row)
        return self.state(drawn(places, user, key)).float() if places else None


def drawn(places: Sequence[int], user: Any, key: int) -> int:
    """One of them."""
    return random.Random(f"{user} {key}").choice(places)


def read_states(path: str | os.PathLike) -> States:
    """A file that `diffpref user describe` made. Raises as `States`."""
    return States(path)


def as_embedding(states: States, user: str, number: int = 0) -> UserEmbedding:
    """A user of the file as an embedding of its own; `number` says by which set of pairs. Raises KeyError for a user or
    set that is not there."""
    for place in states.places(user):
        entry = states.entries[place]
        if entry.number == number:
            return UserEmbedding(states.state(place).float(), states.id, len(entry.pairs), entry.user)
    raise KeyError(f"{states.path} has no set {number} of the user {user!r}")


def write_states(path: Path, facts: dict[str, Any], entries: Sequence[Entry], states: Sequence[Tensor]) -> None:
    """Write a file, whole or not at all. Raises OSError as `written_whole`."""
    content = json.dumps([asdict(entry) for entry in entries]).encode()
    tensors = {"states": torch.stack(list(states)), "entries": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
    with written_whole(path) as beside:
        save_file(tensors, beside, {"format": FORMAT, "facts": json.dumps(facts)})
