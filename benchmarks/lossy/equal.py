"""Whether all compute the same, before anything is timed: against fp64 on the same inputs."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lossy.cases import Case, Inputs
from lossy.ways import Way, run

# Largest errors that pass: of loss and logit absolute, of the gradient relative to its length. diffusers' formula
# errs by 1e-4 in the logit, half precision by its rounding in the gradient.
LOSS, LOGIT = 1e-2, 1e-2
GRADIENT = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 2e-3}


@dataclass(frozen=True)
class Exact:
    """fp64: loss [], logits [B], gradient [2B,...]."""

    loss: Tensor
    logits: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Distance:
    """From the exact ones: loss, the worst logit, the gradient's difference over its length."""

    loss: float
    logit: float
    gradient: float

    def row(self) -> dict[str, float]:
        """For the report."""
        return asdict(self)


# e = mean (p − y)²,  A = e_ref − e_θ,  h = (β/2)·(A_w − A_l),  L = −1/B·Σ log σ(h)
# dL/dp_w = (β/B)·σ(−h)·(p_w − y_w)/n·scale, and with the other sign for the loser
def exact(x: Inputs) -> Exact:
    """By the equations, in fp64, item by item: a video has no room for more."""
    beta, pairs, n = x.settings.beta, len(x.policy) // 2, x.policy[0].numel()
    advantage = torch.stack([((r - y) ** 2 - (p - y) ** 2).mean() for p, r, y in items(x)])
    logits = 0.5 * beta * (advantage[:pairs] - advantage[pairs:])
    slope = beta / pairs * torch.sigmoid(-logits) / n * x.scale.double()
    by_item = torch.cat([slope, -slope])
    gradient = torch.stack([c * (p - y) for c, (p, _, y) in zip(by_item, items(x), strict=True)])
    return Exact(-logsigmoid(logits).mean(), logits, gradient)


def items(x: Inputs):
    """(p, r, y) of each item, fp64."""
    tensors = (x.policy.detach(), x.reference, x.target)
    return ((p.double(), r.double(), y.double()) for p, r, y in zip(*tensors, strict=True))


def distance(way: Way, x: Inputs, true: Exact) -> Distance:
    """Of one way."""
    loss, rest, gradient = run(way, x)
    logit = (way.logits(rest, x).detach().double() - true.logits).abs().max()
    off = torch.linalg.vector_norm(gradient.double() - true.gradient) / torch.linalg.vector_norm(true.gradient)
    return Distance((loss.detach().double() - true.loss).abs().item(), logit.item(), off.item())


def check(name: str, found: Distance, case: Case) -> None:
    """Raise ValueError for a way that does not compute the same loss: its times would mean nothing."""
    limits = {"loss": LOSS, "logit": LOGIT, "gradient": GRADIENT[case.dtype]}
    for what, most in limits.items():
        value = getattr(found, what)
        if not value <= most:  # NaN, too
            raise ValueError(
                f"{name} does not compute the same at {case.name}: its {what} is {value:.2g} off, {most:.2g} may be;"
                " nothing is timed that is not equal"
            )
