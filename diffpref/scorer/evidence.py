"""A set of preferences as a scorer is measured with it: pictures under their prompts, and what people said of them.

P pairs, N items (a picture with a prompt, each once however often it occurs), lists of items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from diffpref.config import DataConfig
from diffpref.data import Kind, check, kind_of, load_preferences
from diffpref.data.kinds import Picture, Row, Said
from diffpref.data.pictures import read_bytes


@dataclass(frozen=True)
class Item:
    """Where a picture lies (row of the checked set, number within it), its prompt, and for whom it is judged."""

    row: int
    picture: int
    prompt: str
    user: Any = None


@dataclass(frozen=True)
class Ranking:
    """A list: numbers of its items [k], people's scores [k], prompt and user."""

    items: np.ndarray
    truth: np.ndarray
    prompt: str
    user: Any


@dataclass(frozen=True)
class Evidence:
    """What people said.

    rows, kind: where the pictures are.  items [N].  sizes [N,2]: (height, width) of their pictures.  pairs [P,2]:
    numbers of items.  label [P]: +1 the first is better, 0 people tied.  probability [P]: that the first is preferred,
    None where the data do not say.  truth [P]: the same as somebody knows it, of a column that was named.  aspects: a
    label [P] for each.  prompts, users: P names, a user may be None.  lists: of sets of lists.  pictures: how many
    different ones.  left_out: rows by reason.
    """

    rows: Dataset
    kind: Kind
    items: list[Item]
    sizes: np.ndarray
    pairs: np.ndarray
    label: np.ndarray
    probability: np.ndarray | None
    truth: np.ndarray | None
    aspects: dict[str, np.ndarray]
    prompts: list[str]
    users: list[Any]
    lists: list[Ranking]
    pictures: int
    left_out: dict[str, int]

    @property
    def clusters(self) -> dict[str, list]:
        """What choices depend on: the prompt, and the user where the data name one."""
        return clusters_of(self.prompts, self.users)

    def sound(self, faulty: set[int]) -> np.ndarray:
        """Which pairs have none of these items, [P]. Raises ValueError when no pair is left."""
        kept = np.asarray(~np.isin(self.pairs, list(faulty)).any(axis=1))
        if not kept.any():
            raise ValueError(f"no pair is left: {len(faulty)} of {len(self.items)} pictures cannot be scored")
        return kept

    def without(self, faulty: set[int]) -> "Evidence":
        """The pairs and lists that have none of these items. Raises as `sound`."""
        kept = self.sound(faulty)
        part = {name: None if (v := getattr(self, name)) is None else v[kept] for name in OF_PAIRS}
        names = {name: [v for v, good in zip(getattr(self, name), kept, strict=True) if good] for name in NAMES}
        aspects = {name: values[kept] for name, values in self.aspects.items()}
        lists = [one for one in self.lists if not faulty & set(one.items.tolist())]
        return replace(self, aspects=aspects, lists=lists, **part, **names)


OF_PAIRS, NAMES = ("pairs", "label", "probability", "truth"), ("prompts", "users")


def clusters_of(prompts: list[str], users: list[Any]) -> dict[str, list]:
    """Names of clusters by kind; users only where there are some."""
    return {"prompt": prompts} | ({"user": users} if any(user is not None for user in users) else {})


def read_evidence(config: DataConfig, truth: str | None = None, *, personal: bool = False) -> Evidence:
    """Read a set of pairs, lists or captions, look at all rows and at the bytes of all pictures.

    Args:
        config: Which rows; data.aspects may name columns.
        truth: Column with the probability that the chosen picture is preferred.
        personal: Let every item be judged for the user of its row.

    Raises:
        ValueError: rows that cannot be read, rows without pairs, columns that are not there or hold no numbers.
        FileNotFoundError: nothing is there.
    """
    columns = [*config.aspects, *([truth] if truth else [])]
    read = replace(config, ties="half", aspects=columns)  # half: ties are known, and none are left out
    try:
        checked = check(load_preferences(read), read)
    except ValueError as error:
        raise ValueError(str(error).replace("data.aspects", "--truth and --aspects")) from error
    kind = kind_of(checked.rows.column_names, read)
    if "pairs" not in kind.gives:
        raise ValueError(f"data.path: accuracy is of pairs, and {config.path} holds {kind.name}")
    made = Reader(read, kind, personal)
    for number, row in enumerate(tqdm(checked.rows, "reading the rows", unit="row", delay=3, leave=False)):
        made.add(number, row, checked.sizes[number])
    return made.evidence(checked.rows, checked.dropped, truth)


