"""What heads may say of a batch, and losses of it, for the tests of losses."""

import math
from dataclasses import replace

import torch
from objective_cases import lists
from torch import Tensor

from diffpref.batch import Structure
from diffpref.scorer.heads import Judged
from diffpref.scorer.losses import LOSSES, LossConfig

LN2, LN3 = math.log(2), math.log(3)
PAIR_LOSSES = [name for name, row in LOSSES.items() if row.over == "pairs"]
LIST_LOSSES = [name for name, row in LOSSES.items() if row.over == "groups"]


def logistic(d: float) -> float:
    """−log σ(d)"""
    return math.log1p(math.exp(-d))


def run(name: str, scores: Tensor, structure: Structure, logit: Tensor | None = None, **options) -> Tensor:
    """The losses of items with scores [N]; of tastes, aspects or spreads, `scores` may be a Judged."""
    judged = scores if isinstance(scores, Judged) else Judged(scores=scores)
    if logit is None:
        logit = judged.scores[structure.chosen] - judged.scores[structure.rejected]
    config = replace(LossConfig(name=name), **options)
    row = LOSSES[name]
    return row.loss(judged, logit, structure, **{option: getattr(config, option) for option in row.options})


def everything(n: int = 9, tastes: int = 3, seed: int = 0) -> tuple[Judged, Structure]:
    """Groups of 2, 4 and 3 items and what any head may say of them; user and aspects too, with ties and gaps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = lists([0.9, 0.2], [0.1, 0.7, 0.7, 1.0], [0.0, 0.8, 0.4])
    count = len(batch.pairs)
    said = torch.tensor([1.0, -1.0, 0.0, math.nan]).repeat(count)[: 2 * count].reshape(count, 2).double()
    batch = replace(
        batch,
        weight=torch.tensor([1.0, 0.5, 2.0]),
        probability=torch.linspace(0.5, 1, count, dtype=torch.float64),
        user=torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0]),
        aspects=said,
    )
    mixture = draw(3, tastes).softmax(-1)[batch.group]
    return Judged(draw(n), draw(n, 2), draw(n).exp(), draw(n, 4), draw(n, tastes), mixture), batch
