"""The encoder of users: whose weights are known in closed form, whatever it is shown; what it sees; its folder."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from tiny_scorers import SIZE, TINY, WIDTH, tiny_scorer, tiny_towers
from tiny_users import tiny_encoder
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module

from diffpref.scorer.features import towers_fingerprint
from diffpref.users.encoder import RECORD, WEIGHTS, UserEncoder
from diffpref.users.eyes import Eyes

D, WORDS, RANK = 10, 6, 4
RESNET = TINY | {"vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8}}
OF_TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": SIZE}
TIMM = TINY | {"vision_cfg": OF_TIMM}


def random_encoder(seed: int = 0, spread: float = 1.0, rank: int = RANK) -> UserEncoder:
    """In fp64, with weights of any sign everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = UserEncoder(D, WORDS, rank).double()
        for tensor in encoder.state_dict().values():
            tensor.normal_(std=spread)
        encoder.deviation.uniform_(0.5, 2)
    return encoder


def choices(users: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random support [users,pairs,3,D], and a mask that is true everywhere."""
    random = torch.Generator().manual_seed(seed)
    support = torch.randn(users, pairs, 3, D, generator=random, dtype=torch.float64)
    return support, torch.ones(users, pairs, dtype=torch.bool)


def phi(encoder: UserEncoder, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """G z(f) + H (f ∘ t); embeddings of W numbers are of length one, so that f ∘ t is scaled by √W."""
    part = {name: value.double().numpy() for name, value in encoder.state_dict().items()}
    z = (image - part["mean"]) / part["deviation"]
    product = image[..., :WORDS] * text[..., :WORDS] * math.sqrt(WORDS)
    return z @ part["look.weight"].T + product @ part["match.weight"].T


def best_weights(encoder: UserEncoder, support: Tensor) -> np.ndarray:
    """argmin_w Σ log(1 + exp(-wᵀd)) + |w - m|²/2 of one user's choices [K,3,D], by scipy."""
    prompt, chosen, rejected = support.double().numpy().swapaxes(0, 1)
    d = phi(encoder, chosen, prompt) - phi(encoder, rejected, prompt)
    m = encoder.population.detach().double().numpy()

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        wrong = 1 / (1 + np.exp(np.clip(d @ w, -700, 700)))
        return np.logaddexp(0, -d @ w).sum() + ((w - m) ** 2).sum() / 2, w - m - wrong @ d

    found = minimize(loss, m, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    return found.x


# --- a taste from choices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "spread"), [(1, 0.3), (4, 0.5), (16, 0.5), (16, 1.0), (200, 0.5)])
def test_weights_are_those_of_greatest_posterior_probability(pairs, spread):
    """Also where plain Newton steps overshoot and never come back."""
    encoder = random_encoder(spread=spread)
    support, mask = choices(6, pairs)
    with torch.no_grad():
        found = encoder.weights(support, mask).numpy()
    np.testing.assert_allclose(found, [best_weights(encoder, some) for some in support], atol=1e-6)
    assert abs(found - encoder.population.detach().numpy()).max() > 0.1


@pytest.mark.parametrize("pairs", [1, 200])
def test_choices_against_the_population_are_believed(pairs):
    """Many times the same choice, of which everybody else would swear the contrary."""
    encoder = random_encoder(spread=0.5)
    one, _ = choices(1, 1)
    prompt, *pictures = one[0, 0]
    with torch.no_grad():
        liked = (encoder.population * (encoder.looks(pictures[0], prompt) - encoder.looks(pictures[1], prompt))).sum()
        if liked > 0:
            one = one[:, :, [0, 2, 1]]
        encoder.population.mul_(10 / liked.abs())
        support = one.expand(1, pairs, 3, D)
        found = encoder.weights(support, torch.ones(1, pairs, dtype=torch.bool))
    np.testing.assert_allclose(found[0], best_weights(encoder, support[0]), atol=1e-6)
    d = encoder.looks(one[0, 0, 1], prompt) - encoder.looks(one[0, 0, 2], prompt)
    assert (encoder.population @ d).item() == pytest.approx(-10)
    assert (found[0] @ d).item() > (0 if pairs == 200 else -10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1e2, 1e5])
def test_extremes_stay_within_bounds(dtype, large):
    """Features out of all proportion, 200 identical choices: a unit vector, and weights not far from everybody's."""
    encoder = random_encoder(spread=1.0).to(dtype)
    random, alike = choices(3, 16)[0], choices(3, 1)[0].expand(3, 200, 3, D)
    for support in (random, alike):
        given = (support * large).to(dtype)
        given.requires_grad_()
        user = encoder(given, torch.ones(given.shape[:2], dtype=torch.bool))
        user[:, 1].sum().backward()
        assert user.dtype == dtype and user.isfinite().all() and given.grad.isfinite().all()
        torch.testing.assert_close(user.norm(dim=1), torch.ones(3, dtype=dtype))
        assert user[:, 0].min() > 0.1


def test_order_and_company_are_of_no_influence():
    encoder, (support, mask) = random_encoder(), choices(5, 7)
    with torch.no_grad():
        user = encoder(support, mask)
        order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
        torch.testing.assert_close(encoder(support[:, order], mask), user, atol=1e-10, rtol=0)
        alone = torch.cat([encoder(support[i : i + 1], mask[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(alone, user, atol=1e-10, rtol=0)
        turned = encoder(support[:, :, [0, 2, 1]], mask)
    assert ((turned - user).norm(dim=1) > 1e-2).all() and user.shape == (5, RANK + 1)


def test_what_is_masked_is_not_there():
    """Whatever stands in its place."""
    encoder, (support, mask) = random_encoder(), choices(4, 9)
    for i in range(4):
        mask[i, torch.arange(9) % (i + 2) == 0] = False
    support[~mask] = 1e3
    with torch.no_grad():
        found = encoder(support, mask)
        for i in range(4):
            left = support[i][mask[i]][None]
            expected = encoder(left, torch.ones(1, left.shape[1], dtype=torch.bool))
            torch.testing.assert_close(found[i : i + 1], expected, atol=1e-12, rtol=0)


def test_of_no_choices_it_is_the_population():
    """None in the mask, none at all, or none that says anything; gradients are numbers in each case."""
    encoder, (support, mask) = random_encoder(), choices(3, 5)
    same = support[:, :, [0, 1, 1]]
    for given, there in ((support, ~mask), (support[:, :0], mask[:, :0]), (same, mask)):
        user = encoder(given, there)
        assert torch.equal(user.detach(), torch.eye(RANK + 1, dtype=torch.float64)[:1].expand(3, -1))
        encoder.zero_grad()
        user.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    image, text = support[:, 0, 1], support[:, 0, 0]
    expected = encoder.looks(image, text) @ encoder.population
    torch.testing.assert_close(encoder.scores(user, image, text), expected)


def test_differences_of_scores_are_the_log_odds_of_the_weights():
    """w is found again in u = (1, w - m)/|…|, so that nothing is lost."""
    encoder, (support, mask) = random_encoder(spread=0.5), choices(6, 8)
    (query, _), part = choices(6, 1, seed=1), slice(None)
    prompt, first, second = query[part, 0].unbind(1)
    with torch.no_grad():
        user, w = encoder(support, mask), encoder.weights(support, mask)
        found = encoder.scores(user, first, prompt) - encoder.scores(user, second, prompt)
    d = phi(encoder, first.numpy(), prompt.numpy()) - phi(encoder, second.numpy(), prompt.numpy())
    np.testing.assert_allclose(found, (w.numpy() * d).sum(1), rtol=1e-9)
    np.testing.assert_allclose(encoder.population.detach() + user[:, 1:] / user[:, :1], w, rtol=1e-9)


def test_a_user_without_bounds_is_not_believed():
    """Of a mixture of opposites, the first coordinate may vanish; its scores do not."""
    encoder, (support, _) = random_encoder(), choices(2, 1)
    user = F.normalize(torch.tensor([[0.0, 1, 0, 0, 0], [-0.1, 0, 1, 0, 0]], dtype=torch.float64), dim=1)
    scores = encoder.scores(user, support[:, 0, 1], support[:, 0, 0])
    most = (encoder.population.norm() + 1 / 0.05) * encoder.looks(support[:, 0, 1], support[:, 0, 0]).norm(dim=1)
    assert scores.isfinite().all() and (scores.abs() <= most).all()


def test_gradients_reach_everything_through_the_steps():
    """Finite differences, of what a user chosen for says of another choice."""
    encoder, (support, mask) = random_encoder(spread=0.5, rank=2), choices(2, 3)
    (query, _), names = choices(2, 1, seed=5), ("look.weight", "match.weight", "population")
    mask[0, 1] = False
    prompt, first, second = query[:, 0].unbind(1)

    def loss(*values: Tensor) -> Tensor:
        with _reparametrize_module(encoder, dict(zip(names, values, strict=True))):
            user = encoder(support, mask)
            return F.softplus(encoder.scores(user, second, prompt) - encoder.scores(user, first, prompt))

    values = [encoder.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, values, atol=1e-7, rtol=1e-5)
    gradients = torch.autograd.grad(loss(*values).sum(), values)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


# --- its eyes ---------------------------------------------------------------------------------------------------------


def seen_by_hand(towers, pixels: Tensor, levels: int) -> Tensor:
    """The levels' means over space [N,…], from hooks on the tower's own blocks."""
    visual, outputs = towers.model.visual, []
    tower = getattr(visual, "trunk", visual)
    if hasattr(tower, "avgpool"):  # the end of a ResNet's stem
        blocks, mean = [tower.avgpool, tower.layer1], lambda x: x.mean(dim=(2, 3))
    else:  # the class token says nothing of a place
        blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
        mean = lambda x: x[:, 1:].mean(dim=1)  # noqa: E731
    hooks = [b.register_forward_hook(lambda *args: outputs.append(args[2])) for b in list(blocks)[:levels]]
    with torch.no_grad():
        towers.images(pixels)
    for hook in hooks:
        hook.remove()
    return torch.cat([mean(output) for output in outputs], dim=1)


@pytest.mark.parametrize("architecture", [TINY, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_eyes_see_the_embedding_and_the_first_levels(architecture):
    towers = tiny_towers(model_cfg=architecture)
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for levels in (0, 1, 2):
        eyes = Eyes(towers, levels).eval()
        with torch.no_grad():
            seen, own = eyes.images(pixels), towers.images(pixels)
        assert torch.equal(seen[:, :WIDTH], own) and seen.shape == (3, eyes.width)
        if levels:
            expected = seen_by_hand(towers, pixels, levels)
            torch.testing.assert_close(seen[:, WIDTH:], expected, atol=1e-6, rtol=1e-5)
            assert (expected.std(0) > 0).float().mean() > 0.9  # pictures differ in nearly all of it
    assert eyes.model is towers.model and Eyes(towers, 0).width == WIDTH


def test_prompts_are_as_wide_as_pictures():
    towers = tiny_towers()
    eyes, tokens = Eyes(towers, 2).eval(), towers.tokenize(["a cat", "red"])
    with torch.no_grad():
        words = eyes.texts(tokens)
        assert torch.equal(words[:, :WIDTH], towers.texts(tokens))
    assert words.shape == (2, eyes.width) and not words[:, WIDTH:].any() and eyes.width == WIDTH + 64


def test_other_levels_are_other_eyes():
    towers = tiny_towers()
    prints = {towers_fingerprint(Eyes(towers, levels)) for levels in (0, 1, 2)} | {towers_fingerprint(towers)}
    assert len(prints) == 4
    assert towers_fingerprint(Eyes(tiny_towers(seed=1), 1)) != towers_fingerprint(Eyes(towers, 1))


def test_towers_without_levels_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="the image tower has 2 levels of features, not 3: set levels to less"):
        Eyes(tiny_towers(), 3)
    towers = tiny_towers(model_cfg=TIMM)
    monkeypatch.delattr(type(towers.model.visual.trunk), "forward_intermediates")  # as with timm before 0.9.17
    with pytest.raises(ValueError, match="VisionTransformer gives no intermediate features: set levels to 0"):
        Eyes(towers, 1)
    assert Eyes(towers, 0).width == WIDTH


# --- its folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An encoder's, and beside it its scorer's."""
    tiny_encoder(tmp_path)
    return tmp_path / "user_encoder"


def test_a_folder_gives_the_encoder_back(folder, tmp_path):
    encoder = UserEncoder.from_pretrained(folder)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    encoder.save_pretrained(tmp_path / "again")
    again = UserEncoder.from_pretrained(str(tmp_path / "again"))
    assert again.id == encoder.id == json.loads((folder / RECORD).read_text())["id"]
    assert again.settings == encoder.settings
    support = torch.randn(2, 3, 3, encoder.settings["features"])
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(again(support, mask), encoder(support, mask))
    embedded = again.scorer().embed(prompts=["a cat"]).prompts
    assert embedded.shape == (1, encoder.settings["features"])


@pytest.mark.parametrize("name", ["look.weight", "match.weight", "population", "mean", "deviation"])
def test_every_weight_is_in_the_id(name):
    encoder = UserEncoder(D, WORDS, RANK)
    other = UserEncoder(D, WORDS, RANK)
    other.load_state_dict(encoder.state_dict())
    assert other.id == encoder.id
    changed = UserEncoder(D, WORDS, RANK)
    changed.load_state_dict(encoder.state_dict() | {name: encoder.state_dict()[name] + 1e-3})
    assert changed.id != encoder.id


def test_eyes_are_in_the_id_and_the_place_of_their_scorer_is_not():
    made = [UserEncoder(D, WORDS, RANK, "here"), UserEncoder(D, WORDS, RANK, "there")]
    made += [UserEncoder(D, WORDS, RANK, fingerprint="x"), UserEncoder(D, WORDS, RANK, levels=1)]
    for encoder in made:
        encoder.load_state_dict(made[0].state_dict())
    assert made[0].id == made[1].id and len({encoder.id for encoder in made}) == 3


def rewrite(record, **changes) -> None:
    """Change values of a JSON file; None takes one away."""
    values = json.loads(record.read_text()) | changes
    record.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


DAMAGES = {
    "no record": (
        lambda f: (f / RECORD).unlink(),
        "holds no encoder of users .no user_encoder.json.",
    ),
    "no JSON": (lambda f: (f / RECORD).write_text("{"), "cannot be read: Expecting"),
    "no object": (lambda f: (f / RECORD).write_text("[]"), "cannot be read"),
    "other format": (
        lambda f: rewrite(f / RECORD, format=2),
        "cannot be read: format 2, of another version",
    ),
    "no settings": (lambda f: rewrite(f / RECORD, settings=None), "cannot be read: 'settings'"),
    "odd settings": (lambda f: rewrite(f / RECORD, settings={"breadth": 3}), "cannot be read: .*breadth"),
    "no id": (lambda f: rewrite(f / RECORD, id=None), "is damaged: its weights are not those that were written"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot be read: .*user_encoder.safetensors"),
    "half of them": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "cannot be read"),
    "other shapes": (
        lambda f: save_file({"population": torch.ones(3)}, f / WEIGHTS),
        "(?s)cannot be read: .*population",
    ),
    "other values": (
        lambda f: save_file({k: v + 0.1 for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
        "is damaged: its weights are not those that were written",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(FileNotFoundError if name == "no record" else ValueError, match=message) as caught:
        UserEncoder.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_other_towers_are_refused(folder, tmp_path):
    tiny_scorer(tmp_path / "scorer", seed=1)
    with pytest.raises(ValueError, match="scorer holds other towers than this encoder of users was trained with"):
        UserEncoder.from_pretrained(folder).scorer()
    encoder = UserEncoder.from_pretrained(folder)
    encoder.settings["towers"] = str(tmp_path / "nowhere")
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        encoder.scorer()
