"""Losses of lists and of several tastes by hand and what they are equal to; what holds for every loss."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LIST_LOSSES, PAIR_LOSSES, everything, logistic, run
from objective_cases import doubles, errors, is_close, lists, pairs
from objective_cases import run as run_objective
from scipy.special import expit
from torch import Tensor

from diffpref.batch import Structure
from diffpref.scorer.heads import Head, Judged
from diffpref.scorer.heads.micro import hedge
from diffpref.scorer.losses import LOSSES, LossConfig, total

# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_a_list_of_two_is_a_pair(name):
    scores = doubles([0.3, 1.4])
    torch.testing.assert_close(run(name, scores, lists([0.0, 1.0])), doubles([logistic(1.1)]))


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_a_list_of_two_equal_items_is_a_tie(name):
    """Half a pair each way. RankList's equal items share a level and do not compete."""
    expected = 0.0 if name == "rank_list" else (logistic(1.1) + logistic(-1.1)) / 2
    torch.testing.assert_close(run(name, doubles([0.3, 1.4]), lists([0.5, 0.5])), doubles([expected]))


def test_hps_is_the_cross_entropy_of_the_best():
    scores = doubles([0.3, 1.4, -0.2, 0.9, 0.1, 0.5, 0.2])
    found = run("hps", scores, lists([0.0, 1.0, 3.0, 2.0], [1.0, 2.0, 0.0]))
    first, second = F.cross_entropy(scores[:4], torch.tensor(2)), F.cross_entropy(scores[4:], torch.tensor(1))
    is_close(found, [first.item(), second.item()])


def test_hps_of_two_at_the_top():
    scores = doubles([0.3, 1.4, -0.2])
    found = run("hps", scores, lists([1.0, 1.0, 0.0]))
    is_close(found, [-scores.log_softmax(0)[:2].mean().item()])


def test_plackett_luce_by_hand():
    """Order 2, 0, 1: the two contests that are ones."""
    s = doubles([0.3, 1.4, -0.2])
    contests = [math.log(sum(map(math.exp, [1.4, 0.3, -0.2][i:]))) - [1.4, 0.3, -0.2][i] for i in range(3)]
    is_close(run("plackett_luce", s, lists([2.0, 3.0, 1.0])), [(contests[0] + contests[1]) / 2])
    is_close(run("plackett_luce", s, lists([2.0, 3.0, 1.0]), top=1), [contests[0]])


def test_plackett_luce_is_the_objective_on_lists():
    """diffusion_lpo with β = 2 has advantages for scores."""
    structure = lists([0.9, 0.2], [0.1, 0.7, 0.3, 1.0], [0.0, 0.8, 0.4])
    scores = torch.linspace(-1, 1, 9, dtype=torch.float64).sin()
    expected = run_objective("diffusion_lpo", errors(scores.tolist()), structure, beta=2.0)
    torch.testing.assert_close(run("plackett_luce", scores, structure), expected)


def test_the_first_place_of_plackett_luce_is_hps():
    structure, scores = lists([0.9, 0.2], [0.1, 0.7, 0.3, 1.0]), torch.linspace(-1, 1, 6).double()
    torch.testing.assert_close(run("plackett_luce", scores, structure, top=1), run("hps", scores, structure))


def test_breslow_keeps_all_equals_in_each_contest():
    """Two at the top, one below: twice the same contest."""
    s = [0.3, 1.4, -0.2]
    everyone = math.log(sum(map(math.exp, s)))
    is_close(run("plackett_luce", doubles(s), lists([1.0, 1.0, 0.0])), [(2 * everyone - s[0] - s[1]) / 2])


def test_efron_is_near_the_mean_over_orders():
    """Weights 1 and ½ by hand; and nearer than Breslow to the mean of the two orders of the equal items."""
    s = [0.3, 0.5, -0.2]
    e = [math.exp(x) for x in s]
    by_hand = (math.log(sum(e)) + math.log(e[2] + (e[0] + e[1]) / 2) - s[0] - s[1]) / 2
    efron = run("plackett_luce", doubles(s), lists([1.0, 1.0, 0.0]), list_ties="efron").item()
    breslow = run("plackett_luce", doubles(s), lists([1.0, 1.0, 0.0])).item()
    orders = [run("plackett_luce", doubles(s), lists(phi)).item() for phi in ([3.0, 2, 1], [2.0, 3, 1])]
    assert efron == pytest.approx(by_hand, abs=1e-12)
    assert abs(efron - sum(orders) / 2) < 0.01 < abs(breslow - sum(orders) / 2)


def test_top_counts_places_among_equals():
    """Three equals of four: with top 2, two of their contests count, the same under Breslow whichever they are."""
    s = doubles([0.3, 0.3, 0.3, -0.2])
    found = run("plackett_luce", s, lists([1.0, 1.0, 1.0, 0.0]), top=2)
    is_close(found, [s.logsumexp(0).item() - 0.3])


