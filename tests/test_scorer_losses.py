"""Losses of scorers by hand, against independent references, and what they are equal to."""

import math
from dataclasses import fields, replace
from itertools import permutations
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from objective_cases import doubles, errors, is_close, lists, pairs
from objective_cases import run as run_objective
from scipy import integrate
from scipy.special import expit
from torch import Tensor

from diffpref.batch import Structure
from diffpref.scorer.heads import HEADS, Head, HeadConfig, Judged, make_head
from diffpref.scorer.heads.micro import hedge
from diffpref.scorer.losses import LOSSES, LossConfig, check_loss, needs_fields, total
from diffpref.scorer.losses.config import LIMITS
from diffpref.scorer.losses.pairs import outcomes

LN2, LN3 = math.log(2), math.log(3)
PAIR_LOSSES = [name for name, row in LOSSES.items() if row.over == "pairs"]
LIST_LOSSES = [name for name, row in LOSSES.items() if row.over == "groups"]


def logistic(d: float) -> float:
    """−log σ(d)"""
    return math.log1p(math.exp(-d))


def run(name: str, scores: Tensor, structure: Structure, logit: Tensor | None = None, **options) -> Tensor:
    """The losses of items with scores [N]; of tastes, aspects or spreads, `scores` may be a Judged."""
    judged = scores if isinstance(scores, Judged) else Judged(scores=scores)
    if logit is None:
        logit = judged.scores[structure.chosen] - judged.scores[structure.rejected]
    config = replace(LossConfig(name=name), **options)
    row = LOSSES[name]
    return row.loss(judged, logit, structure, **{option: getattr(config, option) for option in row.options})


def everything(n: int = 9, tastes: int = 3, seed: int = 0) -> tuple[Judged, Structure]:
    """Groups of 2, 4 and 3 items and what any head may say of them; user and aspects too, with ties and gaps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = lists([0.9, 0.2], [0.1, 0.7, 0.7, 1.0], [0.0, 0.8, 0.4])
    count = len(batch.pairs)
    said = torch.tensor([1.0, -1.0, 0.0, math.nan]).repeat(count)[: 2 * count].reshape(count, 2).double()
    batch = replace(
        batch,
        weight=torch.tensor([1.0, 0.5, 2.0]),
        probability=torch.linspace(0.5, 1, count, dtype=torch.float64),
        user=torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0]),
        aspects=said,
    )
    mixture = draw(3, tastes).softmax(-1)[batch.group]
    return Judged(draw(n), draw(n, 2), draw(n).exp(), draw(n, 4), draw(n, tastes), mixture), batch


# --- pairs by hand ----------------------------------------------------------------------------------------------------


def test_bradley_terry():
    is_close(run("bradley_terry", doubles([1.0, 0, 0, 0]), pairs(2)), [logistic(1), LN2])


def test_a_constant_margin_is_taken_off_the_logit():
    found = run("bradley_terry", doubles([1.0, 0]), pairs(1), margin="constant", margin_size=0.57)
    is_close(found, [logistic(0.43)])


@pytest.mark.parametrize(
    ("strength", "fields", "expected"),
    [
        ("scores", {"scores": doubles([0.9, 0.4])}, 1 - 2 * 0.5),
        ("probability", {"probability": doubles([0.8])}, 1 - 2 * math.log(4)),
    ],
)
def test_an_adaptive_margin_is_in_proportion_to_the_strength(strength, fields, expected):
    options = {"margin": "strength", "margin_size": 2.0, "strength": strength}
    is_close(run("bradley_terry", doubles([1.0, 0]), pairs(1, **fields), **options), [logistic(expected)])


def test_weak_preferences_are_turned_round_with_their_margin():
    """Strengths −0.5 and 0.5: the first is read as its opposite with strength 0.5."""
    structure = pairs(2, scores=doubles([0.2, 0.9, 0.7, 0.4]))
    options = {"flip_below": 0.0, "margin": "strength"}
    found = run("bradley_terry", doubles([1.0, 1.0, 0, 0]), structure, **options)
    is_close(found, [logistic(-1 - 0.5), logistic(1 - 0.5)])


def test_without_margin_labels_are_only_turned_round():
    structure = pairs(1, scores=doubles([0.2, 0.9]))
    is_close(run("bradley_terry", doubles([1.0, 0]), structure, flip_below=0.0), [logistic(-1)])


def test_label_smoothing_is_the_mean_over_wrong_labels():
    found = run("bradley_terry", doubles([1.0, 0]), pairs(1), label_smoothing=0.1)
    is_close(found, [0.9 * logistic(1) + 0.1 * logistic(-1)])


def test_soft_label_is_the_divergence_of_the_softmax():
    """KL(q ‖ softmax(s)) as torch has it, for certain labels, soft ones and a tie."""
    scores, p = doubles([1.0, -0.5, 2.0, 0.3, 0.1, 0.4]), doubles([1.0, 0.7, 0.5])
    q, log_p = torch.stack([p, 1 - p], 1), torch.stack([scores[:3], scores[3:]], 1).log_softmax(1)
    found = run("soft_label", scores, pairs(3, probability=p))
    torch.testing.assert_close(found, F.kl_div(log_p, q, reduction="none").sum(1))


def test_soft_label_is_the_published_cross_entropy():
    """PickScore's code: −Σ q·log softmax, plus ln ½ for ties."""
    scores, p = doubles([1.0, -0.5, 0.3, 0.1]), doubles([1.0, 0.5])
    log_p = torch.stack([scores[:2], scores[2:]], 1).log_softmax(1)
    published = -(torch.stack([p, 1 - p], 1) * log_p).sum(1) + doubles([0, math.log(0.5)])
    torch.testing.assert_close(run("soft_label", scores, pairs(2, probability=p)), published)


