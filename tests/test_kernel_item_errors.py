"""The kernel of item errors against fp64, PyTorch's path, and itself: layouts, dtypes, masks, order, precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, ON, STEP, Work, exact, inputs, poisoned, relative, seeded  # noqa: F401

from diffpref.errors import Mixture, check_kernel, item_errors
from diffpref.triton_kernels import item_errors as kernels
from diffpref.triton_kernels.blocks import launches, memory_order, splits_of

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(3, 4, 23, 19), (5, 3, 7, 5), (7, 1), (3, 61, 16), (2, 3, 5, 7, 9), (1, 2, 3)]
MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F16), (F32, F16, BF16), (F64, F32, F32)]
CASES = [(shape, MIXES[0]) for shape in SHAPES] + [((3, 5, 7, 9), mix) for mix in MIXES[1:]]


def triton(*arguments, **options):
    return item_errors(*arguments, **options, kernel="triton")


def gradient(p, found, by):
    """dL/dp where by [3,N] is dL/d(error, advantage, drift)."""
    values = [x for x in (found.policy, found.advantage, found.drift) if x is not None]
    return torch.autograd.grad(sum((c.to(x.dtype) * x).sum() for c, x in zip(by, values, strict=False)), p)[0]


# --- against fp64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize(("shape", "dtypes"), CASES, ids=str)
def test_values_and_gradients_match_fp64(shape, dtypes, drift):
    p, r, y, w = inputs(shape, dtypes, gap=0.1)
    by = torch.randn(3, shape[0], generator=seeded(1)).to(ON) * 7
    p.requires_grad_()
    found = triton(p, r, y, w, drift=drift)
    error, advantage, distance = exact(p.detach(), r, y, w)
    assert found.policy.dtype == found.advantage.dtype == F32
    assert relative(found.policy, error) < 1e-6
    assert relative(found.advantage, advantage) < 1e-6
    assert (found.drift is None) == (not drift)
    if drift:
        assert relative(found.drift, distance) < 1e-6
    grad, n = gradient(p, found, by), p[0].numel()
    wide = [(x * w).double().view(-1, *(1,) * (p.ndim - 1)) for x in by]
    expected = 2 / n * ((wide[0] - wide[1]) * (p.double() - y.double()))
    if drift:
        expected = expected + 2 / n * wide[2] * (p.double() - r.double())
    assert grad.dtype == p.dtype and grad.shape == p.shape
    assert relative(grad, expected) < 2 * STEP[p.dtype] + 1e-6
    ours = item_errors(p, r, y, w, drift=drift, kernel="torch")
    torchs = relative(gradient(p, ours, by), expected)
    cut = 2 if p.dtype == BF16 and ON.type == "cpu" else 1  # the interpreter cuts off where GPUs and PyTorch round
    assert relative(grad, expected) <= cut * 2 * torchs + 1e-7


def test_an_item_of_many_blocks():
    """More blocks than partial sums: each program adds up several, and the last one is not full."""
    n = 64 * 2048 + 1901
    assert splits_of(n)[1] == 2
    p, r, y, w = inputs((2, n))
    p.requires_grad_()
    found = triton(p, r, y, w)
    error, advantage, _ = exact(p.detach(), r, y, w)
    assert relative(found.policy, error) < 1e-6 and relative(found.advantage, advantage) < 1e-6
    grad = torch.autograd.grad(found.advantage.sum(), p)[0]
    expected = -2 / n * w[:, None].double() * (p - y).detach().double()
    assert relative(grad, expected) < 1e-6


def test_no_items_and_no_elements():
    found = triton(torch.empty(0, 4, 8, 8, device=ON), None, torch.empty(0, 4, 8, 8, device=ON), torch.ones(0).to(ON))
    assert found.policy.shape == (0,) and found.advantage is None


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other item": lambda x: x.repeat_interleave(2, 0)[::2],
    "part of a picture": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("target_layout", ["contiguous", "same"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(layout, target_layout):
    p, r, y, w = inputs((3, 4, 6, 5))
    plain = triton(p.requires_grad_(), r, y, w, drift=True)
    other = p.detach()
    other = LAYOUTS[layout](other).requires_grad_()
    assert other.stride() != p.stride()
    same = target_layout == "same"
    found = triton(other, LAYOUTS[layout](r), LAYOUTS[layout](y) if same else y, w, drift=True)
    torch.testing.assert_close(found.advantage, plain.advantage, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.drift, plain.drift, rtol=1e-5, atol=1e-9)
    by = torch.ones(3, 3, device=ON)
    grad = gradient(other, found, by)
    torch.testing.assert_close(grad, gradient(p, plain, by), rtol=1e-6, atol=1e-9)
    if layout == "channels_last":
        assert grad.is_contiguous(memory_format=torch.channels_last) and memory_order(grad) == [2, 3, 1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_target_that_items_share_is_not_written_out(layout, monkeypatch):
    """Stride 0: in the same layout nothing is copied, in another one a single item is."""
    p, r, y, w = inputs((4, 3, 6, 5))
    shared = y[:1].expand(y.shape)
    expected = triton(p, r, shared.contiguous(), w)
    p = p if layout == "contiguous" else p.to(memory_format=torch.channels_last)
    r = r.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else r
    with Work(monkeypatch) as work:
        found = triton(p, r, shared, w)
    kernels_only = ["partial_sums_kernel", "item_sums_kernel"]
    assert work.ops == (kernels_only if layout == "contiguous" else ["copy_", *kernels_only])
    assert torch.equal(found.policy, expected.policy) or layout == "channels_last"
    torch.testing.assert_close(found.advantage, expected.advantage, rtol=1e-5, atol=1e-9)


# --- masks ------------------------------------------------------------------------------------------------------------


def masks() -> dict[str, torch.Tensor]:
    """For predictions [4,3,6,5]; the third item of each keeps nothing, where there are several."""
    g = seeded(3)
    found = {
        "spatial": (4, 1, 6, 5),
        "rows": (4, 1, 6, 1),
        "items": (4, 1, 1, 1),
        "full": (4, 3, 6, 5),
        "no run of dimensions": (4, 3, 1, 5),
        "shared": (1, 1, 6, 5),
    }
    drawn = {name: (torch.rand(shape, generator=g) > 0.4).to(ON) for name, shape in found.items()}
    for mask in drawn.values():
        mask[:1], mask[2:3] = True, False
    drawn["weights"] = drawn["spatial"] * torch.rand(4, 1, 6, 5, generator=g).to(ON)
    drawn["half weights"] = drawn["weights"].to(BF16)
    return drawn


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("name", masks())
def test_means_are_those_of_what_a_mask_keeps(name, kernel, layout):
    """What it does not keep may be NaN, and gets no gradient."""
    mask, (p, r, y, w) = masks()[name], inputs((4, 3, 6, 5), gap=0.1)
    clean = exact(p, r, y, w, mask)
    hidden = (mask == 0).expand(p.shape)
    p, r, y = (x.masked_fill(hidden, float("nan")) for x in (p, r, y))
    p = (p if layout == "contiguous" else p.contiguous(memory_format=torch.channels_last)).requires_grad_()
    found = item_errors(p, r, y, w, mask=mask, drift=True, kernel=kernel)
    for mine, expected in zip((found.policy, found.advantage, found.drift), clean, strict=True):
        assert relative(mine, expected) < 1e-6
    if name != "shared":
        assert not found.policy[2] and not found.advantage[2] and not found.drift[2]
    by = torch.randn(3, 4, generator=seeded(1)).to(ON)
    grad = gradient(p, found, by)
    assert not grad[hidden].any()
    q = p.detach().double().nan_to_num().requires_grad_()
    again = exact(q, r.nan_to_num(), y.nan_to_num(), w, mask)
    expected = torch.autograd.grad(sum((c * x).sum() for c, x in zip(by, again, strict=True)), q)[0]
    assert relative(grad, expected) < 1e-6


def test_tokens_and_video_take_masks():
    for shape, mask_shape in (((3, 7, 6), (3, 7, 1)), ((2, 3, 2, 4, 5), (2, 1, 2, 1, 1))):
        p, r, y, w = inputs(shape)
        mask = (torch.rand(mask_shape, generator=seeded(4)) > 0.3).to(ON)
        mask[:, :1] = True
        found = triton(p, r, y, w, mask=mask)
        assert relative(found.advantage, exact(p, r, y, w, mask)[1]) < 3e-6


# --- targets and references that are not there ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_a_mixed_target_is_the_written_one(kernel, dtype):
    p, r, x0, w = inputs((3, 4, 6, 5), (dtype, dtype, F32))
    noise, by_x0, by_noise = (torch.randn(s, generator=seeded(6)).to(ON) for s in (p.shape, (3,), (3,)))
    mixed = Mixture(x0, noise.to(memory_format=torch.channels_last), by_x0, by_noise)
    y = by_noise.double().view(3, 1, 1, 1) * noise.double() + by_x0.double().view(3, 1, 1, 1) * x0.double()
    p.requires_grad_()
    found = item_errors(p, r, mixed, w, kernel=kernel)
    error, advantage, _ = exact(p.detach(), r, y, w)
    assert relative(found.policy, error) < 1e-6 and relative(found.advantage, advantage) < 3e-6
    grad = torch.autograd.grad(found.policy.sum() * 3, p)[0]
    expected = 3 * 2 / 120 * w.double().view(3, 1, 1, 1) * (p.double() - y)
    assert relative(grad, expected.detach()) < 2 * STEP[dtype] + 1e-6


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_a_references_error_stands_for_the_reference(kernel):
    """A = w·e_ref − e; its gradient is −de/dp."""
    p, r, y, w = inputs((3, 4, 6, 5), gap=0.3)
    known = exact(r, r, y, torch.ones_like(w))[0].float()
    p.requires_grad_()
    found = item_errors(p, None, y, w, reference_error=known, kernel=kernel)
    torch.testing.assert_close(found.advantage.double(), exact(p.detach(), r, y, w)[1], rtol=0, atol=1e-6)
    by_advantage = torch.autograd.grad(found.advantage.sum(), p, retain_graph=True)[0]
    assert torch.equal(by_advantage, -torch.autograd.grad(found.policy.sum(), p)[0])


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_equal_predictions_have_no_advantage_over_a_kept_error_either(kernel):
    """The kept number is fp32; where it is that of this very prediction, the loss starts at ln 2."""
    p, _, y, w = inputs((5, 4, 7, 9))
    known = item_errors(p, None, y, torch.ones_like(w), kernel=kernel).policy
    found = item_errors(p, None, y, torch.ones_like(w), reference_error=known, kernel=kernel)
    assert not found.advantage.any()


def test_without_a_reference_there_is_no_advantage():
    p, _, y, w = inputs((3, 4, 6, 5))
    found = triton(p, None, y, w, drift=True)
    assert found.advantage is None and found.drift is None


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_equal_predictions_have_an_advantage_of_exactly_zero(dtype):
    p, _, y, w = inputs((3, 4, 23, 19), (dtype,) * 3)
    found = triton(p, p.clone(), y, w, drift=True)
    assert not found.advantage.any() and not found.drift.any()


def test_bits_depend_on_the_item_alone():
    """The same again, in another order, and alone."""
    p, r, y, w = inputs((5, 4, 23, 19), (BF16, BF16, F32))
    p.requires_grad_()
    order = torch.tensor([3, 0, 4, 2, 1], device=ON)
    by = torch.randn(3, 5, generator=seeded(1)).to(ON)

    def results(keep):
        q = p.detach()[keep].requires_grad_()
        found = triton(q, r[keep], y[keep], w[keep], drift=True)
        return found.policy, found.advantage, found.drift, gradient(q, found, by[:, keep])

    every = results(torch.arange(5, device=ON))
    for keep in (torch.arange(5, device=ON), order, order[1:2]):
        for one, other in zip(results(keep), every, strict=True):
            assert torch.equal(one, other[keep])


def test_the_gradient_is_scaled_before_it_is_cast():
    """fp16 with a gradient that at scale 1 is below the smallest number it has, and a scaler's 2^16 above."""
    p, r, y, w = inputs((2, 4, 31, 37), (F16,) * 3)
    by, n = 1e-5, 4 * 31 * 37
    p.requires_grad_()
    grad = torch.autograd.grad((triton(p, r, y, w).policy * by).sum() * 2.0**16, p)[0]
    expected = 2.0**16 * by * 2 / n * w.double().view(-1, 1, 1, 1) * (p.double() - y.double())
    assert relative(grad, expected.detach()) < 2 * STEP[F16]


