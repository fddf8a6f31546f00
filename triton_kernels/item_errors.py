"""Per-item squared errors, advantage and drift in one pass over the predictions, and their gradient in a second one.

    e = w·mean (p − y)²      A = w·mean (r − p)·((p − y) + (r − y))      drift = w·mean (p − r)²
    dL/dp = (2w/n)·[(dL/de − dL/dA)·(p − y) + dL/ddrift·(p − r)]

Three launches: partial sums, their sums by item, and the gradient. Sums are fp32 inside a program and fp64 over an
item's programs, whose number depends on n alone: an item's bits do not depend on the batch it is in. The target may be
mixed from x0 and noise on the way (y = a·x0 + b·ε), so that none is ever written. With a mask m the mean is that of
what it keeps, Σ m·d² / Σ m, and 0 where it keeps nothing; what it does not keep is not read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffpref.triton_kernels.blocks import block_of, dense, empty_like_items, laid_out_as, launch, splits_of, spread

# Columns of the partial sums.
ERROR = tl.constexpr(0)
ADVANTAGE = tl.constexpr(1)
DRIFT = tl.constexpr(2)
COUNT = tl.constexpr(3)
COLUMNS = tl.constexpr(4)
ITEMS = 32  # items that one program of the last sums takes


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def kept(mask, item, mask_row, divisor, modulus, off, inside, NARROW: tl.constexpr):
    """m [BLOCK] fp32 of an item's elements. Division of 64-bit integers is slow, so where 32 bits do they are taken."""
    place = off.to(tl.int32) if NARROW else off
    return tl.load(mask + item * mask_row + (place // divisor) % modulus, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def target_of(target, noise, by_x0, by_noise, item, target_row, noise_row, off, inside):
    """y [BLOCK] fp32: as it lies in memory, or mixed from x0 (in its place) and noise."""
    y = tl.load(target + item * target_row + off, mask=inside, other=0.0).to(tl.float32)
    if noise is not None:
        a, b = tl.load(by_x0 + item).to(tl.float32), tl.load(by_noise + item).to(tl.float32)
        y = a * y + b * tl.load(noise + item * noise_row + off, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def partial_sums_kernel(
    policy, reference, target, noise, by_x0, by_noise, mask,
    policy_row, reference_row, target_row, noise_row, mask_row, divisor, modulus,
    part, n, splits, iterations, WITH_DRIFT: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i·splits + k: sums of the k-th share of item i -> part [N, splits, COLUMNS] fp32."""
    program = tl.program_id(0).to(tl.int64)
    item, share = program // splits, program % splits
    error, advantage = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    drift, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(iterations):
        off = (share * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        inside = off < n
        m = 1.0
        if mask is not None:
            m = kept(mask, item, mask_row, divisor, modulus, off, inside, NARROW)
            count += m
            inside = inside & (m != 0)
        p = tl.load(policy + item * policy_row + off, mask=inside, other=0.0).to(tl.float32)
        y = target_of(target, noise, by_x0, by_noise, item, target_row, noise_row, off, inside)
        error += m * (p - y) * (p - y)
        if reference is not None:
            r = tl.load(reference + item * reference_row + off, mask=inside, other=0.0).to(tl.float32)
            advantage += m * (r - p) * ((p - y) + (r - y))
            if WITH_DRIFT:
                drift += m * (p - r) * (p - r)
    out = part + program * COLUMNS
    tl.store(out + ERROR, tl.sum(error, 0))
    if reference is not None:
        tl.store(out + ADVANTAGE, tl.sum(advantage, 0))
        if WITH_DRIFT:
            tl.store(out + DRIFT, tl.sum(drift, 0))
    if mask is not None:
        tl.store(out + COUNT, tl.sum(count, 0))


@triton.jit
def column(part, item, there, splits, COLUMN: tl.constexpr):
    """Sum of an item's shares in their order, fp64."""
    total = item * 0.0
    total = total.to(tl.float64)
    for k in range(splits):
        total += tl.load(part + (item * splits + k) * COLUMNS + COLUMN, mask=there, other=0.0).to(tl.float64)
    return total


@triton.jit
def rate_of(part, weight, weight_row, item, there, n, splits, MASKED: tl.constexpr):
    """w/n by item, fp64; with a mask n is what it keeps, and the rate 0 where that is nothing."""
    w = tl.load(weight + item * weight_row, mask=there, other=0.0).to(tl.float64)
    if MASKED:
        count = column(part, item, there, splits, COUNT)
        return tl.where(count > 0, w / tl.where(count > 0, count, 1.0), 0.0)
    else:
        return w / n


@triton.jit
def advantage_of(
    part, error, rate, weight, weight_row, reference_error, reference_error_row, item, there, splits,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """A by item, fp64: from the fused sums, or from the reference's error, known beforehand. That one is fp32, and so
    is the policy's before the two are compared: equal predictions have an advantage of 0."""
    if COMPARED:
        return rate * column(part, item, there, splits, ADVANTAGE)
    else:
        known = tl.load(reference_error + item * reference_error_row, mask=there, other=0.0).to(tl.float64)
        w = tl.load(weight + item * weight_row, mask=there, other=0.0).to(tl.float64)
        return (w * known).to(tl.float32).to(tl.float64) - error.to(tl.float32).to(tl.float64)


@triton.jit
def item_sums_kernel(
    part, weight, weight_row, reference_error, reference_error_row, error, advantage, drift, scale,
    items, n, splits, COMPARED: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Partial sums -> error, advantage, drift [N], and the gradient's scale 2w/n [N]."""
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    there = item < items
    rate = rate_of(part, weight, weight_row, item, there, n, splits, MASKED)
    e = rate * column(part, item, there, splits, ERROR)
    tl.store(error + item, e.to(tl.float32), mask=there)
    tl.store(scale + item, (2.0 * rate).to(tl.float32), mask=there)
    if advantage is not None:
        found = advantage_of(
            part, e, rate, weight, weight_row, reference_error, reference_error_row, item, there, splits, COMPARED
        )
        tl.store(advantage + item, found.to(tl.float32), mask=there)
    if drift is not None:
        tl.store(drift + item, (rate * column(part, item, there, splits, DRIFT)).to(tl.float32), mask=there)


@triton.jit
def gradient_kernel(
    policy, reference, target, noise, by_x0, by_noise, mask,
    policy_row, reference_row, target_row, noise_row, mask_row, divisor, modulus,
    scale, by_error, error_row, by_advantage, advantage_row, by_drift, drift_row, grad, n, blocks,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i·blocks + k: the k-th block of item i's gradient, scaled in fp32 and cast last."""
    program = tl.program_id(0).to(tl.int64)
    item, off = program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = off < n
    read, m = inside, 1.0
    if mask is not None:
        m = kept(mask, item, mask_row, divisor, modulus, off, inside, NARROW)
        read = inside & (m != 0)
    p = tl.load(policy + item * policy_row + off, mask=read, other=0.0).to(tl.float32)
    c = tl.load(scale + item)
    found = tl.zeros((BLOCK,), tl.float32)
    if by_error is not None or by_advantage is not None:
        by = 0.0
        if by_error is not None:
            by += tl.load(by_error + item * error_row)
        if by_advantage is not None:
            by -= tl.load(by_advantage + item * advantage_row)
        y = target_of(target, noise, by_x0, by_noise, item, target_row, noise_row, off, read)
        found += (c * by) * (p - y)
    if by_drift is not None:
        r = tl.load(reference + item * reference_row + off, mask=read, other=0.0).to(tl.float32)
        found += (c * tl.load(by_drift + item * drift_row)) * (p - r)
    tl.store(grad + item * n + off, (m * found).to(grad.dtype.element_ty), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wide:
    """The wide tensors, laid out alike: policy [N,...], reference, target (or x0, with noise and [N] coefficients),
    mask. Raises ValueError for shapes that do not fit."""

    policy: Tensor
    reference: Tensor | None
    target: Tensor
    noise: Tensor | None
    by_x0: Tensor | None
    by_noise: Tensor | None
    mask: Tensor | None

    @property
    def n(self) -> int:
        """Elements of an item."""
        return math.prod(self.policy.shape[1:])

    def arguments(self) -> tuple["Wide", list]:
        """(itself laid out alike, what the kernels take first)."""
        p = dense(self.policy)
        others = {"the reference's prediction": self.reference, "the target": self.target, "the noise": self.noise}
        r, y, e = (None if x is None else laid_out_as(x, p, name) for name, x in others.items())
        a, b = (None if x is None else x.contiguous() for x in (self.by_x0, self.by_noise))
        rows = [0 if x is None else x.stride(0) for x in (p, r, y, e)]
        if self.mask is None:
            return Wide(p, r, y, e, a, b, None), [p, r, y, e, a, b, None, *rows, 0, 1, 1]
        m = spread(self.mask, p)
        return Wide(p, r, y, e, a, b, self.mask), [p, r, y, e, a, b, m.values, *rows, m.row, m.divisor, m.modulus]


def row(values: Tensor | None) -> int:
    """The stride of a vector [N], which autograd likes to hand over as one number N times."""
    return 0 if values is None else values.stride(0)


def partial_sums(wide: Wide, drift: bool) -> Tensor:
    """One pass over the wide tensors -> [N, splits, COLUMNS] fp32; columns that nobody asked for are not written."""
    wide, arguments = wide.arguments()
    (block, warps), (splits, iterations) = block_of(wide.n), splits_of(wide.n)
    items = len(wide.policy)
    part = torch.empty(items, splits, COLUMNS.value, device=wide.policy.device)
    sizes = (part, wide.n, splits, iterations)
    options = {"WITH_DRIFT": drift, "NARROW": wide.n < 2**31, "BLOCK": block, "num_warps": warps}
    launch(partial_sums_kernel, items * splits, wide.policy, *arguments, *sizes, **options)
    return part


def forward(
    policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, reference_error: Tensor | None,
    noise: Tensor | None, by_x0: Tensor | None, by_noise: Tensor | None, mask: Tensor | None, drift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """error, advantage, drift [N] fp32 (empty where there is none), and scale [N] for the gradient."""
    wide = Wide(policy, reference, target, noise, by_x0, by_noise, mask)
    part, items = partial_sums(wide, drift), len(policy)
    outputs = shapes(policy, reference, reference_error, drift)
    error, advantage, drifts, scale = outputs
    launch(
        item_sums_kernel, triton.cdiv(items, ITEMS), policy,
        part, weight, row(weight), reference_error, row(reference_error),
        error, advantage if len(advantage) else None, drifts if len(drifts) else None, scale,
        items, wide.n, part.shape[1], COMPARED=reference is not None, MASKED=mask is not None, ITEMS=ITEMS, num_warps=1,
    )  # fmt: skip
    return outputs


def shapes(
    policy: Tensor, reference: Tensor | None, reference_error: Tensor | None, drift: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what `forward` gives."""
    items, compared = len(policy), reference is not None
    counts = (items, items * (compared or reference_error is not None), items * (compared and drift), items)
    error, advantage, drifts, scale = (policy.new_empty(count, dtype=torch.float32) for count in counts)
    return error, advantage, drifts, scale


def gradient(
    policy: Tensor, reference: Tensor | None, target: Tensor, noise: Tensor | None, by_x0: Tensor | None,
    by_noise: Tensor | None, mask: Tensor | None, scale: Tensor, by_error: Tensor | None, by_advantage: Tensor | None,
    by_drift: Tensor | None,
) -> Tensor:  # fmt: skip
    """dL/dp in p's dtype and layout, of dL/de, dL/dA, dL/ddrift [N], which are read on the device."""
    wide, arguments = Wide(policy, reference, target, noise, by_x0, by_noise, mask).arguments()
    (block, warps), items = block_of(wide.n), len(policy)
    blocks = triton.cdiv(wide.n, block)
    grad = empty_like_items(wide.policy, items, policy.dtype)
    by = (by_error, row(by_error), by_advantage, row(by_advantage), by_drift, row(by_drift))
    sizes = (grad, wide.n, blocks)
    options = {"NARROW": wide.n < 2**31, "BLOCK": block, "num_warps": warps}
    launch(gradient_kernel, items * blocks, policy, *arguments, scale, *by, *sizes, **options)
    return grad


# --- autograd, eager and compiled -------------------------------------------------------------------------------------


def remember(ctx, inputs: tuple, output: tuple) -> None:
    """What the gradient needs; the reference only where its drift does."""
    policy, reference, target, _, _, noise, by_x0, by_noise, mask, drift = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(policy, reference if drift else None, target, noise, by_x0, by_noise, mask, output[3])


def backward(compute: Callable[..., Tensor], ctx, *by: Tensor | None) -> tuple:
    """dL/de, dL/dA, dL/ddrift, one of no meaning -> gradients of `forward`'s ten inputs: the policy's, and none."""
    by_error, by_advantage, by_drift, _ = by
    reference = ctx.saved_tensors[1]
    by_drift = by_drift if reference is not None else None  # without a drift its gradient has no elements
    by_advantage = None if by_advantage is None or not len(by_advantage) else by_advantage
    grad = compute(*ctx.saved_tensors, by_error, by_advantage, by_drift)
    return (grad, *(None,) * 9)


class ItemErrors(torch.autograd.Function):
    """`forward` with its gradient, in eager mode, where it costs less than a custom operator."""

    forward = staticmethod(forward)
    setup_context = staticmethod(remember)
    backward: Callable[..., tuple] = staticmethod(once_differentiable(partial(backward, gradient)))


gradient_op = torch.library.custom_op("diffpref::item_errors_gradient", gradient, mutates_args=())
errors_op = torch.library.custom_op("diffpref::item_errors", forward, mutates_args=())


@gradient_op.register_fake
def _(policy, *_):
    return empty_like_items(dense(policy), len(policy), policy.dtype)


@errors_op.register_fake
def _(policy, reference, target, weight, reference_error, noise, by_x0, by_noise, mask, drift):
    return shapes(policy, reference, reference_error, drift)


errors_op.register_autograd(partial(backward, gradient_op), setup_context=remember)


def check_constant(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that wants a gradient, which kernels give to the policy's prediction only."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"Triton kernels give no gradient to the {name}; detach it, or set train.kernel to torch")


def item_errors(
    policy: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, *, drift: bool = False,
    mask: Tensor | None = None, reference_error: Tensor | None = None, noise: Tensor | None = None,
    by_x0: Tensor | None = None, by_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """error [N], advantage [N] or None, drift [N] or None: fp32, differentiable once, by the policy's prediction.

    Args:
        policy: p [N,...] of any float dtype, as all others.
        reference: r [N,...], or None.
        target: y [N,...]; with noise, x0.
        weight: w [N].
        drift: Whether the drift is asked for.
        mask: m, broadcasts to [N,...].
        reference_error: e_ref [N] without its weight, in the reference's place: A = w·e_ref − e.
        noise: ε [N,...]; the target is then by_x0·x0 + by_noise·ε.
        by_x0: [N].
        by_noise: [N].
    """
    constants = {"reference": reference, "target": target, "weight": weight, "reference's error": reference_error}
    check_constant(**constants, noise=noise, mask=mask)
    known = None if reference is not None else reference_error
    inputs = (policy, reference, target, weight, known, noise, by_x0, by_noise, mask, drift and reference is not None)
    found = errors_op(*inputs) if torch.compiler.is_compiling() else ItemErrors.apply(*inputs)
    error, advantage, drifts, _ = found
    compared = reference is not None or known is not None
    return error, advantage if compared else None, drifts if inputs[-1] else None
