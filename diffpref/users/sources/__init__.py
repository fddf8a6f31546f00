"""Where users come from while training; SOURCES has one row each."""

from collections.abc import Callable

from datasets import Dataset, IterableDataset

from diffpref.config import Config
from diffpref.users.sources.contract import UserSource
from diffpref.users.sources.rewards import RewardUsers
from diffpref.users.sources.states import StateUsers
from diffpref.users.sources.table import TableUsers


def support_pairs(config: Config, rows: Dataset | IterableDataset) -> UserSource:
    """The source `encoder`, imported when it is asked for: with it comes open_clip."""
    from diffpref.users.sources.encoder import SupportPairs

    return SupportPairs.build(config, rows)


# Each raises ValueError, with the mend, for rows that do not say what it needs.
SOURCES: dict[str, Callable[[Config, Dataset | IterableDataset], UserSource]] = {
    "encoder": support_pairs,
    "table": TableUsers.build,
    "states": StateUsers.build,
    "rewards": RewardUsers.build,
}