# --- precision of the logit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("gap", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_logit_is_ten_times_as_exact_as_that_of_separate_means(dtype, gap, kernel):
    """Diffusers' script takes the mean squared errors of policy and reference in fp32 and subtracts. β = 5000."""
    p, r, y, _ = inputs((8, 4, 16, 16), (dtype,) * 3, gap)
    w = torch.ones(8, device=ON)

    def logits(advantage):
        return 2500 * (advantage[:4] - advantage[4:]).double()

    means = [(x.float() - y.float()).pow(2).mean([1, 2, 3]) for x in (r, p)]
    truth = logits(exact(p, r, y, w)[1])
    theirs = (logits(means[0] - means[1]) - truth).abs().max()
    ours = (logits(item_errors(p, r, y, w, kernel=kernel).advantage) - truth).abs().max()
    assert ours <= theirs / 10


# --- autograd and compilers -------------------------------------------------------------------------------------------


def test_launches():
    p, r, y, w = inputs((3, 4, 6, 5))
    with launches() as names:
        found = triton(p.requires_grad_(), r, y, w, drift=True)
        gradient(p, found, torch.ones(3, 3, device=ON))
    assert names == ["partial_sums_kernel", "item_sums_kernel", "gradient_kernel"]


def test_there_is_no_second_derivative():
    p, r, y, w = inputs((2, 3, 5))
    grad = torch.autograd.grad(triton(p.requires_grad_(), r, y, w).policy.square().sum(), p, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them all
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_the_operator_is_sound():
    p, r, y, w = inputs((3, 2, 5, 3))
    known, none = w.clone(), (None,) * 3
    mask = torch.ones(3, 1, 5, 3, dtype=torch.bool, device=ON)
    p.requires_grad_()
    torch.library.opcheck(kernels.errors_op, (p, r, y, w, None, *none, mask, True))
    torch.library.opcheck(kernels.errors_op, (p, None, y, w, known, r, w, w, None, False))
    torch.library.opcheck(kernels.gradient_op, (p.detach(), r, y, *none, mask, w, w, None, w))


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_operator_is_one_graph_inside_a_compiled_function(backend):
    p, r, y, w = inputs((3, 2, 5, 3))
    p.requires_grad_()

    def loss(p):
        found = triton(p * 2, r, y, w, drift=True)
        return (found.policy * w + found.advantage - found.drift).square().sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    one, other = compiled(p), loss(p)
    assert torch.equal(one, other)
    assert torch.equal(torch.autograd.grad(one, p)[0], torch.autograd.grad(other, p)[0])


# --- who computes -----------------------------------------------------------------------------------------------------


def test_auto_is_pytorch_on_the_cpu():
    p, r, y, w = (x.cpu() for x in inputs((3, 2, 5, 3)))
    with launches() as names:
        auto = item_errors(p, r, y, w)
    assert not names and not check_kernel("auto", torch.device("cpu"))
    assert torch.equal(auto.advantage, item_errors(p, r, y, w, kernel="torch").advantage)


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p, r, y, w = (x.cpu() for x in inputs((3, 2, 5, 3)))
    with pytest.raises(ValueError, match="no driver for tensors on cpu; set it to auto or torch"):
        item_errors(p, r, y, w, kernel="triton")
    with pytest.raises(ValueError, match="train.kernel triton cannot run"):
        check_kernel("triton", torch.device("cpu"))
    assert not check_kernel("auto", torch.device("cpu"))


def test_the_kernels_are_imported_at_the_start():
    assert check_kernel("triton", ON) and "diffpref.triton_kernels.preference_head" in sys.modules


WRONG = {
    "another shape": (lambda p, r, y, w: triton(p, r, y[:, :1], w), "the target is .3, 1, 5, 3. .* expand or move it"),
    "a mask's dimensions": (
        lambda p, r, y, w: triton(p, r, y, w, mask=torch.ones(3, 5, 3, device=ON)),
        "does not fit predictions .* as many dimensions",
    ),
    "a mask's size": (
        lambda p, r, y, w: item_errors(p, r, y, w, mask=torch.ones(3, 1, 5, 2, device=ON), kernel="torch"),
        "does not fit predictions",
    ),
    "drift of an error": (
        lambda p, r, y, w: item_errors(p, None, y, w, reference_error=w, drift=True),
        "give the prediction",
    ),
    "gradient of the reference": (
        lambda p, r, y, w: triton(p, r.requires_grad_(), y, w),
        "no gradient to the reference; detach it, or set train.kernel to torch",
    ),
    "unknown": (lambda p, r, y, w: item_errors(p, r, y, w, kernel="cuda"), "known: auto, torch, triton"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(*inputs((3, 2, 5, 3)))


def test_who_does_not_ask_for_triton_does_not_import_it():
    code = "import sys, diffpref.errors, diffpref.pair_loss; print('triton' in sys.modules)"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root / "tests", capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
