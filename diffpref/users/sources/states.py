"""Users whose states were made before training: users.path is a file that `diffpref user describe` wrote (PPD)."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig
from diffpref.data.columns import read_columns
from diffpref.users.sources.contract import ALONE, Given, UserSource
from diffpref.users.sources.named import COLUMN, named, some, users_of
from diffpref.users.vlm.pairs import row_digest
from diffpref.users.vlm.states import States, read_states


class StateUsers(UserSource):
    """states: the file.  shown: which rows of the set the model was shown, and as which row of the data that it read.

    A pair whose user's only states were made of that very pair is trained as nobody's: it would be in its own support.
    """

    def __init__(self, states: States, shown: dict[int, int] | None = None) -> None:
        self.states, self.shown = states, shown or {}
        self.width, self.sequence = states.width, states.length > 1

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset) -> "StateUsers":
        """Raises FileNotFoundError or ValueError for a file that cannot be read, for rows that name no users, and where
        the file has none of them. Users that it lacks are named, and trained as nobody."""
        users, states = users_of(config, rows), read_states(str(config.users.path))
        lacking = [user for user in users if user not in states]
        whom = f"{len(lacking)} of the {len(users)} users of {config.data.path} ({some(lacking)})"
        missing = f"{states.path} lacks {whom}"
        if len(lacking) == len(users):
            raise ValueError(f"users.path: {missing}; make them with diffpref user describe")
        if lacking:
            print(f"users: {missing}; their rows are trained as nobody's", flush=True)
        return cls(states, shown_rows(rows, states))

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """Of several states of the user, `key` says which; never one that this row's pair is in."""
        name = named(user)
        if name is None or name not in self.states:
            return None
        found = self.states.apart_from(self.shown.get(row, -1), name, key)
        return None if found is None else {"user": found if self.sequence else found[0]}

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "StateUsers":
        """Of the same file; a user that it lacks is nobody."""
        return StateUsers(self.states, shown_rows(rows, self.states))

    def absent(self) -> dict[str, Tensor]:
        """Zeros, [L,U] or [U]."""
        return {"user": torch.zeros((self.states.length, self.width) if self.sequence else (self.width,))}

    def module(self) -> nn.Module:
        """Nothing in it trains."""
        return Given(self.states.id)


def shown_rows(rows: Dataset, states: States) -> dict[int, int]:
    """Row of this set -> row of the data that the states were made of, for every pair that is in both. Pictures are
    read where user and prompt agree."""
    if not {"chosen", COLUMN} <= set(rows.column_names):
        return {}
    known = {(entry.user, pair.prompt): {} for entry in states.entries for pair in entry.pairs}
    for entry in states.entries:
        for pair in entry.pairs:
            known[entry.user, pair.prompt][pair.digest] = pair.row
    found = {}
    for number, values in enumerate(read_columns(rows, [COLUMN, "prompt"])):
        digests = known.get((str(values[COLUMN]), values["prompt"]))
        if digests and (digest := row_digest(rows[number])) in digests:
            found[number] = digests[digest]
    return found
