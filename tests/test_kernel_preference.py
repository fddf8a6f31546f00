"""The loss of pairs in three launches, against errors and objectives in fp64."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, ON, STEP, Work, exact, inputs, poisoned, relative, seeded  # noqa: F401
from objective_cases import everything, lists, pairs

from diffpref.batch import Errors
from diffpref.config import ObjectiveConfig
from diffpref.errors import Mixture, item_errors
from diffpref.objectives import OBJECTIVES, total
from diffpref.pair_loss import LINKS, eligible, fused_total
from diffpref.triton_kernels import preference_head

pytestmark = pytest.mark.usefixtures("poisoned")

PLUGINS = [{}, {"margin_cap": 0.4}, {"winner_anchor": 2.0}]
OPTIONS = {"smpo": {"smoothing": 3.0, "probability_range": (0.3, 0.8)}, "osp": {"probability_range": (0.3, 0.8)}}


def settings(name: str = "dpo", beta: float = 200.0, **options) -> ObjectiveConfig:
    return ObjectiveConfig(name=name, beta=beta, **OPTIONS.get(name, {}), **options)


def structure(dtype=F32):
    """Groups of 2, 4 and 3 items with 10 pairs, weights 1, 0.5, 2, probabilities."""
    return everything(dtype).to(ON)


def expected(p, r, y, w, batch, config, mask=None):
    """Errors, loss, losses and dL/dp in fp64."""
    q = p.detach().double().requires_grad_()
    error, advantage, _ = exact(q, r, y, w, mask)
    wide = replace(batch, weight=batch.weight.double(), probability=None)
    if batch.probability is not None:
        wide = replace(wide, probability=batch.probability.double())
    loss, losses = total(Errors(error, advantage), wide, config)
    return Errors(error, advantage).detach(), loss.detach(), losses, torch.autograd.grad(loss, q)[0]


# --- against fp64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: next(iter(plugin), "plain"))
@pytest.mark.parametrize("name", LINKS)
def test_objectives_match_fp64(name, plugin):
    """Lists with weights: items in several pairs, every pair another weight; a gradient of 7 from above."""
    batch, config = structure(), settings(name, **plugin)
    p, r, y, w = inputs((9, 4, 7, 5), gap=0.02)
    errors, loss, losses, grad = expected(p, r, y, w, batch, config)
    p.requires_grad_()
    mine = fused_total(p, r, y, w, batch, config)
    assert relative(mine[0].policy, errors.policy) < 1e-6 and relative(mine[0].advantage, errors.advantage) < 1e-5
    assert relative(mine[1], loss) < 1e-6 and relative(mine[2], losses) < 1e-6
    assert relative(torch.autograd.grad(7 * mine[1], p)[0], 7 * grad) < 2e-6
    assert not any(x.requires_grad for x in (mine[0].policy, mine[0].advantage, mine[2]))
    if plugin == {"margin_cap": 0.4}:
        h = 100 * (errors.advantage[batch.chosen] - errors.advantage[batch.rejected])
        assert (h > 0.4).any() and (h < 0.4).any(), "the cap binds some pairs and not others"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_it_is_errors_and_objective_in_pytorch(dtype):
    """Half precision: within twice what PyTorch's own path is away from fp64."""
    batch, config = structure(), settings()
    p, r, y, w = inputs((9, 3, 11, 5), (dtype,) * 3, gap=0.05)
    _, loss, _, grad = expected(p, r, y, w, batch, config)
    p.requires_grad_()
    ours = total(item_errors(p, r, y, w, kernel="torch"), batch, config)[0]
    mine = fused_total(p, r, y, w, batch, config)[1]
    assert abs(mine.item() - loss.item()) <= 2 * abs(ours.item() - loss.item()) + 1e-6
    found = [relative(torch.autograd.grad(x, p)[0], grad) for x in (mine, ours)]
    cut = 2 if dtype == BF16 and ON.type == "cpu" else 1  # the interpreter cuts off where GPUs and PyTorch round
    assert found[0] <= cut * 2 * found[1] + 1e-6 and found[0] < 2 * STEP[dtype] + 2e-6


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_logit_is_ten_times_as_exact_as_that_of_separate_means(dtype):
    """ipo's loss at τ = ½ is (h − 1)²: its root gives the logit back. β = 5000."""
    p, r, y, _ = inputs((8, 4, 32, 32), (dtype,) * 3, gap=1e-2)
    w, batch = torch.ones(8, device=ON), pairs(4).to(ON)
    truth = 2500 * (exact(p, r, y, w)[1][:4] - exact(p, r, y, w)[1][4:])
    means = [(x.float() - y.float()).pow(2).mean([1, 2, 3]) for x in (r, p)]
    theirs = 2500 * ((means[0] - means[1])[:4] - (means[0] - means[1])[4:])
    losses = fused_total(p, r, y, w, batch, settings("ipo", 5000.0, ipo_tau=0.5))[2].double()
    mine = 1 + (truth - 1).sign() * losses.sqrt()
    assert (mine - truth).abs().max() <= (theirs - truth).abs().max() / 10


