"""Ways to compute the same loss and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from stepping.script import pair_errors
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffpref.errors import item_errors
from diffpref.objectives import total
from diffpref.pair_loss import fused_total
from lossy.cases import Inputs


@dataclass(frozen=True)
class Way:
    """loss: inputs -> (loss [] with graph, what the logits are made of).  logits: of that, [B]; not timed.

    what: in words.  graph: whether it is replayed from a CUDA graph.  timed: whether times mean anything.
    """

    what: str
    loss: Callable[[Inputs], tuple[Tensor, Any]]
    logits: Callable[[Any, Inputs], Tensor]
    graph: bool = False
    timed: bool = True


# --- diffusers --------------------------------------------------------------------------------------------------------


def from_errors(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Errors [2B] -> (loss, logits [B]), as the SDXL script has it."""
    winner, loser = policy.chunk(2)
    base_winner, base_loser = reference.chunk(2)
    logits = -0.5 * beta * ((winner - loser) - (base_winner - base_loser))
    return -logsigmoid(logits).mean(), logits


def script(x: Inputs) -> tuple[Tensor, Tensor]:
    """diffusers' example scripts: two errors in fp32, each a mean of squares, and their difference."""
    policy = pair_errors(x.policy, x.target)
    with torch.no_grad():
        reference = pair_errors(x.reference, x.target)
    return from_errors(policy, reference, x.settings.beta)


def half(x: Inputs) -> tuple[Tensor, Tensor]:
    """The published forks: the reference's error is taken in the precision it is predicted in."""
    with torch.no_grad():
        reference = (x.reference - x.target).pow(2).flatten(1).mean(1)
    return from_errors(pair_errors(x.policy, x.target), reference.float(), x.settings.beta)


# --- ours -------------------------------------------------------------------------------------------------------------


def by(kernel: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """item_errors and the objective, as a step without the fused head has them -> (loss, advantage [2B])."""

    def loss(x: Inputs) -> tuple[Tensor, Tensor]:
        errors = item_errors(x.policy, x.reference, x.target, x.weight, kernel=kernel)
        assert errors.advantage is not None
        return total(errors, x.structure, x.settings)[0], errors.advantage

    return loss


def fused(x: Inputs) -> tuple[Tensor, Tensor]:
    """Errors, objective and coefficients in two launches -> (loss, advantage [2B])."""
    errors, loss, _ = fused_total(x.policy, x.reference, x.target, x.weight, x.structure, x.settings)
    assert errors.advantage is not None
    return loss, errors.advantage


def as_they_are(logits: Tensor, x: Inputs) -> Tensor:
    """[B]"""
    return logits


def of_advantages(advantage: Tensor, x: Inputs) -> Tensor:
    """(β/2)·(A_chosen − A_rejected), [B], in fp32 as the loss has it."""
    winner, loser = advantage[x.structure.pairs.T]
    return 0.5 * x.settings.beta * (winner - loser)


WAYS: dict[str, Way] = {
    "eager": Way("diffusers' formula", script, as_they_are),
    "half_reference": Way("the same, the reference's error in its own precision", half, as_they_are, timed=False),
    "ours": Way("this package by PyTorch", by("torch"), of_advantages),
    "compile": Way("the same through torch.compile", by("torch"), of_advantages),
    "triton_errors": Way("this package, errors by Triton and the objective by PyTorch", by("triton"), of_advantages),
    "triton": Way("this package by Triton: three launches", fused, of_advantages),
    "triton_graph": Way("the same in a CUDA graph", fused, of_advantages, graph=True),
}  # fmt: skip
COMPILED = ("compile",)
BY_TRITON = ("triton_errors", "triton", "triton_graph")


def ready(name: str) -> Way:
    """A way, compiled if it is to be: anew for each case, as training with fixed shapes has it."""
    way = WAYS[name]
    if name not in COMPILED:
        return way
    return Way(way.what, torch.compile(way.loss, dynamic=False), way.logits)


def run(way: Way, x: Inputs) -> tuple[Tensor, Any, Tensor]:
    """Forward and backward -> (loss, what the logits are made of, gradient [2B,...])."""
    loss, rest = way.loss(x)
    return loss, rest, torch.autograd.grad(loss, x.policy, grad_outputs=x.scale)[0]
