"""Users whom the data name: a vector for each, learned with the adapter.

The adapter's layer norm takes the length of a vector away, so users are unit vectors: what is learned is a direction,
and the length of the row in the table says only how fast it can still turn.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import Config, RunConfig
from diffpref.noise import generator
from diffpref.scorer.weights import damage_named, refuse_no_numbers
from diffpref.synpic.files import written_whole
from diffpref.users.embedding import UserEmbedding
from diffpref.users.sources.contract import ALONE, UserSource, of_those_present
from diffpref.users.sources.named import named, names_in, some, users_of

FILE, FORMAT, TENSOR = "user_table.safetensors", "1", "users"
TABLE = 7  # which random stream of a seed: the vectors at the start
LENGTH = 0.1  # of these: short ones turn quickly, and far above what the layer norm takes for nothing


class UserTable(nn.Module):
    """names: of K users.  width: U.  seed: of the directions they start in."""

    def __init__(self, names: list[str], width: int, seed: int = 0) -> None:
        super().__init__()
        self.names = {name: number for number, name in enumerate(names)}
        start = F.normalize(torch.randn(len(names), width, generator=generator(seed, TABLE)), dim=-1)
        self.users = nn.Embedding.from_pretrained(LENGTH * start, freeze=False)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """user [N], numbers -> [N,1,U]; zeros for nobody."""
        return of_those_present(F.normalize(self.users(inputs["user"]), dim=-1), inputs)

    def vectors(self) -> Tensor:
        """All users [K,U], in the order of their names, without graph."""
        return F.normalize(self.users.weight.detach(), dim=-1)

    def number(self, name: str) -> int:
        """Raises ValueError for a user that is not in the table."""
        if name not in self.names:
            raise ValueError(
                f"the table of {len(self.names)} users ({some(list(self.names))}) does not know {name!r}; who was not"
                " there in training needs another source of users, or diffpref.users.mixture"
            )
        return self.names[name]

    def embedding(self, name: str) -> UserEmbedding:
        """What a pipeline is given of a user. Raises ValueError for one that is not in the table."""
        return UserEmbedding(self.vectors()[self.number(name)], self.id, name=name)

    @property
    def id(self) -> str:
        """Says which table a vector is of: names and vectors, as they are now."""
        content = json.dumps(list(self.names)).encode() + self.users.weight.detach().float().cpu().numpy().tobytes()
        return f"table-{hashlib.sha256(content).hexdigest()[:12]}"

    def save(self, folder: Path) -> Path:
        """Write user_table.safetensors, whole or not at all."""
        facts = {"format": FORMAT, "names": json.dumps(list(self.names))}
        with written_whole(folder / FILE) as beside:
            save_file({TENSOR: self.users.weight.detach().float().cpu().contiguous()}, beside, facts)
        return folder / FILE

    @classmethod
    def load(cls, path: str | Path) -> "UserTable":
        """Read such a file, or the one in a run's folder. Raises FileNotFoundError, or ValueError for one that holds no
        table."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        with damage_named(path), safe_open(path, "pt") as file:
            facts, keys = file.metadata() or {}, set(file.keys())
            weight = file.get_tensor(TENSOR) if keys == {TENSOR} else None
        names = json.loads(facts.get("names", "[]"))
        if weight is None or facts.get("format") != FORMAT or weight.ndim != 2 or len(weight) != len(names):
            raise ValueError(
                f"{path} holds no table of users of format {FORMAT}; training with users.source table does"
            )
        refuse_no_numbers({TENSOR: weight}, str(path))
        table = cls(names, weight.shape[1])
        table.users.weight.data.copy_(weight)
        return table


class TableUsers(UserSource):
    """names: of all users, sorted.  width: U.  seed: of the directions they start in."""

    def __init__(self, names: list[str], width: int, seed: int = 0) -> None:
        self.names, self.width, self.seed = names, width, seed
        self.numbers = {name: number for number, name in enumerate(names)}

    @classmethod
    def build(cls, config: Config, rows: Dataset | IterableDataset) -> "TableUsers":
        """Of the users that the rows name. Raises ValueError, with the mend, where they name none."""
        return cls(users_of(config, rows), config.users.width, config.train.seed)

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """The user's number. Raises ValueError for one that the training rows did not name."""
        name = named(user)
        if name is not None and name not in self.numbers:
            raise ValueError(f"user {name!r} is none of the {len(self.numbers)} users of the training rows")
        return None if name is None else {"user": torch.tensor(self.numbers[name])}

    def absent(self) -> dict[str, Tensor]:
        """Any number."""
        return {"user": torch.tensor(0)}

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "TableUsers":
        """The same. Raises ValueError for rows of users that the training rows did not name."""
        if unknown := [name for name in names_in(rows) if name not in self.numbers]:
            raise ValueError(
                f"data.validation: {len(unknown)} of its users ({some(unknown)}) are none of the {len(self.names)} of"
                " data.path, whom alone users.source table learns; leave their rows out, or set users.source to encoder"
            )
        return self

    def module(self) -> UserTable:
        """The table, as it starts; the same in every process."""
        return UserTable(self.names, self.width, self.seed)