class Reader:
    """Takes rows, one after the other, and knows the pictures it has seen by their bytes."""

    def __init__(self, config: DataConfig, kind: Kind, personal: bool):
        self.config, self.kind, self.personal = config, kind, personal
        self.numbers: dict[tuple[bytes, str, Any], int] = {}  # (digest, prompt, user) -> number of the item
        self.items: list[Item] = []
        self.sizes: list[Any] = []
        self.compared: list[tuple[int, int, float, float]] = []  # first, second, label, probability
        self.said: list[tuple[str, Any, list[float]]] = []  # prompt, user, named columns
        self.lists: list[Ranking] = []

    def add(self, number: int, row: Row, sizes: np.ndarray) -> None:
        """A row, and the (height, width) of its pictures."""
        said, user = self.kind.says(row, self.config), row.get("user_id")
        user = None if user != user else user  # NaN, in a column of floats
        digests = [blake2b(read_bytes(p), digest_size=16).digest() for p in self.kind.named_pictures(row).values()]
        items = [
            self.item(digests[place], Item(number, place, prompt, user if self.personal else None), sizes[place])
            for place, prompt in said.items
        ]
        named = [np.nan if row[name] is None else float(row[name]) for name in self.config.aspects]
        for i, j, label, probability in comparisons(said):
            self.compared.append((items[i], items[j], label, probability))
            self.said.append((row["prompt"], user, named))
        if self.kind.name == "lists":
            self.lists.append(Ranking(np.array(items), np.array(said.scores), row["prompt"], user))

    def item(self, digest: bytes, item: Item, size: Any) -> int:
        """The number of a picture under a prompt."""
        found = self.numbers.setdefault((digest, item.prompt, item.user), len(self.items))
        if found == len(self.items):
            self.items.append(item)
            self.sizes.append(size)
        return found

    def evidence(self, rows: Dataset, left_out: dict[str, int], truth: str | None) -> Evidence:
        """All of it."""
        first, second, label, probability = (np.array(x) for x in zip(*self.compared, strict=True))
        prompts, users, named = ([*x] for x in zip(*self.said, strict=True))
        columns = dict(zip(self.config.aspects, np.array(named).T, strict=False))
        known = {"pairs": "probability", "lists": "wins"}.get(self.kind.name) in rows.column_names
        return Evidence(
            rows=rows,
            kind=self.kind,
            items=self.items,
            sizes=np.array(self.sizes),
            pairs=np.stack([first, second], axis=1),
            label=label,
            probability=probability if known else None,
            truth=columns.pop(truth) if truth else None,
            aspects=columns,
            prompts=prompts,
            users=users,
            lists=self.lists,
            pictures=len({digest for digest, _, _ in self.numbers}),
            left_out=left_out,
        )


def comparisons(said: Said) -> list[tuple[int, int, float, float]]:
    """(first, second, label, probability) of every two items of a row, the better first; ties are those it does not
    order. NaN where no probability is known."""
    sure = said.probability or (np.nan,) * len(said.pairs)
    scores = said.scores or ()
    better = [(i, j, float(scores[i] != scores[j]), p) for (i, j), p in zip(said.pairs, sure, strict=True)]
    asked = {frozenset(pair) for pair in said.pairs}
    others = (pair for pair in combinations(range(len(said.items)), 2) if frozenset(pair) not in asked)
    return [*better, *((i, j, 0.0, 0.5) for i, j in others)]


def pictures(evidence: Evidence, items: list[Item]) -> Iterator[tuple[Picture, str]]:
    """(picture, prompt) of items, each row read once while its items follow one another."""
    row, held = -1, []
    for item in items:
        if item.row != row:
            row, held = item.row, list(evidence.kind.named_pictures(evidence.rows[item.row]).values())
        yield held[item.picture], item.prompt
