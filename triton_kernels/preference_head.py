"""From partial sums to the loss of pairs in one launch: errors, preference logit, link, weights, and what each item's
gradient is to be scaled with. With the partial sums before and the gradient after it a loss takes three launches.

    h = (β/2)·(A_chosen − A_rejected − λ·relu(−A_chosen)), at most cap
    L = 1/G·Σ_g weight_g·mean_{p in g} f(h_p)
    dL/dp_i = −(2·w_i/n)·(Σ_p ∂L/∂A_i)·(p_i − y_i)

The same as diffpref/objectives: pairs.py has the links f with their papers, total.py the weights. What is computed per
pair and item is fp64, which is nothing beside the wide tensors, and rounded to fp32 on the way out.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffpref.triton_kernels.blocks import launch
from diffpref.triton_kernels.item_errors import (
    ERROR,
    Wide,
    advantage_of,
    check_constant,
    column,
    gradient,
    gradient_op,
    partial_sums,
    rate_of,
    row,
)

ITEMS, PAIRS = 32, 32  # items that a program of the head writes; pairs that it looks at together


# --- links: h, P(chosen preferred) and three numbers -> f(h), f'(h) ---------------------------------------------------


@triton.jit
def sigmoids(h):
    """−ln σ(h), −ln σ(−h), σ(h), σ(−h), without overflow or cancellation.

    With e = e^−|h| and u = 1 + e, ln(u)·e/(u − 1) is log1p(e) to the last digit (Kahan).
    """
    e = tl.exp(-tl.abs(h))
    u = 1.0 + e
    flat = u == 1.0
    rest = tl.where(flat, e, tl.log(u) * (e / tl.where(flat, 1.0, u - 1.0)))
    near, far = 1.0 / u, e / u
    up = h > 0
    return (
        rest - tl.where(up, 0.0, h),
        rest + tl.where(up, h, 0.0),
        tl.where(up, near, far),
        tl.where(up, far, near),
    )


@triton.jit
def logistic(h, p, x, y, z):
    """−x·ln σ(h) − y·ln σ(−h)"""
    won, lost, up, down = sigmoids(h)
    return x * won + y * lost, y * up - x * down


@triton.jit
def soft_label(h, p, x, y, z):
    """−q·ln σ(h) − (1 − q)·ln σ(−h), q = p clipped to [x, y]"""
    won, lost, up, down = sigmoids(h)
    q = tl.where(p < x, x, tl.where(p > y, y, p))
    return q * won + (1.0 - q) * lost, (1.0 - q) * up - q * down


@triton.jit
def smoothed(h, p, x, y, z):
    """−ln σ(k·h), k = z·(2q − 1), q = p clipped to [x, y]"""
    k = z * (2.0 * tl.where(p < x, x, tl.where(p > y, y, p)) - 1.0)
    won, _, _, down = sigmoids(k * h)
    return won, -k * down


@triton.jit
def square(h, p, x, y, z):
    """(h − x)²"""
    return (h - x) * (h - x), 2.0 * (h - x)


@triton.jit
def hinge(h, p, x, y, z):
    """relu(1 − h)"""
    return tl.where(h > 1.0, 0.0, 1.0 - h), tl.where(h < 1.0, -1.0, 0.0)


@triton.jit
def exclusive(h, p, x, y, z):
    """σ(h)·(ln σ(h) − x) + σ(−h)·(ln σ(−h) − y)"""
    won, lost, up, down = sigmoids(h)
    return up * (-won - x) + down * (-lost - y), up * down * (h - x + y)


LINKS = {link.__name__: link for link in (logistic, soft_label, smoothed, square, hinge, exclusive)}


# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def judged(
    part, item, there, weight, weight_row, reference_error, reference_error_row, n, splits,
    COMPARED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """w/n, e, A of items, fp64."""
    rate = rate_of(part, weight, weight_row, item, there, n, splits, MASKED)
    e = rate * column(part, item, there, splits, ERROR)
    return rate, e, advantage_of(
        part, e, rate, weight, weight_row, reference_error, reference_error_row, item, there, splits, COMPARED
    )  # fmt: skip


@triton.jit
def pair_share(pairs, pairs_row, group, group_row, group_weight, group_weight_row, chosen, there, count, groups,
               PAIRS: tl.constexpr):  # fmt: skip
    """What a pair counts: its group's weight / (pairs of that group · groups), fp64."""
    mine = tl.load(group + chosen * group_row, mask=there, other=-1)
    same = tl.zeros((PAIRS,), tl.int32)
    for first in range(0, count, PAIRS):
        other = first + tl.arange(0, PAIRS)
        theirs = tl.load(pairs + other * pairs_row, mask=other < count, other=0)
        theirs = tl.load(group + theirs * group_row, mask=other < count, other=-2)
        same += tl.sum((mine[:, None] == theirs[None, :]).to(tl.int32), 1)
    weight = tl.load(group_weight + mine * group_weight_row, mask=there, other=0.0).to(tl.float64)
    return weight / (tl.where(there, same, 1).to(tl.float64) * groups)