def test_more_pairs_and_items_than_a_program_takes():
    """73 items in groups of 2, 3, 4 and 1: three programs. 80 pairs: three rounds of each."""
    batch = lists(*([0.1, 0.9], [0.3, 0.2, 0.1], [0.5, 0.4, 0.9, 0.8]) * 8, [0.4]).to(ON)
    batch = replace(batch, weight=torch.rand(len(batch.weight), generator=seeded()).to(ON))
    assert len(batch.group) == 73 and len(batch.pairs) == 80
    p, r, y, w = inputs((73, 3, 5), gap=0.2)
    _, loss, losses, grad = expected(p, r, y, w, batch, settings())
    p.requires_grad_()
    mine = fused_total(p, r, y, w, batch, settings())
    assert relative(mine[1], loss) < 1e-6 and relative(mine[2], losses) < 1e-6
    assert relative(torch.autograd.grad(mine[1], p)[0], grad) < 2e-6


# --- exact numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo"])
def test_equal_predictions_cost_exactly_ln_2(name, count):
    p, _, y, w = inputs((2 * count, 3, 5), (BF16,) * 3)
    errors, loss, losses = fused_total(p, p.clone(), y, w, pairs(count).to(ON), settings(name, 5000.0))
    ln2 = torch.tensor(math.log(2), device=ON)
    assert not errors.advantage.any() and (losses == ln2).all() and torch.equal(loss, ln2)


