"""One number with its interval, and in words how it was taken."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A measure of a scorer.

    value: of the whole sample.  [low, high]: covers the true value with the probability that was asked for.
    n: what was counted, pairs, lists or users.  policy: what became of ties and of what was left out.  interval: how it
    was drawn.  more: further numbers by name.
    """

    value: float
    low: float
    high: float
    n: int
    policy: str
    interval: str
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; further numbers are beside the others."""
        values = asdict(self)
        return values | values.pop("more")

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 pair", "2 pairs"."""
    return f"{number} {one if number == 1 else many or one + 's'}"
