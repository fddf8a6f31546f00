"""(policy, reference, target) -> short vectors. Wide tensors [N,...] end here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.batch import Errors
from diffpref.triton_kernels.available import use_triton
from diffpref.triton_kernels.blocks import check_mask


@dataclass(frozen=True)
class Mixture:
    """A target that is nowhere written down: by_x0·x0 + by_noise·noise, of x0, noise [N,...] and by_x0, by_noise [N].

    ε is (0, 1), v of a variance-preserving schedule (−s, a), v of a flow (−1, 1).
    """

    x0: Tensor
    noise: Tensor
    by_x0: Tensor
    by_noise: Tensor

    def written(self) -> Tensor:
        """The target [N,...], fp32."""
        a, b = (by.float().view(-1, *(1,) * (self.x0.ndim - 1)) for by in (self.by_x0, self.by_noise))
        return a * self.x0.float() + b * self.noise.float()


def item_errors(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor | Mixture,
    weight: Tensor,
    *,
    drift: bool = False,
    mask: Tensor | None = None,
    reference_error: Tensor | None = None,
    kernel: str = "auto",
) -> Errors:
    """Per-item squared errors and advantage, in fp32 whatever the inputs' dtypes, times the timestep's weight w.

        e_θ = w·mean (p − y)²      A = e_ref − e_θ = w·mean (r − p)(p + r − 2y)      drift = w·mean (p − r)²

    The advantage is accumulated in this form. As a difference of two means it would lose the digits that the
    preference logit (β ~ 5000) is made of; and it is exactly 0 where policy = reference.

    Args:
        policy: p [N,...], with graph.
        reference: r [N,...], without graph, or None for reference-free objectives.
        target: y [N,...], written down or not.
        weight: w [N].
        drift: Whether the drift is asked for.
        mask: m >= 0, of as many dimensions as p, 1 where it is the same for all. Means are then those of what it keeps,
            Σ m·d² / Σ m, over all elements of p; 0 where it keeps nothing of an item. What it does not keep may be
            anything, NaN included.
        reference_error: e_ref [N] of a reference that is not here, without w. A is then w·e_ref − e_θ, to the digits
            that a difference of means has.
        kernel: Who computes: triton, torch, or auto, which is triton on CUDA devices. Triton gives a gradient to the
            policy only.

    Raises ValueError for a mask that does not fit, a drift from a reference that is not here, and triton where it
    cannot run.
    """
    if drift and reference is None and reference_error is not None:
        raise ValueError("a drift is a distance to the reference's prediction, not its error; give the prediction")
    compute = by_triton if use_triton(kernel, policy.device) else by_torch
    return compute(policy, reference, target, weight, drift, mask, reference_error)


def by_triton(policy, reference, target, weight, drift, mask, reference_error) -> Errors:
    """`item_errors` in two launches, and one for the gradient."""
    from diffpref.triton_kernels import item_errors as kernels

    options = {"drift": drift, "mask": mask, "reference_error": reference_error}
    return Errors(*kernels.item_errors(policy, reference, weight=weight, **parts(target), **options))


def by_torch(policy, reference, target, weight, drift, mask, reference_error) -> Errors:
    """`item_errors` by PyTorch."""
    p, y = policy.float(), (target.written() if isinstance(target, Mixture) else target).float()
    r, mean = None if reference is None else reference.float(), flat_mean
    if mask is not None:
        check_mask(mask, policy)
        p, y, r = (None if x is None else x.where(mask != 0, 0.0) for x in (p, y, r))
        mean = masked_mean(mask.float().expand_as(policy))
    return errors_of(p, r, y, weight, mean, drift, reference_error)


def errors_of(p, r, y, weight: Tensor, mean: Callable[[Tensor], Tensor], drift: bool, reference_error) -> Errors:
    """The equations, on fp32 tensors."""
    error = weight * mean((p - y).square())
    if r is None:
        return Errors(error, None if reference_error is None else weight * reference_error - error)
    advantage = weight * mean((r - p) * (p + r - 2 * y))
    return Errors(error, advantage, weight * mean((p - r).square()) if drift else None)


def flat_mean(values: Tensor) -> Tensor:
    """[N,...] -> [N]"""
    return values.flatten(1).mean(1)


def masked_mean(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """m [N,...] -> the function [N,...] -> Σ m·values / Σ m [N], 0 where m keeps nothing."""
    m = mask.flatten(1)
    count = m.sum(1)
    rate = torch.where(count > 0, 1 / count.where(count > 0, 1.0), 0.0)
    return lambda values: (m * values.flatten(1)).sum(1) * rate


def parts(target: Tensor | Mixture) -> dict[str, Tensor]:
    """A target as kernels take it."""
    if isinstance(target, Mixture):
        return {"target": target.x0, "noise": target.noise, "by_x0": target.by_x0, "by_noise": target.by_noise}
    return {"target": target}


def check_kernel(kernel: str, device: torch.device) -> bool:
    """`use_triton`, to be asked before a run; where it does, the kernels are imported, so that what is broken
    about Triton is known at the start."""
    computes = use_triton(kernel, device)
    if computes:
        from diffpref.triton_kernels import preference_head  # noqa: F401
    return computes


@torch.no_grad()
def residual_overlap(policy: Tensor, target: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    """w·mean (p − y)_chosen·(p − y)_rejected, [P]: positive where what fits one item better fits the other worse or
    better alike, the residuals being the gradients of both errors at the model's output.

    Args:
        policy: p [N,...].
        target: y [N,...].
        weight: w [N].
        pairs: [P,2] item indices.
    """
    residual = policy.float() - target.float()
    return weight[pairs[:, 0]] * (residual[pairs[:, 0]] * residual[pairs[:, 1]]).flatten(1).mean(1)
