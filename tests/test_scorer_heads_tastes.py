"""Heads of more than one taste: cycles that a score cannot follow, users as mixtures, and users that come later."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_cases import D, N, items, made
from objective_cases import doubles, is_close
from torch import Tensor

from diffpref.scorer.heads import Head, HeadConfig, Judged, make_head
from diffpref.scorer.heads.gpm import Gpm, borda, skew, von_neumann_winner
from diffpref.scorer.heads.micro import Micro, context, in_context
from diffpref.scorer.heads.pal import Pal, fit_user

# --- GPM --------------------------------------------------------------------------------------------------------------


def three() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three pictures of one prompt, each preferred to the next one round: A > B > C > A."""
    image, text, _ = items(count=3, prompts=1)
    return image, text, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])


def trained(head: Head, steps: int = 200) -> Tensor:
    """Log-odds of the three edges of the cycle after training on them."""
    image, text, first, second = three()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (-F.logsigmoid(head.logit(head(image, text), first, second))).mean().backward()
        optimizer.step()
        head.clamp()
    return head.eval().logit(head(image, text), first, second)


@pytest.mark.parametrize("dim", [4, 6])
def test_gpm_learns_a_cycle(dim):
    """To near what is possible: three unit vectors in a plane, 120° apart, all margins sin 120° / τ."""
    torch.manual_seed(0)
    head = make_head(HeadConfig(name="gpm", dim=dim), D)
    torch.testing.assert_close(trained(head), torch.full((3,), math.sqrt(0.75) / 0.1), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["cosine", "gaussian", "pal"])
def test_scores_cannot_learn_a_cycle(name):
    """The log-odds of the three edges add up to 0."""
    assert trained(made(name, users=0), steps=50).sum().abs() < 1e-3


def test_skew_by_hand():
    """Blocks [[0, −1], [1, 0]]: (1,2)·R·(3,4)ᵀ = 2·3 − 1·4; two blocks add up; R as a matrix."""
    a, b = doubles([1.0, 2, 5, 6]), doubles([3.0, 4, 7, 8])
    r = torch.block_diag(*[doubles([[0, -1], [1, 0]])] * 2)
    assert skew(a, b) == (2 * 3 - 1 * 4) + (6 * 7 - 5 * 8) == a @ r @ b


def test_vectors_are_unit_and_prompts_weigh_their_planes():
    plain, scaled = made("gpm").eval(), made("gpm with prompts").eval()
    image, text, _ = items()
    torch.testing.assert_close(plain(image, text).vectors.norm(dim=-1), torch.ones(N))
    with torch.no_grad():
        scaled.scales.bias.copy_(torch.tensor([1000.0, 0, 0]))
        scaled.vectors.load_state_dict(plain.vectors.state_dict())
    found, unscaled = scaled(image, text).vectors, plain(image, text).vectors
    torch.testing.assert_close(found[:, :2], math.sqrt(3) * unscaled[:, :2])
    assert found[:, 2:].abs().max() == 0


def test_the_reference_is_the_mean_vector_of_training():
    head = made("gpm").train()
    seen = torch.cat([head(*items(seed=seed)).vectors.detach() for seed in range(4)])
    torch.testing.assert_close(head.reference, seen.mean(0))
    judged = head.eval()(*items())
    torch.testing.assert_close(judged.scores, skew(judged.vectors, seen.mean(0)) / 0.1)


def test_an_odd_dimension_is_refused():
    with pytest.raises(ValueError, match="head.dim must be even"):
        Gpm(D, dim=3)


def log_odds(*chances: list[float]) -> np.ndarray:
    p = np.array(chances)
    return np.log(p / (1 - p))


def test_borda_is_the_mean_chance_against_the_others():
    chances = log_odds([0.5, 0.8, 0.6], [0.2, 0.5, 0.9], [0.4, 0.1, 0.5])
    np.testing.assert_allclose(borda(chances), [0.7, 0.55, 0.25])
    assert borda(np.zeros((1, 1))) == 0.5


