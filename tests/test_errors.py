"""Item errors against fp64."""

import pytest
import torch

from diffpref.batch import Structure
from diffpref.config import ObjectiveConfig
from diffpref.errors import item_errors
from diffpref.objectives import total

SHAPES = [(4, 4, 8, 8), (2, 3, 7, 5), (1, 16, 4, 4), (6, 33, 17)]


def tensors(shape, gap=1e-3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    policy, target = (torch.randn(shape, generator=g) for _ in range(2))
    return (policy).to(dtype), (policy + gap * torch.randn(shape, generator=g)).to(dtype), target.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_and_advantage_match_fp64(shape):
    policy, reference, target = tensors(shape)
    p, r, y = (x.double().flatten(1) for x in (policy, reference, target))
    errors = item_errors(policy, reference, target, torch.ones(len(policy)))
    torch.testing.assert_close(errors.policy.double(), (p - y).square().mean(1), rtol=1e-6, atol=0)
    exact = (r - y).square().mean(1) - (p - y).square().mean(1)
    torch.testing.assert_close(errors.advantage.double(), exact, rtol=1e-5, atol=1e-10)


def test_advantage_keeps_digits_that_a_difference_of_means_loses():
    """At policies this close to the reference, the logit's error must be far below that of subtracting two fp32
    means."""
    policy, reference, target = tensors((64, 4, 64, 64), gap=1e-5)
    p, r, y = (x.double().flatten(1) for x in (policy, reference, target))
    exact = (r - y).square().mean(1) - (p - y).square().mean(1)
    naive = (reference - target).square().flatten(1).mean(1) - (policy - target).square().flatten(1).mean(1)
    ours = item_errors(policy, reference, target, torch.ones(len(policy))).advantage
    assert (ours - exact).abs().max() < 0.1 * (naive - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_predictions_give_exactly_zero_advantage_in_fp32(dtype):
    policy, _, target = tensors((3, 4, 8, 8), dtype=dtype)
    errors = item_errors(policy, policy.clone(), target, torch.ones(3))
    assert errors.policy.dtype == errors.advantage.dtype == torch.float32
    assert errors.advantage.abs().max() == 0


def test_gradient_of_the_advantage_is_minus_that_of_the_error():
    policy, reference, target = tensors((2, 3, 5, 5))
    policy.requires_grad_(True)
    errors = item_errors(policy, reference, target, torch.ones(len(policy)))
    (by_error,) = torch.autograd.grad(errors.policy.sum(), policy, retain_graph=True)
    (by_advantage,) = torch.autograd.grad(errors.advantage.sum(), policy)
    torch.testing.assert_close(by_advantage, -by_error, rtol=1e-4, atol=1e-7)


def test_without_a_reference_there_is_no_advantage():
    policy, _, target = tensors((2, 3, 5, 5))
    assert item_errors(policy, None, target, torch.ones(2)).advantage is None


def test_flow_dpo_with_squared_weights_is_dpo_on_noise_errors():
    """x_t = (1−t)·x0 + t·ε: a velocity v says ε = x_t + (1−t)·v. Errors of v times (1−t)² are those of ε, so is the
    loss."""
    g = torch.Generator().manual_seed(2)
    x0, noise, v, reference = (torch.randn(4, 3, 5, 7, generator=g) for _ in range(4))
    t = torch.tensor([0.2, 0.2, 0.9, 0.9])
    wide = t.view(-1, 1, 1, 1)
    x_t = (1 - wide) * x0 + wide * noise
    in_noise = [x_t + (1 - wide) * p for p in (v, reference)]
    batch = Structure(torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    by_velocity, _ = total(item_errors(v, reference, noise - x0, (1 - t) ** 2), batch, ObjectiveConfig(beta=3.0))
    by_noise, _ = total(item_errors(*in_noise, noise, torch.ones(4)), batch, ObjectiveConfig(beta=3.0))
    torch.testing.assert_close(by_velocity, by_noise, rtol=1e-5, atol=0)
    plain, _ = total(item_errors(v, reference, noise - x0, torch.ones(4)), batch, ObjectiveConfig(beta=3.0))
    assert abs(plain - by_noise) > 0.01, "without the weight it is another loss"
