"""Heads: where they begin, what they say, what they can learn that others cannot, and users that come later."""

import inspect
import json
import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from head_cases import CONFIGS, UNTRAINED, D, N, items, made

from diffpref.scorer.heads import HEADS, HeadConfig, check_head, make_head
from diffpref.scorer.heads.config import LIMITS, options
from diffpref.scorer.heads.pal import Pal
from diffpref.scorer.heads.queries import Queries

# --- where they begin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_head_ranks_as_the_backbone_does(name):
    """The four pictures of a prompt lie at cosines 0.9, 0.5, 0.1 and −0.3 of it."""
    head = made(name).eval()
    _, text, user = items(count=16)
    off = F.normalize(torch.randn(16, D), dim=-1)
    off = F.normalize(off - (off * text).sum(-1, keepdim=True) * text, dim=-1)
    cosine = torch.tensor([0.9, 0.5, 0.1, -0.3]).repeat(4)[:, None]
    judged = head(cosine * text + (1 - cosine.square()).sqrt() * off, text, user)
    scores = judged.scores.reshape(4, 4)
    assert (scores[:, :-1] > scores[:, 1:]).all()
    first = torch.arange(16).reshape(4, 4)[:, :-1].flatten()
    assert (head.logit(judged, first, first + 1) > 0).all()


@pytest.mark.parametrize("name", ["aspects", "gaussian", "pal a"])
def test_scores_at_the_start_are_the_cosine_where_they_can_be(name):
    """Differences as the cosine head's; of pal a as −100·√(2 − 2·cosine)."""
    image, text, user = items()
    cosine = (image * text).sum(-1)
    expected = {"pal a": -100 * (2 - 2 * cosine).sqrt()}.get(name, 100 * cosine)
    scores = made(name).eval()(image, text, user).scores
    tolerance = 5.0 if name == "pal a" else 1e-3  # whose prototypes are already apart
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_and_weights_make_a_head_again(name):
    """Through JSON, as in a checkpoint; buffers, too."""
    head = made(name)
    image, text, user = items()
    head(image, text, user)  # in training: buffers move
    again = HEADS[CONFIGS[name].name](**json.loads(json.dumps(head.settings)))
    again.load_state_dict(head.state_dict())
    for mine, other in zip(*(vars(h.eval()(image, text, user)).values() for h in (head, again)), strict=True):
        assert mine is other is None or torch.equal(mine, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_head_says_has_its_shapes(name):
    head = made(name).eval()
    judged = head(*items())
    shapes = {key: tuple(value.shape) for key, value in vars(judged).items() if value is not None}
    widths = {"scores": (N,), "spread": (N,), "aspects": (N, 2), "vectors": (N, 6), "components": (N, 8)}
    assert shapes == {key: (widths | {"mixture": (N, 8)})[key] for key in shapes}
    assert set(shapes) == HEADS[CONFIGS[name].name].gives | {"scores"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logit_is_antisymmetric(name):
    """To the last bit, for random weights; that an item is preferred to itself has even odds."""
    head = made(name).eval()
    for parameter in head.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    judged, first, second = head(*items()), torch.arange(N), torch.arange(N).roll(1)
    assert torch.equal(head.logit(judged, first, second), -head.logit(judged, second, first))
    assert head.logit(judged, first, first).abs().max() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_items_are_judged_one_by_one(name):
    """In any batch the same, even in an empty one."""
    head = made(name).eval()
    image, text, user = items()
    together = head(image, text, user).scores
    alone = torch.cat([head(image[i : i + 1], text[i : i + 1], user[i : i + 1]).scores for i in range(N)])
    torch.testing.assert_close(together, alone)
    assert head(image[:0], text[:0], user[:0]).scores.shape == (0,)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_learns(name):
    """Gradients of all that a head says, after one step that leaves the special start."""
    head = made(name)
    image, text, user = items()
    for parameter in head.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)
    judged = head(image, text, user)
    said = [value for value in vars(judged).values() if value is not None]
    torch.stack([(value * torch.randn(value.shape)).sum() for value in said]).sum().backward()
    still = [key for key, p in head.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if "logit_scale" in options(CONFIGS[name].name)])
