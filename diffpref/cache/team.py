"""The processes that fill a cache together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among `world`.

    wait: returns once all processes call it, however long that takes. gather: the lists of all, one after the other.
    Alone, there is nothing to wait for.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    gather: Callable[[list], list] = lambda items: items

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks and tidies up."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of the items is this process's to do."""
        return items[self.rank :: self.world]

    def together(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, once all are done: collectives have time-outs, the wait before has none."""
        self.wait()
        return self.gather(items)