@pytest.mark.parametrize("name", LINKS)
def test_logits_of_any_size_are_finite(name):
    """Far beyond where e^h overflows."""
    p, r, y, w = inputs((4, 3, 5), gap=10.0)
    batch = pairs(2, probability=torch.tensor([0.9, 0.2])).to(ON)
    config = settings(name, 1e6)
    _, loss, _, grad = expected(p, r, y, w, batch, config)
    mine = fused_total(p.requires_grad_(), r, y, w, batch, config)
    assert relative(mine[1], loss) < 1e-5 and mine[1].isfinite()
    assert (torch.autograd.grad(mine[1], p)[0] - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize("name", LINKS)
def test_a_prediction_that_is_nan_is_seen_in_the_loss(name):
    """None of the links, the cap and the anchor may take it for a number."""
    p, r, y, w = inputs((9, 3, 5))
    p[4, 1, 2] = float("nan")
    config = settings(name, margin_cap=0.4, winner_anchor=1.0)
    assert fused_total(p, r, y, w, structure(), config)[1].isnan()


def test_margin_and_accuracy():
    batch = pairs(3).to(ON)
    p, r, y, w = inputs((6, 3, 5), gap=0.3)
    r[1], r[4] = p[1], p[4]  # a tie
    rest = {"link": "logistic", "numbers": (1.0, 0.0, 0.0), "beta": 7.0}
    found = preference_head.preference_loss(p, r, y, w, batch.pairs, batch.group, batch.weight, **rest)
    advantage = exact(p, r, y, w)[1]
    margin = advantage[:3] - advantage[3:]
    assert relative(found[2], margin) < 1e-6 and not margin[1]
    assert torch.equal(found[3].double(), 0.5 + 0.5 * margin.sign())


def test_no_pairs_cost_nothing():
    batch = replace(pairs(2), pairs=torch.empty(0, 2, dtype=torch.long)).to(ON)
    p, r, y, w = inputs((4, 3, 5))
    errors, loss, losses = fused_total(p.requires_grad_(), r, y, w, batch, settings())
    assert not loss and not len(losses) and relative(errors.policy, exact(p, r, y, w)[0]) < 1e-6
    assert not torch.autograd.grad(loss, p)[0].any()


# --- what may be left out or come in another form ---------------------------------------------------------------------


def test_beta_may_be_a_tensor():
    p, r, y, w = inputs((9, 3, 5))
    by_number = fused_total(p, r, y, w, structure(), settings(beta=37.0))
    by_tensor = fused_total(p, r, y, w, structure(), settings(beta=1.0), beta=torch.tensor(37.0, device=ON))
    assert torch.equal(by_number[1], by_tensor[1])


def test_masks_reach_loss_and_gradient():
    batch, config = structure(), settings()
    p, r, y, w = inputs((9, 3, 6, 5), gap=0.1)
    mask = (torch.rand(9, 1, 6, 5, generator=seeded(2)) > 0.4).to(ON)
    mask[3] = False
    _, loss, losses, grad = expected(p, r, y, w, batch, config, mask)
    mine = fused_total(p.requires_grad_(), r, y, w, batch, config, mask=mask)
    assert relative(mine[1], loss) < 1e-6 and relative(mine[2], losses) < 1e-6
    found = torch.autograd.grad(mine[1], p)[0]
    assert relative(found, grad) < 2e-6 and not found[3].any()


def test_a_references_errors_and_a_mixed_target_do():
    batch, config = structure(), settings()
    p, r, x0, w = inputs((9, 3, 6, 5), gap=0.3)
    noise, by_x0, by_noise = (torch.randn(s, generator=seeded(6)).to(ON) for s in (p.shape, (9,), (9,)))
    mixed = Mixture(x0, noise, by_x0, by_noise)
    y = (by_noise.view(-1, 1, 1, 1) * noise + by_x0.view(-1, 1, 1, 1) * x0).double()
    known = exact(r, r, y, torch.ones_like(w))[0].float()
    _, loss, _, grad = expected(p, r, y, w, batch, config)
    mine = fused_total(p.requires_grad_(), None, mixed, w, batch, config, reference_error=known)
    assert relative(mine[1], loss) < 1e-4, "as exact as a difference of means"
    assert relative(torch.autograd.grad(mine[1], p)[0], grad) < 1e-4
    with pytest.raises(ValueError, match="needs the reference's prediction or its error"):
        fused_total(p, None, y, w, batch, config)


# --- bits, launches, waiting ------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_the_order():
    """The same again to the bit; pairs in another order have the same losses and gradients, their sum but for the last
    digit."""
    p, r, y, w = inputs((10, 3, 7, 5), (BF16, BF16, F32), gap=0.1)
    order = torch.tensor([3, 0, 4, 2, 1], device=ON)
    items = torch.cat([order, order + 5])
    both = []
    for keep, back in ((torch.arange(10, device=ON), order), (items, slice(None)), (items, slice(None))):
        q = p[keep].requires_grad_()
        _, loss, losses = fused_total(q, r[keep], y[keep], w[keep], pairs(5).to(ON), settings())
        grad = torch.autograd.grad(loss, q)[0]
        both.append((losses[back], grad if isinstance(back, slice) else grad[items], loss))
    assert all(torch.equal(one, other) for one, other in zip(both[1], both[2], strict=True))
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    assert relative(both[0][2], both[1][2]) < 1e-7


def test_forward_and_backward_are_three_launches_and_wait_for_nothing(monkeypatch):
    batch, config = structure(), settings("smpo")
    p, r, y, w = inputs((9, 4, 7, 5))
    p.requires_grad_()
    with Work(monkeypatch) as work:
        errors, loss, losses = fused_total(p, r, y, w, batch, config)
        loss.backward()
    assert work.ops == ["partial_sums_kernel", "preference_head_kernel", "ones_like", "gradient_kernel"]
    p.grad = None
    with Work(monkeypatch) as work:
        total(item_errors(p, r, y, w, kernel="torch"), batch, config)[0].backward()
    assert len(work.ops) > 40, "the counter sees what it should"


# --- which objectives, and compilers ----------------------------------------------------------------------------------


def test_which_objectives_it_has():
    batch = structure()
    assert {name for name in OBJECTIVES if eligible(settings(name), batch)} == set(LINKS)
    assert not eligible(settings("smpo"), replace(batch, probability=None)), "PyTorch's path says what is missing"
    for extra in ({"sft_weight": 0.1}, {"drift_weight": 0.1}, {"safeguard": 0.0}):
        assert not eligible(settings(**extra), batch)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them all
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_the_operator_is_sound_and_one_graph():
    batch = structure()
    p, r, y, w = inputs((9, 2, 3))
    p.requires_grad_()
    wide, rest = (p, r, y, w, None, None, None, None, None), (None, 9.0, None, 0.5, 1.0, "logistic", 1.0, 0.0, 0.0)
    torch.library.opcheck(preference_head.loss_op, (*wide, batch.pairs, batch.group, batch.weight, *rest))

    def loss(p):
        return fused_total(2 * p, r, y, w, batch, settings("exo"))[1].square()

    one, other = torch.compile(loss, backend="aot_eager", fullgraph=True)(p), loss(p)
    assert torch.equal(one, other)
    assert torch.equal(torch.autograd.grad(one, p)[0], torch.autograd.grad(other, p)[0])
