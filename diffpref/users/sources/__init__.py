"""Where users come from while training; SOURCES has one row each."""

from collections.abc import Callable

from datasets import Dataset, IterableDataset

from diffpref.cache.team import Team
from diffpref.config import Config
from diffpref.users.sources.contract import UserSource
from diffpref.users.sources.rewards import RewardUsers
from diffpref.users.sources.states import StateUsers
from diffpref.users.sources.table import TableUsers


def support_pairs(config: Config, rows: Dataset | IterableDataset, team: Team) -> UserSource:
    """The source `encoder`, imported when it is asked for: with it comes open_clip."""
    from diffpref.users.sources.encoder import SupportPairs

    return SupportPairs.build(config, rows, team)


def drawn_tastes(config: Config, rows: Dataset | IterableDataset, team: Team) -> UserSource:
    """The source `tastes`, likewise."""
    from diffpref.users.sources.tastes import DrawnTastes

    return DrawnTastes.build(config, rows, team)


# Each raises ValueError, with the mend, for rows that do not say what it needs.
# The processes of a run make theirs together: what an encoder sees is made once.
SOURCES: dict[str, Callable[[Config, Dataset | IterableDataset, Team], UserSource]] = {
    "encoder": support_pairs,
    "tastes": drawn_tastes,
    "table": lambda config, rows, team: TableUsers.build(config, rows),
    "states": lambda config, rows, team: StateUsers.build(config, rows),
    "rewards": lambda config, rows, team: RewardUsers.build(config, rows),
}
