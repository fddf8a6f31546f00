"""Losses of pairs by hand and against independent references; what losses need, and of which heads."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LN2, everything, logistic, run
from objective_cases import doubles, is_close, pairs
from scipy import integrate
from scipy.special import expit

from diffpref.scorer.heads import HEADS, HeadConfig, Judged, make_head
from diffpref.scorer.losses import LOSSES, LossConfig, check_loss, needs_fields, total
from diffpref.scorer.losses.config import LIMITS
from diffpref.scorer.losses.pairs import outcomes

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