def test_rank_list_by_hand():
    """Levels 0, 1, 2, 3; skip 2 with weight ½."""
    s = [0.9, 0.1, 0.4, -0.3]
    lack = lambda j, i: math.exp(s[i] - s[j])  # noqa: E731
    terms = [lack(0, 1) + 0.5 * lack(0, 2), lack(1, 2) + 0.5 * lack(1, 3), lack(2, 3)]
    found = run("rank_list", doubles(s), lists([3.0, 2.0, 1.0, 0.0]), skip=2, skip_weight=0.5)
    is_close(found, [sum(math.log1p(t) for t in terms) / 3])


def test_rank_list_of_neighbours_is_ranknet_on_them():
    s, structure = doubles([0.9, 0.1, 0.4, -0.3]), lists([3.0, 2.0, 1.0, 0.0])
    is_close(run("rank_list", s, structure, skip=1), [(-F.logsigmoid(s[:-1] - s[1:])).mean().item()])


def test_rank_list_with_a_long_skip_is_plackett_luce():
    scores, structure = torch.linspace(-1, 1, 9).double().sin(), lists([0.9, 0.2], [0.1, 0.7, 0.3, 1], [0.0, 0.8, 0.4])
    torch.testing.assert_close(run("rank_list", scores, structure, skip=9), run("plackett_luce", scores, structure))


def test_rank_list_levels_skip_over_equals():
    """Levels 0, 1, 1, 2: both in the middle are neighbours of first and last, and not of one another."""
    s = [0.9, 0.1, 0.4, -0.3]
    lack = lambda j, i: math.exp(s[i] - s[j])  # noqa: E731
    terms = [lack(0, 1) + lack(0, 2), lack(1, 3), lack(2, 3)]
    found = run("rank_list", doubles(s), lists([3.0, 2.0, 2.0, 0.0]), skip=1)
    is_close(found, [sum(math.log1p(t) for t in terms) / 3])


# --- tastes -----------------------------------------------------------------------------------------------------------


def test_mixture_by_hand():
    """Weights ¼, ¾ and log-odds 1, −2."""
    f = doubles([[0.25, 0.75]] * 2)
    judged = Judged(doubles([0, 0]), components=doubles([[1.0, -2], [0, 0]]), mixture=f)
    likelihood = 0.25 * expit(1) + 0.75 * expit(-2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    is_close(run("mixture", judged, pairs(1)), [-math.log(likelihood) - 0.5 * entropy])


def test_a_mixture_of_one_taste_is_bradley_terry():
    scores = doubles([1.0, -2.0, 0.0, 0.0])
    judged = Judged(scores, components=scores[:, None], mixture=torch.ones(4, 1).double())
    structure = pairs(2, user=torch.zeros(4))
    expected = run("bradley_terry", scores, structure)
    torch.testing.assert_close(run("mixture", judged, structure), expected)
    shared = run("mixture", judged, structure, one_taste="user")
    torch.testing.assert_close(shared, expected.mean().expand(2))


def test_a_user_has_one_taste():
    """Users 0, 1, 0: −½·log Σ_k f_k·σ·σ for both pairs of user 0, −log Σ_k f_k·σ for user 1."""
    d = torch.tensor([[1.0, -2], [0.5, 0.2], [-1.0, 3]]).double()
    f = doubles([[0.25, 0.75]] * 6)
    judged = Judged(torch.zeros(6), components=torch.cat([d, torch.zeros(3, 2)]).double(), mixture=f)
    found = run("mixture", judged, pairs(3, user=torch.tensor([0, 1, 0] * 2)), one_taste="user", entropy_weight=0.0)
    p = torch.sigmoid(d)
    both, alone = -math.log(0.25 * p[0, 0] * p[2, 0] + 0.75 * p[0, 1] * p[2, 1]) / 2, -(f[0] @ p[1]).log().item()
    is_close(found, [both, alone, both])


def test_hedge_is_the_posterior():
    """Prior ¼, ¾; the choices are twice as probable under the first taste."""
    found = hedge(doubles([0.25, 0.75]), -doubles([0.4, 0.2]).log())
    is_close(found, [0.25 * 0.4 / (0.25 * 0.4 + 0.75 * 0.2), 0.6])
    is_close(hedge(doubles([0.25, 0.75]), doubles([1.0, 9.0]), temperature=1e12), [0.25, 0.75], 1e-9)


def test_routing_is_the_cross_entropy_to_hedge():
    """Weights ¼, ¾ and log-odds 1, −2 of a user's only pair; nothing but the router learns."""
    f = doubles([[0.25, 0.75]] * 2).requires_grad_()
    components = doubles([[1.0, -2], [0, 0]]).requires_grad_()
    judged = Judged(doubles([0, 0]), components=components, mixture=f)
    found = run("routing", judged, pairs(1, user=torch.zeros(2)))
    first, second = 0.25 * expit(1), 0.75 * expit(-2)
    is_close(found.detach(), [-(first * math.log(0.25) + second * math.log(0.75)) / (first + second)])
    found.sum().backward()
    assert components.grad is None and (f.grad[0] < 0).all()


# --- all of them ------------------------------------------------------------------------------------------------------


def leaves(judged: Judged) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in vars(judged).values()]