@triton.jit
def preference_head_kernel(
    part, weight, weight_row, reference_error, reference_error_row, n, splits, items,
    pairs, pairs_row, pairs_column, group, group_row, group_weight, group_weight_row, probability, probability_row,
    count, groups, beta, cap, anchor, x, y, z,
    loss, losses, margin, accuracy, error, advantage, coefficient,
    LINK: tl.constexpr, COMPARED: tl.constexpr, MASKED: tl.constexpr, BETA_IN_MEMORY: tl.constexpr,
    ITEMS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Each program goes through all pairs and writes its own items' coefficients; the first one writes the loss."""
    program = tl.program_id(0)
    item = program.to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    rate, e, a = judged(
        part, item, item < items, weight, weight_row, reference_error, reference_error_row, n, splits, COMPARED, MASKED
    )
    tl.store(error + item, e.to(tl.float32), mask=item < items)
    tl.store(advantage + item, a.to(tl.float32), mask=item < items)
    half = tl.full((), 0.5, tl.float64) * (tl.load(beta) if BETA_IN_MEMORY else beta)
    slope, total = tl.zeros((ITEMS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    for first in range(0, count, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        there = pair < count
        chosen = tl.load(pairs + pair * pairs_row, mask=there, other=0)
        rejected = tl.load(pairs + pair * pairs_row + pairs_column, mask=there, other=0)
        _, _, won = judged(
            part, chosen, there, weight, weight_row, reference_error, reference_error_row, n, splits, COMPARED, MASKED
        )
        _, _, lost = judged(
            part, rejected, there, weight, weight_row, reference_error, reference_error_row, n, splits, COMPARED, MASKED
        )
        h = half * (won - lost - anchor * tl.where(won < 0, -won, 0.0))
        p = h
        if probability is not None:
            p = tl.load(probability + pair * probability_row, mask=there, other=0.5).to(tl.float64)
        f, by_h = LINK(tl.where(h > cap, cap, h), p, x, y, z)
        share = pair_share(
            pairs, pairs_row, group, group_row, group_weight, group_weight_row, chosen, there, count, groups, PAIRS
        )
        total += tl.where(there, share * f, 0.0)
        by_lost = tl.where(there & ~(h > cap), share * by_h * half, 0.0)
        by_won = by_lost * (1.0 + tl.where(won < 0, anchor, 0.0))
        slope += tl.sum(tl.where(item[:, None] == chosen[None, :], by_won[None, :], 0.0), 1)
        slope -= tl.sum(tl.where(item[:, None] == rejected[None, :], by_lost[None, :], 0.0), 1)
        if program == 0:
            tl.store(losses + pair, f.to(tl.float32), mask=there)
            tl.store(margin + pair, (won - lost).to(tl.float32), mask=there)
            sign = tl.where(won > lost, 1.0, tl.where(won == lost, 0.5, 0.0))
            tl.store(accuracy + pair, sign.to(tl.float32), mask=there)
    tl.store(coefficient + item, (-2.0 * rate * slope).to(tl.float32), mask=item < items)
    if program == 0:
        tl.store(loss, tl.sum(total, 0).to(tl.float32))


# --- launches and autograd --------------------------------------------------------------------------------------------


def forward(
    policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, reference_error: Tensor | None,
    noise: Tensor | None, by_x0: Tensor | None, by_noise: Tensor | None, mask: Tensor | None,
    pairs: Tensor, group: Tensor, group_weight: Tensor, probability: Tensor | None, beta: float,
    beta_in_memory: Tensor | None, cap: float, anchor: float, link: str, x: float, y: float, z: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [], losses, margin, accuracy [P], error, advantage, coefficient [N], all fp32."""
    wide = Wide(policy, reference, target, noise, by_x0, by_noise, mask)
    part, outputs = partial_sums(wide, drift=False), shapes(policy, pairs)
    items, known = len(policy), (reference_error, row(reference_error))
    launch(
        preference_head_kernel, max(1, triton.cdiv(items, ITEMS)), policy,
        part, weight, row(weight), *known, max(1, wide.n), part.shape[1], items,
        pairs, *pairs.stride(), group, row(group), group_weight, row(group_weight), probability, row(probability),
        len(pairs), len(group_weight), beta if beta_in_memory is None else beta_in_memory, cap, anchor, x, y, z,
        *outputs, LINK=LINKS[link], COMPARED=reference is not None, MASKED=mask is not None,
        BETA_IN_MEMORY=beta_in_memory is not None, ITEMS=ITEMS, PAIRS=PAIRS, num_warps=8,
    )  # fmt: skip
    return outputs


def shapes(policy: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `forward` gives."""
    loss = policy.new_empty((), dtype=torch.float32)
    losses, margin, accuracy = (policy.new_empty(len(pairs), dtype=torch.float32) for _ in range(3))
    error, advantage, coefficient = (policy.new_empty(len(policy), dtype=torch.float32) for _ in range(3))
    return loss, losses, margin, accuracy, error, advantage, coefficient


def remember(ctx, inputs: tuple, output: tuple) -> None:
    """What the gradient needs: no reference, but the coefficients."""
    policy, _, target, _, _, noise, by_x0, by_noise, mask = inputs[:9]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(policy, target, noise, by_x0, by_noise, mask, output[-1])
    ctx.inputs = len(inputs)


def backward(compute: Callable[..., Tensor], ctx, *by: Tensor | None) -> tuple:
    """Gradients of `forward`'s inputs: the policy's, and none. dL/dloss stays on the device."""
    policy, target, noise, by_x0, by_noise, mask, coefficient = ctx.saved_tensors
    by_loss = by[0].expand(len(policy))
    found = compute(policy, None, target, noise, by_x0, by_noise, mask, coefficient, by_loss, None, None)
    return (found, *(None,) * (ctx.inputs - 1))


class PreferenceLoss(torch.autograd.Function):
    """`forward` with its gradient, in eager mode."""

    forward = staticmethod(forward)
    setup_context = staticmethod(remember)
    backward: Callable[..., tuple] = staticmethod(once_differentiable(partial(backward, gradient)))


loss_op = torch.library.custom_op("diffpref::preference_loss", forward, mutates_args=())


@loss_op.register_fake
def _(policy, reference, target, weight, reference_error, noise, by_x0, by_noise, mask, pairs, *_):
    return shapes(policy, pairs)


loss_op.register_autograd(partial(backward, gradient_op), setup_context=remember)


def preference_loss(
    policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, pairs: Tensor, group: Tensor,
    group_weight: Tensor, *, link: str, numbers: tuple[float, float, float], beta: float | Tensor,
    cap: float | None = None, anchor: float = 0.0, probability: Tensor | None = None, mask: Tensor | None = None,
    reference_error: Tensor | None = None, noise: Tensor | None = None, by_x0: Tensor | None = None,
    by_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [] with graph; losses, margin (A_chosen − A_rejected), accuracy [P], error, advantage [N] without.

    Args:
        policy: p, and reference, target, weight, mask, reference_error, noise, by_x0, by_noise as in `item_errors`.
        pairs: [P,2] (chosen, rejected) items.
        group: [N], of each item.
        group_weight: [G].
        link: Name in LINKS.
        numbers: The link's x, y, z.
        beta: β, a number or a tensor [] on the device.
        cap: Logit beyond which a pair no longer pushes.
        anchor: λ.
        probability: [P], for the links that read it.
    """
    if reference is None and reference_error is None:
        raise ValueError("a preference needs the reference's prediction or its error; give one of them")
    constants = {"reference": reference, "target": target, "weight": weight, "reference's error": reference_error}
    check_constant(**constants, noise=noise, mask=mask)
    number, tensor = (0.0, beta) if isinstance(beta, Tensor) else (float(beta), None)
    known = None if reference is not None else reference_error
    inputs = (
        policy, reference, target, weight, known, noise, by_x0, by_noise, mask, pairs, group, group_weight, probability,
        number, tensor, float("inf") if cap is None else float(cap), float(anchor), link, *map(float, numbers),
    )  # fmt: skip
    found = loss_op(*inputs) if torch.compiler.is_compiling() else PreferenceLoss.apply(*inputs)
    return found[:6]