def test_von_neumann_winner_by_hand():
    """Payoffs ±a, ±b, ±c of a cycle: shares in proportion to the payoff of the edge that an item is not on."""
    chances = log_odds([0.5, 0.6, 0.2], [0.4, 0.5, 0.7], [0.8, 0.3, 0.5])  # A > B by 0.1, B > C by 0.2, C > A by 0.3
    np.testing.assert_allclose(von_neumann_winner(chances), [0.2 / 0.6, 0.3 / 0.6, 0.1 / 0.6], atol=1e-6)


def test_von_neumann_winner_of_orders_equals_and_one():
    order = log_odds([0.5, 0.6, 0.7], [0.4, 0.5, 0.9], [0.3, 0.1, 0.5])
    np.testing.assert_allclose(von_neumann_winner(order), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(von_neumann_winner(np.zeros((4, 4))), [0.25] * 4, atol=1e-6)
    np.testing.assert_allclose(von_neumann_winner(np.zeros((1, 1))), [1])


def test_no_lottery_is_preferred_to_the_von_neumann_winner():
    logits = np.random.default_rng(0).normal(size=(7, 7))
    logits = logits - logits.T
    shares = von_neumann_winner(logits)
    assert shares.sum() == pytest.approx(1) and shares.min() >= 0
    assert (shares @ np.tanh(logits / 2) > -1e-6).all()


# --- PAL --------------------------------------------------------------------------------------------------------------


def with_tastes(kind: str, users: int = 30, prototypes: int = 3) -> Pal:
    """A head whose prototypes differ and whose users do, too."""
    torch.manual_seed(0)
    head = make_head(HeadConfig(name="pal", kind=kind, prototypes=prototypes, logit_scale=math.log(8)), D, users).eval()
    with torch.no_grad():
        head.users.weight.normal_()
        (head.tastes.points if kind == "a" else head.tastes.queries.bias).normal_()
    return head


def choices(head: Pal, user: int, count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What a user of the head chose: (image, text, pairs)."""
    image, text, _ = items(seed, 2 * count, count)
    judged = head(image, text, torch.full((2 * count,), user))
    first, second = torch.arange(0, 2 * count, 2), torch.arange(1, 2 * count, 2)
    chance = head.logit(judged, first, second).sigmoid()
    won = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < chance
    return image, text, torch.where(won[:, None], torch.stack([first, second], 1), torch.stack([second, first], 1))


@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_user_one_does_not_know_is_the_mean_of_those_one_knows(kind):
    head = with_tastes(kind)
    image, text, _ = items()
    shares = head.users.weight.softmax(-1).mean(0).expand(N, -1)
    expected = head.judge(image, text, shares).scores
    torch.testing.assert_close(head(image, text).scores, expected)
    torch.testing.assert_close(head(image, text, torch.full((N,), -1)).scores, expected)
    assert not torch.allclose(head(image, text, torch.zeros(N, dtype=torch.long)).scores, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_the_formula(kind):
    """One item by hand in fp64."""
    head = with_tastes(kind).double()
    image, text = (x[:1].double() for x in items()[:2])
    pi = head.users.weight[2].softmax(0)
    if kind == "a":
        point = text + sum(pi[k] * head.tastes.points[k] for k in range(3))
        expected = -head.logit_scale.exp() * (image - point).norm()
    else:
        maps = head.tastes.queries
        queries = [F.normalize(text[0] + maps.bias[k], dim=0) for k in range(3)]
        asked = sum(pi[k] * queries[k] for k in range(3))
        expected = head.logit_scale.exp() * (image[0] @ asked) / asked.norm()
    is_close(head(image, text, torch.tensor([2])).scores.detach(), [expected.item()], 1e-9)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_fit_user_finds_the_weights_of_a_known_user(kind):
    """From two thousand choices; the shares within what so many choices tell."""
    head = with_tastes(kind)
    found = fit_user(head, *choices(head, 4, 2000))
    torch.testing.assert_close(found.softmax(0), head.users.weight[4].double().softmax(0), atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_fit_user_is_at_the_maximum(kind):
    """The gradient of likelihood and prior, written out, is 0 there."""
    head = with_tastes(kind)
    image, text, pairs = choices(head, 4, 8)
    w = fit_user(head, image, text, pairs, strength=0.7).requires_grad_()
    known = head.users.weight.detach().double()
    cov = torch.cov(known.T)
    cov = 0.9 * cov + 0.1 * cov.trace() / 3 * torch.eye(3)
    off = w - known.mean(0)
    judged = head.double().judge(image.double(), text.double(), w.softmax(0).expand(len(image), -1))
    loss = -F.logsigmoid(judged.scores[pairs[:, 0]] - judged.scores[pairs[:, 1]]).sum()
    (loss + 0.35 * off @ torch.linalg.solve(cov, off)).backward()
    assert w.grad.abs().max() < 1e-4


def test_fit_user_without_choices_is_the_mean_and_with_a_strong_prior_near_it():
    head = with_tastes("b")
    image, text, pairs = choices(head, 4, 8)
    mean = head.users.weight.detach().double().mean(0)
    torch.testing.assert_close(fit_user(head, image, text, pairs[:0]), mean)
    torch.testing.assert_close(fit_user(head, image, text, pairs, strength=1e6), mean, atol=1e-3, rtol=0)
    assert (fit_user(head, image, text, pairs) - mean).abs().max() > 0.05


@pytest.mark.parametrize("users", [0, 1])
def test_fit_user_where_nobody_is_known(users):
    """A normal prior around 0, or around the only user."""
    torch.manual_seed(0)
    head = make_head(HeadConfig(name="pal", prototypes=3), D, users).eval()
    image, text, _ = items()
    assert fit_user(head, image, text, torch.tensor([[0, 1]])).isfinite().all()
    torch.testing.assert_close(head(image, text).scores, head.judge(image, text, torch.full((N, 3), 1 / 3)).scores)


def test_fit_user_leaves_the_head_alone():
    head = with_tastes("b").train()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    fit_user(head, *choices(head, 4, 8))
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in head.parameters())


def test_a_fitted_user_is_one_more():
    head = with_tastes("b")
    w, image, text = doubles([3.0, -1, 0]), *items()[:2]
    assert head.add_user(w) == 30
    shares = w.float().softmax(0).expand(N, -1)
    torch.testing.assert_close(head(image, text, torch.full((N,), 30)).scores, head.judge(image, text, shares).scores)
    Pal(**head.settings).load_state_dict(head.state_dict())


def test_users_learn_from_their_own_items_only():
    head = with_tastes("b")
    image, text, _ = items()
    head(image, text, torch.full((N,), 2)).scores.square().sum().backward()
    assert torch.nonzero(head.users.weight.grad.abs().sum(1))[:, 0].tolist() == [2]


# --- MiCRo ------------------------------------------------------------------------------------------------------------


def test_the_logit_of_a_mixture_by_hand():
    """Weights ¼, ¾ and log-odds 1, −2."""
    judged = Judged(doubles([0, 0]), components=doubles([[1.0, -2], [0, 0]]), mixture=doubles([[0.25, 0.75]] * 2))
    p = 0.25 / (1 + math.exp(-1)) + 0.75 / (1 + math.exp(2))
    is_close(Micro(D).logit(judged, torch.tensor([0]), torch.tensor([1])), [math.log(p / (1 - p))])


def test_one_taste_is_the_difference_of_scores():
    head = make_head(HeadConfig(name="micro", tastes=1), D)
    judged, first, second = head(*items()), torch.arange(N), torch.arange(N).roll(1)
    torch.testing.assert_close(head.logit(judged, first, second), judged.scores[first] - judged.scores[second])


def test_choices_change_the_weights_as_bayes_would():
    """Two choices; taste 0 gives them σ(1)·σ(2), taste 1 σ(−1)·σ(0)."""
    components = doubles([[1.0, -1], [0, 0], [2, 0], [0, 0]])
    judged = Judged(torch.zeros(4), components=components, mixture=doubles([[0.25, 0.75]] * 4))
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    first, second = 0.25 * sigma(1) * sigma(2), 0.75 * sigma(-1) * sigma(0)
    weights = context(judged, torch.tensor([[0, 1], [2, 3]]))
    is_close(weights, [first / (first + second), second / (first + second)])
    is_close(in_context(judged, weights).scores, (components @ weights).tolist())
    torch.testing.assert_close(context(judged, torch.zeros(0, 2, dtype=torch.long)), doubles([0.25, 0.75]))
