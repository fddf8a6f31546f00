"""The simulated users: exact attributes, a fixed population, a majority taste that the artwork can satisfy."""

import json

import numpy as np
import pytest
from PIL import Image

from diffpref.emoji_world import users
from diffpref.emoji_world.artwork import load_artwork
from diffpref.emoji_world.build import STYLES
from diffpref.emoji_world.users import ATTRIBUTES, MAJORITY, PIXEL_TERMS, STANDARD


@pytest.fixture(scope="module")
def drawings() -> tuple[np.ndarray, np.ndarray]:
    """(concept, style) [N,2] and attributes [N,K] of the artwork."""
    art = load_artwork()
    arrays = art.images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    seen = users.attributes([Image.fromarray(a) for a in arrays])
    return np.stack([art.concept.numpy(), art.style.numpy()], axis=1), seen


def one_colour(r: float, g: float, b: float) -> np.ndarray:
    return np.full((4, 4, 3), (r, g, b))


@pytest.mark.parametrize(
    ("term", "rgb", "value"),
    [
        ("colourfulness", one_colour(1, 0.5, 0.25), 0.75),
        ("brightness", one_colour(1, 0, 0), 0.299),
        ("warmth", one_colour(0.25, 0, 1), -0.75),
        ("outline", one_colour(0.5, 0.5, 0.5), 0),
        ("coverage", one_colour(1, 1, 0.95), 0),
        ("coverage", one_colour(1, 1, 0.5), 1),
    ],
)
def test_terms_by_hand(term, rgb, value):
    assert PIXEL_TERMS[term](rgb) == pytest.approx(value)


def test_outline_measures_edges():
    half = np.concatenate([np.zeros((4, 2, 3)), np.ones((4, 2, 3))], axis=1)  # one edge of height 1 among 3 columns
    assert PIXEL_TERMS["outline"](half) == pytest.approx(1 / 3)


def test_constants_were_measured_on_the_artwork(drawings):
    terms = drawings[1][:, len(STYLES) :]
    np.testing.assert_allclose(terms.mean(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(terms.std(axis=0), 1, atol=0.01)
    assert set(STANDARD) == set(PIXEL_TERMS) and set(MAJORITY) == set(ATTRIBUTES)


def test_the_stored_population_is_the_one_the_command_makes(tmp_path):
    users.main(["--out", str(tmp_path / "users.json")])
    assert json.loads((tmp_path / "users.json").read_text()) == json.loads(users.USERS.read_text())
    population = users.population()
    assert [u.user_id for u in population] == list(range(256))
    assert [u.split for u in population] == ["train"] * 200 + ["unseen"] * 56


def test_users_differ_around_the_majority():
    weights = np.array([u.weights for u in users.population()])
    np.testing.assert_allclose(weights.mean(axis=0), [MAJORITY[k] for k in ATTRIBUTES], atol=0.25)
    assert (weights.std(axis=0) > 0.5).all()


def test_the_majority_has_a_favourite_that_every_concept_can_show(drawings):
    (pairs, seen), favourite = drawings, STYLES.index("retro")
    utilities = users.utility(users.majority(), seen)
    best = [pairs[of, 1][utilities[of].argmax()] for of in (pairs[:, 0] == c for c in range(109))]
    assert np.mean(np.array(best) == favourite) > 0.9


def test_choices_follow_utilities():
    user = users.User(0, "train", (0.0,) * len(ATTRIBUTES), temperature=2.0, flip=0.1)
    probability = users.choice_probability(user, np.array([0.0, 100.0, 1.0]), np.array([0.0, -100.0, 3.0]))
    np.testing.assert_allclose(probability, [0.5, 0.9, 0.1 + 0.8 / (1 + np.e)])


def test_judge_contract():
    warm, cold = (Image.new("RGB", (32, 32), colour) for colour in ((255, 200, 120), (120, 200, 255)))
    scores = users.majority_utility([warm, cold], ["sun", "sun"])
    assert scores.shape == (2,) and scores.dtype == np.float64
    assert scores[0] > scores[1]
    assert users.favourite_style([warm], ["sun"]).shape == (1,)
