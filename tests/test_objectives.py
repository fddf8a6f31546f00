"""Objectives against hand-worked numbers; metrics."""

import math

import pytest
import torch

from diffpref.batch import Errors, Structure
from diffpref.objectives import OBJECTIVES, dpo, margin, preference_metrics, sft


def pairs(count: int) -> Structure:
    items = torch.arange(count)
    return Structure(items.repeat(2), torch.stack([items, items + count], 1), torch.ones(count))


def errors(advantage: list[float], policy: list[float] | None = None) -> Errors:
    values = torch.tensor(advantage, dtype=torch.float64)
    return Errors(torch.tensor(policy, dtype=torch.float64) if policy else 0.3 - values, values)


def test_dpo_is_ln2_where_policy_equals_reference():
    assert torch.equal(
        dpo(errors([0, 0, 0, 0]), pairs(2), beta=5000.0), torch.full((2,), math.log(2), dtype=torch.float64)
    )


def test_dpo_by_hand():
    """β = 5000, A = (2e-4, -1e-4), (0, 4e-4): h = 2500·(3e-4) = 0.75 and 2500·(-4e-4) = -1."""
    loss = dpo(errors([2e-4, 0.0, -1e-4, 4e-4]), pairs(2), beta=5000.0)
    expected = [math.log1p(math.exp(-0.75)), math.log1p(math.exp(1.0))]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_dpo_gradient_at_the_reference_is_a_quarter_beta():
    """dL/de_w = +β/4 and dL/de_l = −β/4 per pair (objectives.md, section 0: σ(0)·β/2)."""
    advantage = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    dpo(Errors(0.3 - advantage, advantage), pairs(1), beta=100.0).sum().backward()
    assert advantage.grad.tolist() == [-25.0, 25.0]


def test_dpo_gradcheck():
    advantage = torch.tensor([1e-3, -2e-3, 5e-4, 3e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: dpo(Errors(0.3 - a, a), pairs(2), beta=500.0), advantage, eps=1e-7)


def test_swapping_a_pair_flips_the_margin():
    batch, values = pairs(2), errors([3e-4, 1e-4, -2e-4, 5e-4])
    swapped = Structure(batch.group, batch.pairs.flip(1), batch.weight)
    assert torch.equal(margin(values, batch), -margin(values, swapped))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_permuting_the_pairs_permutes_the_losses(name):
    batch, order = pairs(3), torch.tensor([2, 0, 1])
    values = errors([1e-4, 2e-4, 3e-4, -1e-4, 0.0, 4e-4], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    permuted = Structure(batch.group, batch.pairs[order], batch.weight)
    loss = OBJECTIVES[name].loss
    assert torch.equal(loss(values, batch, beta=100.0)[order], loss(values, permuted, beta=100.0))


def test_sft_is_the_winners_error_and_needs_no_reference():
    values = Errors(torch.tensor([0.1, 0.2, 0.7, 0.9]))
    assert sft(values, pairs(2), beta=1.0).tolist() == pytest.approx([0.1, 0.2])
    assert not OBJECTIVES["sft"].reference


def test_metrics_by_hand():
    """β = 1000: rewards are 500·A; a margin of exactly zero counts half."""
    metrics = preference_metrics(errors([2e-3, 1e-3, -1e-3, 1e-3], [0.1, 0.2, 0.3, 0.4]), pairs(2), beta=1000.0)
    expected = {
        "rewards/chosen": [1.0, 0.5],
        "rewards/rejected": [-0.5, 0.5],
        "rewards/margins": [1.5, 0.0],
        "rewards/accuracies": [1.0, 0.5],
        "drift/chosen": [-2e-3, -1e-3],
        "drift/rejected": [1e-3, -1e-3],
        "errors/chosen": [0.1, 0.2],
        "errors/rejected": [0.3, 0.4],
    }
    assert {k: v.tolist() for k, v in metrics.items()} == {k: pytest.approx(v) for k, v in expected.items()}


def test_metrics_without_a_reference_are_the_errors():
    assert set(preference_metrics(Errors(torch.ones(2)), pairs(1), beta=1.0)) == {"errors/chosen", "errors/rejected"}


def test_a_capped_margin_pushes_up_to_the_cap_and_not_beyond():
    """β = 100: h = 50·(0.01, 0.06) = 0.5 and 3; a cap of 2 leaves the first as it is, the second without gradient."""
    advantage = torch.tensor([0.01, 0.06, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = dpo(Errors(0.3 - advantage, advantage), pairs(2), beta=100.0, margin_cap=2.0)
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(-2.0))]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    loss.sum().backward()
    assert advantage.grad[1] == advantage.grad[3] == 0 and advantage.grad[0] == -advantage.grad[2] < 0


def test_a_cap_is_for_pairs_that_are_won():
    lost = errors([-0.06, 0.0])
    assert torch.equal(dpo(lost, pairs(1), beta=100.0, margin_cap=2.0), dpo(lost, pairs(1), beta=100.0))