def test_factors_are_kept_to_a_hundred(name):
    head = made(name)
    with torch.no_grad():
        head.logit_scale += 3
    head.clamp()
    torch.testing.assert_close(head.logit_scale.exp().max(), torch.tensor(100.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_batches_before_one_gradient(name):
    """As with accumulated gradients: buffers that moved in between do no harm."""
    head = made(name).train()
    (head(*items()).scores.sum() + head(*items(seed=1)).scores.sum()).backward()


def test_queries_by_hand():
    """Of rank 2 in fp64: t + b + U·V·t, normalised, against a picture; their mixture."""
    torch.manual_seed(0)
    queries = Queries(D, 3, rank=2, apart=True, gated=True).double()
    for weights in (queries.outer, queries.gate, queries.common):
        torch.nn.init.normal_(weights)
    image, text, _ = (x.double() for x in items())
    bias, maps = queries.bias + queries.common, queries.outer @ queries.inner
    moved = [queries.gate[k] * text + bias[k] + text @ maps[k].T for k in range(3)]
    q = torch.stack([F.normalize(each, dim=-1) for each in moved], 1)
    torch.testing.assert_close(queries.cosines(image, text), torch.einsum("nd,nkd->nk", image, q))
    shares = torch.rand(N, 3).double()
    torch.testing.assert_close(queries.mixed(text, shares), torch.einsum("nk,nkd->nd", shares, q))


# --- aspects ----------------------------------------------------------------------------------------------------------


def test_the_overall_score_is_a_weighted_sum_of_standard_scores():
    config = HeadConfig(name="aspects", names=["taste", "faith"], weights=[0.25, 2.0])
    head = make_head(config, D).eval()
    head.mean.copy_(torch.tensor([1.0, -2.0]))
    head.variance.copy_(torch.tensor([4.0, 9.0]))
    judged = head(*items())
    expected = 0.25 * (judged.aspects[:, 0] - 1) / 2 + 2 * (judged.aspects[:, 1] + 2) / 3
    torch.testing.assert_close(judged.scores, expected)


def test_running_mean_and_variance_are_those_of_the_first_batches():
    head = made("aspects").train()
    seen = torch.cat([head(*items(seed=seed)).aspects.detach() for seed in range(5)])
    torch.testing.assert_close(head.mean, seen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.variance, seen.var(0, correction=0), rtol=1e-4, atol=1e-4)


def test_running_statistics_rest_in_evaluation():
    head = made("aspects").eval()
    head(*items())
    assert head.batches == 0 and head.mean.abs().max() == 0


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [(["a", "a"], None, "different names"), (["a", "b"], [1.0], "one for each of the 2 aspects, got 1")],
)
def test_aspects_that_cannot_be(names, weights, words):
    with pytest.raises(ValueError, match=words):
        make_head(HeadConfig(name="aspects", names=names, weights=weights), D)


# --- gaussian ---------------------------------------------------------------------------------------------------------


def test_the_spread_begins_as_said():
    head = make_head(HeadConfig(name="gaussian", spread=0.3), D)
    torch.testing.assert_close(head(*items()).spread, torch.full((N,), 0.3))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_configuration_names_the_table():
    assert set(get_args(get_type_hints(HeadConfig)["name"])) == set(HEADS)
    used = set().union(*(options(name) for name in HEADS))
    assert {field.name for field in fields(HeadConfig)} == used | {"name"}
    assert {key.removeprefix("head.") for key in LIMITS} <= used


@pytest.mark.parametrize("name", HEADS)
def test_defaults_are_those_of_the_classes(name):
    """But the scale's, which is the scorer's own unless said."""
    for key, parameter in inspect.signature(HEADS[name]).parameters.items():
        if key in options(name) - {"logit_scale"} and parameter.default is not inspect.Parameter.empty:
            assert getattr(HeadConfig(), key) == parameter.default


def test_a_head_takes_over_the_scale():
    config = HeadConfig(name="gaussian")
    assert make_head(config, D, scale=2.0).logit_scale.item() == 2.0
    assert make_head(config, D).logit_scale.item() == pytest.approx(math.log(100))
    assert make_head(HeadConfig(name="gaussian", logit_scale=1.0), D, scale=2.0).logit_scale.item() == 1.0


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("gaussian", "micro")])
def test_a_temperature_taken_in_leaves_the_log_odds(name):
    """But those of a spread, and of a mixture, which are no differences of scores."""
    head = made(name, users=3).eval()
    if hasattr(head, "logit_scale"):
        head.logit_scale.data.fill_(2.0)
    drawn = torch.randn(2, 6, D, generator=torch.manual_seed(0))
    image, text = torch.nn.functional.normalize(drawn, dim=-1)
    one, other = torch.arange(3), torch.arange(3, 6)
    before = head.logit(head(image, text), one, other)
    head.warm(2.0)
    assert torch.allclose(head.logit(head(image, text), one, other), before / 2, atol=1e-6)


def test_only_heads_that_know_users_take_them():
    assert made("pal", users=5).settings["users"] == 5
    assert "users" not in made("cosine", users=5).settings


def test_an_option_of_another_head_is_refused():
    with pytest.raises(ValueError, match=r"head\.tau is not used by head\.name cosine; leave it out \(it is for gpm\)"):
        check_head(HeadConfig(name="cosine", tau=0.2))


def test_aspects_without_names_are_refused():
    with pytest.raises(ValueError, match=r"head\.name aspects needs head\.names"):
        make_head(HeadConfig(name="aspects"), D)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="head.kind must be one of a, b, got c"):
        Pal(D, kind="c")