def test_rao_kupper_where_scores_are_equal():
    """k = 5: won 1/6, lost 1/6, tied 4/6."""
    found = run("rao_kupper", torch.zeros(4).double(), pairs(2, probability=doubles([1.0, 0.5])))
    is_close(found, [math.log(6), math.log(6 / 4)])


def test_rao_kupper_outcomes_are_all_there_are():
    d = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for k in (1.01, 5.0, 40.0):
        torch.testing.assert_close(outcomes(d, k).exp().sum(-1), torch.ones_like(d))


@pytest.mark.parametrize(
    ("d", "smoothing", "expected"),
    [(0.25, 0.0, 0.75), (1.5, 0.0, 0.0), (0.25, 0.5, 0.5), (0.8, 0.5, 0.04), (-1.0, 5.0, 0.4), (-6.0, 5.0, 4.5)],
)
def test_hinge(d, smoothing, expected):
    """max(1 − d, 0); smoothed: (1 − d)²/(2γ) near the margin, 1 − γ/2 − d farther off."""
    is_close(run("hinge", doubles([d, 0]), pairs(1), hinge_smoothing=smoothing), [expected])


# --- spread -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("d", [-2.0, 0.5, 3.0])
def test_gaussian_is_the_integral(d, spread):
    """Both forms against adaptive quadrature; both items' spreads add as variances."""
    judged = Judged(doubles([d, 0]), spread=doubles([0.6, 0.8]) * spread)

    def mean(f) -> float:
        density = lambda z: math.exp(-0.5 * ((z - d) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))  # noqa: E731
        return integrate.quad(lambda z: f(z) * density(z), d - 12 * spread, d + 12 * spread)[0]

    is_close(run("gaussian", judged, pairs(1)), [-math.log(mean(expit))], 1e-6)
    is_close(run("gaussian", judged, pairs(1), spread_average="loss"), [mean(logistic)], 1e-6)


@pytest.mark.parametrize("average", ["probability", "loss"])
def test_without_spread_gaussian_is_bradley_terry(average):
    scores = doubles([1.0, -2.0, 0.0, 0.0])
    found = run("gaussian", Judged(scores, spread=torch.zeros(4).double()), pairs(2), spread_average=average)
    torch.testing.assert_close(found, run("bradley_terry", scores, pairs(2)))


def test_only_the_likelihood_has_a_use_for_spread():
    """Of a pair that went the wrong way, more spread lowers the likelihood's loss and raises the published one."""
    for average, sign in (("probability", -1), ("loss", 1)):
        spread = doubles([1.0, 1.0]).requires_grad_()
        run("gaussian", Judged(doubles([-2.0, 0]), spread=spread), pairs(1), spread_average=average).sum().backward()
        assert (spread.grad.sign() == sign).all()


# --- aspects ----------------------------------------------------------------------------------------------------------


