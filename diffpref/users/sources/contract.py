"""Where a group's user comes from, while training.

A source has two halves. In the loader's processes it makes a group's user, or says which one that is; in the training
process its module hands users over, or learns them. The adapter in the denoiser attends to them. Nobody is all zeros.
"""

from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from diffpref.cache.team import Team
from diffpref.config import RunConfig
from diffpref.data.kinds import Said

ALONE = Team()
PRESENT = "present"  # [N], beside a source's own inputs: 0 for nobody


class UserSource:
    """width: U, of a user vector.  sequence: whether a user is L vectors instead of one. Must pickle."""

    width: int
    sequence: bool = False

    def inputs(self, row: int, key: int, user: Any) -> dict[str, Tensor] | None:
        """What the module takes of one group, without batch dimension; None where its user is nobody.

        Args:
            row: Of the set, as the loader numbers it.
            key: The group's position in training: all that is drawn depends on it and on the source's own seed.
            user: As the data name them.
        """
        raise NotImplementedError

    def absent(self) -> dict[str, Tensor]:
        """Inputs of nobody: of the same shapes, whatever they hold."""
        raise NotImplementedError

    def says(self, said: Said, values: dict[str, Any], key: int, row: int) -> Said:
        """What a row says when this user is asked; the row's own word, unless users have tastes of their own."""
        return said

    def for_rows(self, rows: Dataset, config: RunConfig, team: Team = ALONE) -> "UserSource":
        """The source for held-out rows; the same, unless it reads a user's other rows."""
        return self

    def module(self) -> nn.Module:
        """Inputs, each [N,...] -> the users [N,1,U], or with `sequence` [N,1,L,U]. What trains of it is fp32. Its `id`
        names what made the users, as their embeddings do."""
        raise NotImplementedError


class Given(nn.Module):
    """Users as the loader gives them; nothing in it trains. id: of what made them."""

    def __init__(self, id: str) -> None:
        super().__init__()
        self.id = id

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """user [N,U] or [N,L,U] -> [N,1,U] or [N,1,L,U]; zeros for nobody."""
        return of_those_present(inputs["user"], inputs)


def of_those_present(users: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """[N,...] -> [N,1,...], zeros for nobody."""
    return (users * inputs[PRESENT].reshape(-1, *[1] * (users.ndim - 1)))[:, None]
