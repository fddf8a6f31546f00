"""The choices of many people as features, by person."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from diffpref.cache.room import folder_of
from diffpref.cache.team import Team
from diffpref.config import RunConfig
from diffpref.scorer.features import Features, open_features, view_of
from diffpref.scorer.towers import Towers


class Choices:
    """Whose choice each row is, on which prompt, and what it looks like: each picture and prompt once, in memory.

    table: [M,D], of all pictures and prompts.  index [R,3]: where in it prompt, chosen and rejected picture of a row
    are, -1 for a row that cannot be used.  of: rows of each user.

    Args:
        rows: Pairs, with user_id.
        features: Of their pictures and prompts (`open_features`).
        towers: Whose features these are.

    Raises ValueError for rows that name no users, or are no pairs.
    """

    def __init__(self, rows: Dataset, features: Features, towers: Towers):
        self.prompts: list[str] = rows["prompt"][:]
        users = rows["user_id"][:] if "user_id" in rows.column_names else [None] * len(rows)
        self.user: list[Any] = [None if user is None else str(user) for user in users]
        self.table, self.index = tabulate(self.prompts, features, towers)
        people: dict[str, list[int]] = {}
        for row in np.flatnonzero(self.index[:, 0] >= 0).tolist():
            if self.user[row] is not None:
                people.setdefault(self.user[row], []).append(row)
        self.of = {user: np.array(rows) for user, rows in sorted(people.items())}

    @property
    def width(self) -> int:
        """D."""
        return self.table.shape[1]

    def elsewhere(self, user: str, row: int) -> np.ndarray:
        """The user's rows apart from a row: neither it nor one on its prompt or with a picture of its is among them."""
        return self.apart(self.of.get(user, np.array([], dtype=int)), np.array([row]))

    def apart(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Those of rows that share no prompt and no picture with any of the others."""
        return rows[~np.isin(self.index[rows], self.index[others]).any(1)]

    def look(self, rows: Any) -> Tensor:
        """Rows [...] -> features of prompt, chosen and rejected picture, [...,3,D]."""
        return self.table[torch.from_numpy(self.index[np.asarray(rows, dtype=int)])]

    def padded(self, sets: Sequence[np.ndarray], size: int) -> tuple[Tensor, Tensor]:
        """G sets of rows -> (support [G,size,3,D], mask [G,size]): zeros and False where there are fewer."""
        rows, mask = np.zeros((len(sets), size), dtype=int), np.zeros((len(sets), size), dtype=bool)
        for place, some in enumerate(sets):
            rows[place, : len(some)], mask[place, : len(some)] = some, True
        there = torch.from_numpy(mask)
        return self.look(rows) * there[..., None, None], there


def open_choices(rows: Dataset, config: RunConfig, towers: Towers, team: Team, named: bool = True) -> Choices:
    """Features of all rows, made where they are not on disk yet. Every process must call this. named: whose they are
    must be known."""
    check_columns(rows.column_names, named)
    apart = replace(config, cache=replace(config.cache, folder=folder_of(config) / "users"))
    return Choices(rows, open_features(rows, apart, towers, team), towers)


def check_columns(names: list[str], named: bool = True) -> None:
    """Raise ValueError for rows that name no users, or are no pairs."""
    if named and "user_id" not in names:
        raise ValueError(
            f"data.path: there is no column user_id (columns {names}), and whose choices these are must be known;"
            " add it, or set users.source to none"
        )
    if not {"chosen", "rejected"} <= set(names):
        raise ValueError(f"data.path: an encoder of users reads pairs (chosen, rejected), not rows with {names}")


def tabulate(prompts: list[str], features: Features, towers: Towers) -> tuple[Tensor, np.ndarray]:
    """Features of all rows -> each once, and where a row's three are."""
    view, place, found = view_of(towers), {}, []
    index = np.full((len(prompts), 3), -1)
    for row in tqdm(range(len(prompts)), "reading features", unit="choice", disable=len(prompts) < 10_000):
        if row in features.faults:
            continue
        names = [prompts[row], *(digest.tobytes() for digest in features.digests[row] if digest.any())]
        if any(name not in place for name in names):
            pictures = [picture["moments"] for picture in features.latents(row, view)]
            for name, values in zip(names, [features.conditioning(prompts[row])["text"], *pictures], strict=True):
                if name not in place:
                    place[name] = len(found)
                    found.append(values)
        index[row] = [place[name] for name in names]
    return torch.stack(found) if found else torch.zeros(0, towers.width), index