def rebuilt(values: list[Tensor]) -> Judged:
    return Judged(*values[:-1], mixture=values[-1] / values[-1].sum(-1, keepdim=True))


VARIANTS: list[tuple[str, dict]] = [(name, {}) for name in LOSSES if name != "routing"] + [
    ("bradley_terry", {"margin": "strength", "flip_below": 0.2, "label_smoothing": 0.1}),
    ("plackett_luce", {"list_ties": "efron", "top": 2}),
    ("mixture", {"one_taste": "user"}),
    ("gaussian", {"spread_average": "loss"}),
    ("hinge", {"hinge_smoothing": 0.7}),
    ("aspects", {"aspect_ties": "ignored"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradients_are_right(name, options):
    """Against finite differences. Of routing they would be wrong: its target has none, on purpose."""
    judged, structure = everything()

    def losses(*values: Tensor) -> Tensor:
        return run(name, rebuilt(list(values)), structure, **options)

    assert torch.autograd.gradcheck(losses, leaves(judged))


@pytest.mark.parametrize("name", LOSSES)
def test_the_numbering_of_items_and_pairs_does_not_matter(name):
    """Items and pairs in another order: the same losses, in that order."""
    judged, structure = everything()
    generator = torch.Generator().manual_seed(3)
    items, order = torch.randperm(9, generator=generator), torch.randperm(len(structure.pairs), generator=generator)
    place = items.argsort()
    moved = replace(
        structure,
        group=structure.group[items],
        pairs=place[structure.pairs[order]],
        scores=structure.scores[items],
        probability=structure.probability[order],
        user=structure.user[items],
        aspects=structure.aspects[order],
    )
    shuffled = Judged(*(value[items] for value in vars(judged).values()))
    before = run(name, judged, structure)
    expected = before[order] if LOSSES[name].over == "pairs" else before
    torch.testing.assert_close(run(name, shuffled, moved), expected)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "routing"])
def test_a_tie_has_no_winner(name):
    """Exchanging the items of pairs with probability ½ changes no loss; of others it does."""
    judged, structure = everything()
    turned = replace(structure, pairs=structure.pairs.flip(1), aspects=-structure.aspects)
    for probability, same in ((0.5, True), (0.9, False)):
        p = torch.full((len(structure.pairs),), probability, dtype=torch.float64)
        before, after = (run(name, judged, replace(s, probability=p)) for s in (structure, turned))
        assert torch.allclose(before, after) == same


@pytest.mark.parametrize("name", LOSSES)
def test_a_common_addition_to_the_scores_of_a_list_does_not_matter(name):
    judged, structure = everything()
    more = doubles([0.3, -5.0, 100.0])[structure.group]
    moved = replace(
        judged,
        scores=judged.scores + more,
        aspects=judged.aspects + more[:, None],
        components=judged.components + more[:, None],
    )
    torch.testing.assert_close(run(name, moved, structure), run(name, judged, structure))


def no_pairs() -> Structure:
    """One item in one group."""
    none = torch.zeros(0, dtype=torch.float64)
    pairs = torch.zeros(0, 2, dtype=torch.long)
    group = torch.zeros(1, dtype=torch.long)
    said = {"probability": none, "user": group, "aspects": none.reshape(0, 2)}
    return Structure(group, pairs, torch.ones(1), doubles([1.0]), **said)


class Differences(Head):
    """The base head's logit."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_of_one_item_has_no_loss(name):
    judged, _ = everything()
    one = Judged(*(value[:1].clone().requires_grad_() for value in vars(judged).values()))
    loss, losses = total(Differences(), one, no_pairs(), LossConfig(name=name))
    assert loss.item() == 0 and losses.sum() == 0
    loss.backward()
    assert all(value.grad is None or value.grad.abs().sum() == 0 for value in vars(one).values())


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite(name):
    """Scores of ±2000 in fp32: finite losses and gradients."""
    judged, structure = everything()
    said = [2000 * value for value in vars(judged).values()]
    values = [value.float().requires_grad_() for value in [*said[:-1], judged.mixture]]
    found = run(name, Judged(*values), structure)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(v.grad is None or v.grad.isfinite().all() for v in values)


def test_the_total_is_a_mean_in_groups_and_over_their_weights():
    judged, structure = everything()
    loss, losses = total(Differences(), judged, structure, LossConfig())
    group = structure.group[structure.chosen]
    means = torch.stack([losses[group == g].mean() for g in range(3)])
    assert loss.item() == pytest.approx((means * structure.weight).mean().item())


def test_orders_of_a_list_are_probabilities():
    """exp(−(k−1)·loss) over all orders of four items adds up to one."""
    scores = doubles([0.3, 1.4, -0.2, 0.9])
    losses = [run("plackett_luce", scores, lists([float(p) for p in order])).item() for order in permutations(range(4))]
    assert sum(math.exp(-3 * loss) for loss in losses) == pytest.approx(1)
