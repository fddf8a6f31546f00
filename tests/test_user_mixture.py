"""A new user as a mixture of known ones: against hand-made optima, scipy, and users who are one of the known."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from diffpref.users.embedding import UserEmbedding
from diffpref.users.encoder import UserEncoder
from diffpref.users.mixture import basis_of, divergence, fit_mixture


def taste(user, image, text):
    """Known users like pictures along their own direction."""
    return 4.0 * (user * image).sum(-1)


def drawn(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def choices(user, image, pairs, seed=0):
    """Pairs turned so that the user prefers the first."""
    liked = taste(user.expand(len(image), -1), image, image)
    return torch.stack([pair if liked[pair[0]] > liked[pair[1]] else pair.flip(0) for pair in pairs])


def test_the_prior_in_nats():
    """Shares (0.9, 0.1): KL(1/2 ‖ π) = ½ ln(0.5/0.9) + ½ ln(0.5/0.1), by hand; equal shares cost nothing."""
    assert divergence(torch.tensor([0.9, 0.1]).double().log()).item() == pytest.approx(0.5108256237659907)
    assert divergence(torch.full((7,), 3.0).double()).item() == pytest.approx(0.0, abs=1e-12)


def test_ninety_percent_on_one_user_costs_the_same_among_any_number_of_them():
    """What the docstring says of the prior: −ln 0.1, whatever K."""
    for users in (200, 2000):
        shares = torch.full((users,), 0.1 / (users - 1)).double()
        shares[0] = 0.9
        assert divergence(shares.log()).item() == pytest.approx(np.log(10), abs=0.05)


def test_two_users_and_one_pair_by_hand():
    """u = normalise(π, 1 − π) on the axes, items on the axes: −log σ(4(u_1 − u_2)) + KL, minimised over π on a grid."""
    basis, items, pair = torch.eye(2), torch.eye(2), torch.tensor([[0, 1]])
    share = np.linspace(0.001, 0.999, 99801)
    length = np.hypot(share, 1 - share)
    loss = np.log1p(np.exp(-4 * (2 * share - 1) / length)) - 0.5 * np.log(4 * share * (1 - share))
    found = fit_mixture(taste, basis, items, items, pair)
    assert found.weights[0].item() == pytest.approx(share[loss.argmin()], abs=2e-5)
    assert found.user.dtype == torch.float64 and found.user.norm().item() == pytest.approx(1)
    assert found.user[0] / found.user[1] == pytest.approx((found.weights[0] / found.weights[1]).item())


def test_the_optimum_is_scipys():
    """The same loss, by another optimiser from another start, in numpy."""
    basis, items = drawn(5, 6), drawn(12, 6, seed=1)
    pairs = choices(drawn(6, seed=2), items, torch.randperm(12, generator=torch.manual_seed(0)).reshape(6, 2))
    b, x, p = basis.numpy(), items.numpy(), pairs.numpy()

    def loss(w):
        shares = np.exp(w - w.max()) / np.exp(w - w.max()).sum()
        user = shares @ b / np.linalg.norm(shares @ b)
        gap = 4 * (x[p[:, 0]] - x[p[:, 1]]) @ user
        return np.logaddexp(0, -gap).sum() - 0.7 * np.log(5 * shares).mean()

    starts = np.random.default_rng(0).normal(size=(4, 5))
    best = min((minimize(loss, start, tol=1e-12) for start in starts), key=lambda found: found.fun)
    found = fit_mixture(taste, basis, items, items, pairs, strength=0.7)
    assert loss(found.weights.log().numpy()) == pytest.approx(best.fun, abs=1e-7)
    np.testing.assert_allclose(found.weights.numpy(), np.exp(best.x) / np.exp(best.x).sum(), atol=1e-3)


def test_a_user_who_is_one_of_the_known_is_found_the_better_the_more_they_say():
    """Mean cosine to the true direction over some known users; the mean of all users is what no pair gives."""
    basis, items = drawn(12, 6), drawn(64, 6, seed=3)
    order = torch.randperm(64, generator=torch.manual_seed(1)).reshape(32, 2)
    some, start = basis[:4], (basis[:4] @ F.normalize(basis.mean(0), dim=0)).mean()
    cosine = {}
    for count in (1, 4, 32):
        fits = [fit_mixture(taste, basis, items, items, choices(user, items, order[:count])) for user in some]
        cosine[count] = float(np.mean([(fit.user @ user).item() for fit, user in zip(fits, some, strict=True)]))
    assert start + 0.05 < cosine[1] < cosine[4] < cosine[32]
    assert cosine[32] > 0.8


def test_strength_keeps_near_the_mean_of_all_users():
    basis, items = drawn(8, 4), drawn(20, 4, seed=1)
    pairs = choices(basis[3], items, torch.arange(20).reshape(10, 2))
    weak, usual, strong = (fit_mixture(taste, basis, items, items, pairs, strength=s) for s in (0.01, 1.0, 1000.0))
    far = [divergence(found.weights.log()).item() for found in (weak, usual, strong)]
    assert far[0] > far[1] > 10 * far[2]
    torch.testing.assert_close(strong.weights, torch.full((8,), 1 / 8).double(), atol=0.02, rtol=0)


def test_the_same_each_time_and_the_model_stays_as_it_was():
    """With the score function of a real encoder, in fp64; nothing of it gets a gradient."""
    torch.manual_seed(0)
    encoder = copy.deepcopy(UserEncoder(features=6, words=3, rank=4)).double()
    items, text, pairs = drawn(8, 6, seed=1), drawn(8, 6, seed=2), torch.tensor([[0, 1], [2, 3], [5, 4]])
    known = F.normalize(torch.cat([torch.ones(4, 1), 2 * drawn(4, 4).float()], dim=1), dim=1)
    one, two = (fit_mixture(encoder.scores, known, items.float(), text.float(), pairs) for _ in range(2))
    assert torch.equal(one.weights, two.weights) and torch.equal(one.user, two.user)
    assert all(weight.grad is None for weight in encoder.parameters())
    assert one.weights.sum().item() == pytest.approx(1) and (one.weights - 0.25).abs().max() > 1e-3


def test_the_order_of_pairs_and_users_does_not_matter():
    basis, items = drawn(6, 5), drawn(10, 5, seed=1)
    pairs = choices(basis[2], items, torch.arange(10).reshape(5, 2))
    whole, turned = fit_mixture(taste, basis, items, items, pairs), torch.tensor([4, 2, 0, 5, 1, 3])
    other = fit_mixture(taste, 3 * basis[turned], items, items, pairs.flip(0))
    torch.testing.assert_close(other.weights, whole.weights[turned], atol=1e-5, rtol=0)
    torch.testing.assert_close(other.user, whole.user, atol=1e-5, rtol=0)


def test_one_known_user_is_who_everybody_is():
    found = fit_mixture(taste, torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.eye(2), torch.tensor([[0, 1]]))
    assert found.weights.tolist() == [1.0] and found.user.tolist() == pytest.approx([0.6, 0.8])


def test_users_who_cancel_out_point_nowhere():
    """Opposite users, and items that say nothing about them."""
    basis, items = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    with pytest.raises(ValueError, match="cancel out in this mixture"):
        fit_mixture(taste, basis, items, items, torch.tensor([[0, 1]]))


BAD = {  # what is changed -> the message
    "no pairs": ({"pairs": torch.empty(0, 2, dtype=torch.long)}, "fitted to one pair or more, [P,2]; got [0, 2]"),
    "no users": ({"basis": torch.empty(0, 3)}, "the known users must be [K,U], none of them zero; got [0, 3]"),
    "nobody": ({"basis": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])}, "none of them zero"),
    "items that are not there": ({"pairs": torch.tensor([[0, 4]])}, "pairs number the 4 items"),
    "prompts for other items": ({"text": torch.ones(3, 3)}, "[N,D] alike"),
    "no numbers": ({"image": torch.full((4, 3), float("nan"))}, "must be finite"),
    "no prior": ({"strength": 0.0}, "strength must be positive and finite, got 0.0"),
    "an endless prior": ({"strength": float("inf")}, "strength must be positive and finite, got inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    sound = {"basis": torch.eye(3), "image": torch.ones(4, 3), "text": torch.ones(4, 3)}
    sound |= {"pairs": torch.tensor([[0, 1]]), "strength": 1.0}
    change, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_mixture(taste, **(sound | change))


def test_known_users_from_embeddings():
    users = [UserEmbedding(torch.tensor([1.0, float(i)]), "e") for i in range(3)]
    assert basis_of(users).tolist() == [[1, 0], [1, 1], [1, 2]]
    others = UserEmbedding(torch.ones(2), "other"), UserEmbedding(torch.ones(3), "e")
    for odd in (*others, UserEmbedding(torch.ones(2, 2), "e")):
        with pytest.raises(ValueError, match="one vector each, all of one encoder"):
            basis_of([*users, odd])
    with pytest.raises(ValueError, match="one vector each"):
        basis_of([])