def test_aspects_add_up_what_was_said():
    """Differences (1, 2, 3) and overall ½; said: better, worse, nothing."""
    judged = Judged(doubles([0.5, 0]), aspects=doubles([[1.0, 2, 3], [0, 0, 0]]))
    structure = pairs(1, aspects=doubles([[1, -1, math.nan]]))
    k = math.log(5)
    is_close(run("aspects", judged, structure), [logistic(1 - k) + logistic(-2 - k) + logistic(0.5)])
    options = {"aspect_ties": "ignored", "overall_weight": 2.0}
    is_close(run("aspects", judged, structure, **options), [logistic(1) + logistic(-2) + 2 * logistic(0.5)])


def test_a_tie_in_an_aspect():
    judged = Judged(doubles([0.0, 0]), aspects=doubles([[0.0], [0]]))
    structure = pairs(1, aspects=doubles([[0]]))
    is_close(run("aspects", judged, structure, overall_weight=0.0), [math.log(6 / 4)])
    is_close(run("aspects", judged, structure, overall_weight=0.0, aspect_ties="ignored"), [0])


def test_an_aspect_of_which_nothing_is_said_has_no_gradient():
    aspects = doubles([[1.0, 2], [0, 0]]).requires_grad_()
    structure = pairs(1, aspects=doubles([[math.nan, 1]]))
    run("aspects", Judged(doubles([0.0, 0]), aspects=aspects), structure).sum().backward()
    assert aspects.grad[:, 0].tolist() == [0, 0] and aspects.grad[0, 1] < 0


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


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_configuration_names_the_table():
    assert set(get_args(get_type_hints(LossConfig)["name"])) == set(LOSSES)
    used = set().union(*(row.options for row in LOSSES.values()))
    assert {field.name for field in fields(LossConfig)} == used | {"name"}
    assert {key.removeprefix("loss.") for key in LIMITS} <= used


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_are_within_their_limits(name):
    for key, (_, holds) in LIMITS.items():
        value = getattr(LossConfig(name=name), key.removeprefix("loss."))
        assert value is None or holds(value)


def test_an_option_of_another_loss_is_refused():
    words = r"loss\.skip is not used by loss\.name hps; leave it out \(it is for rank_list\)"
    with pytest.raises(ValueError, match=words):
        check_loss(LossConfig(name="hps", skip=3), "cosine")


@pytest.mark.parametrize(
    ("loss", "head", "able"),
    [
        ("gaussian", "cosine", "gaussian"),
        ("gpm", "pal", "gpm"),
        ("mixture", "pal", "micro"),
        ("aspects", "gpm", "aspects"),
    ],
)
def test_a_head_that_does_not_say_what_is_read_is_refused(loss, head, able):
    with pytest.raises(ValueError, match=rf"head\.name {head} does not give; heads that do: {able}$"):
        check_loss(LossConfig(name=loss), head)


def test_list_losses_want_scores_that_are_logits():
    for head in ("gpm", "micro"):
        with pytest.raises(ValueError, match="plackett_luce reads scores"):
            check_loss(LossConfig(name="plackett_luce"), head)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_allowed_works(head):
    """Every loss that a head may have, on what the head really says."""
    names = ["taste", "faith"] if head == "aspects" else None
    made = make_head(HeadConfig(name=head, names=names), width=8, users=2)
    _, structure = everything()
    image, text = (F.normalize(torch.randn(9, 8), dim=-1) for _ in range(2))
    judged = made(image, text, structure.user)
    allowed = [name for name, row in LOSSES.items() if row.reads <= HEADS[head].gives]
    assert "bradley_terry" in allowed
    for name in allowed:
        check_loss(LossConfig(name=name), head)
        loss, losses = total(made, judged, structure, LossConfig(name=name))
        assert loss.isfinite() and losses.shape == ((7 + 1 + 1,) if LOSSES[name].over == "pairs" else (3,))


def test_what_the_data_must_have():
    assert needs_fields(LossConfig()) == {"pairs"}
    assert needs_fields(LossConfig(margin="strength")) == {"pairs", "scores"}
    assert needs_fields(LossConfig(flip_below=0.0, strength="probability")) == {"pairs", "probability"}
    assert needs_fields(LossConfig(name="mixture", one_taste="user")) == {"pairs", "user"}
    assert needs_fields(LossConfig(name="rank_list")) == {"scores"}
