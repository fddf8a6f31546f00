"""What a head is: embeddings of N pictures and of their prompts in, numbers a loss reads out.

N items (one picture with one prompt), P comparisons between items, D width of the embeddings, K parts of a mixture,
A aspects, V width of a vector.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Judged:
    """What a head says of N items; what it does not speak of is None.

    scores [N]: higher is better; the one number by which items are ranked.
    aspects [N,A]: scores by aspect.
    spread [N]: standard deviation of the score, of heads that know how sure they are.
    vectors [N,V]: of a head whose preference is no difference of scores.
    components [N,K]: scores by each of K tastes.  mixture [N,K]: weights of the tastes, rows sum to 1.
    """

    scores: Tensor
    aspects: Tensor | None = None
    spread: Tensor | None = None
    vectors: Tensor | None = None
    components: Tensor | None = None
    mixture: Tensor | None = None


class Head(nn.Module):
    """A head of unit vectors image [N,D] and text [N,D], and of user [N], the number of each item's user in the head's
    own table, -1 for one it does not know (the population).

    `settings` are the keyword arguments that make it again, as JSON values; `HEADS` has the classes by name.  `gives`:
    fields of Judged that losses may read; scores only where their differences are the logits.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})
    settings: dict

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """What the head says."""
        raise NotImplementedError

    def logit(self, judged: Judged, first: Tensor, second: Tensor) -> Tensor:
        """Log-odds [P] that item first[p] is preferred to item second[p]; with heads of one scale, their scores'
        difference. Antisymmetric: exchanged, its sign is."""
        return judged.scores[first] - judged.scores[second]

    @torch.no_grad()
    def warm(self, temperature: float) -> None:
        """Take a temperature in: scores are what scores / temperature were, as far as the limits let them be."""
        self.logit_scale.sub_(math.log(temperature))
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """After each optimiser step: put parameters that have a limit back within it."""
