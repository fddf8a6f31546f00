"""The benchmark of tastes: its voters and measures by hand, towers that train along, and the stored numbers."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import tastes  # noqa: E402
import voters  # noqa: E402

from diffpref.scorer import load_scorer  # noqa: E402
from diffpref.scorer.heads import HeadConfig, make_head  # noqa: E402


def test_the_majority_goes_round_in_a_circle():
    """Two groups of three prefer the next look by one place, the third the other by two; slips by 2 %."""
    chance = tastes.majority_chances()
    sigma = lambda x: 0.02 + 0.96 / (1 + math.exp(-x))  # noqa: E731
    for row, column in ((0, 1), (1, 2), (2, 0)):
        assert chance[row, column] == pytest.approx((2 * sigma(2) + sigma(-4)) / 3)
    np.testing.assert_allclose(chance + chance.T, 1)


def test_expected_accuracy_by_hand():
    chance = np.array([[0.8, 0.3], [0.6, 0.9]])
    np.testing.assert_allclose(voters.hits(np.array([1.0, -2.0]), chance), [[0.8, 0.7], [0.6, 0.1]])
    np.testing.assert_allclose(voters.hits(np.array([0.0, -2.0]), chance[0]), [0.5, 0.7])


def test_bayes_rule():
    found = tastes.posterior(np.array([[0.8, 0.5], [0.4, 0.5]]), np.array([True, False]))
    np.testing.assert_allclose(found, [2 / 3, 1 / 3])


def test_what_tells_users_apart_is_asked_first():
    """All agree on comparisons 0 and 2; on 1 and 3 they differ, on 3 more."""
    known = np.array([[0.9, 0.6, 0.5, 0.9], [0.9, 0.4, 0.5, 0.1]])
    asked, answers = tastes.most_telling(known, np.ones(4), 2, np.random.default_rng(0))
    assert asked.tolist() == [3, 1] and answers.all()


def test_choices_are_the_users_own():
    """A user who always takes the first, one who never does."""
    pairs = np.array([[3, 7], [5, 2]])
    said = voters.ask(np.array([[1.0, 1.0], [0.0, 0.0]]), pairs, 20, np.random.default_rng(0))
    shown = pairs[said.which.numpy()]
    turned = np.where(said.who.numpy()[:, None] == 0, shown, shown[:, ::-1])
    np.testing.assert_array_equal(said.pairs.numpy(), turned)


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("bundled")


def pictures(scorer, count: int = 6) -> voters.Pictures:
    """Noise, and the looks that attributes say: line art, warm, cold, and three of none."""
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = np.zeros((count, len(voters.ATTRIBUTES)))
    line, warmth = (voters.ATTRIBUTES.index(name) for name in ("line art", "warmth"))
    seen[0, line], seen[1, warmth], seen[2, warmth], seen[3, line] = 0.95, 1.0, -1.0, 0.5
    image = voters.embedded(scorer.towers, pixels)
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    return voters.Pictures(pixels, image, torch.zeros_like(image), seen, np.array(["cat"] * count), pairs)


def test_looks(scorer):
    assert pictures(scorer).looks().tolist() == [0, 1, 2, -1, -1, -1]


def test_a_tower_trains_along_and_the_scorers_own_does_not(scorer):
    of, before = pictures(scorer), {k: v.clone() for k, v in scorer.towers.state_dict().items()}
    said = voters.ask(np.full((2, 3), 0.7), of.pairs, 8, np.random.default_rng(0))
    head = make_head(HeadConfig(name="pal", prototypes=3, logit_scale=1.0), of.image.shape[1], users=2)
    towers, trained = voters.tune(scorer.towers, head, of, said, tastes.BRADLEY_TERRY, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in scorer.towers.state_dict().items())
    assert not torch.equal(voters.embedded(towers, of.pixels), of.image)
    assert not trained.training and not towers.model.visual.training
    assert trained.users.weight.abs().max() > 0


def test_pictures_are_mirrored_and_moved_on_white():
    pixels = torch.full((64, 3, 8, 8), -1.0)
    pixels[:, :, :, 0] = 1.0  # the left column
    found = voters.moved(pixels, torch.Generator().manual_seed(1))
    assert found.shape == pixels.shape and set(found.unique().tolist()) == {-1.0, 1.0}
    assert len(found.unique(dim=0)) == 2


def test_stored_results_hold_what_is_said_of_them():
    """Intervals hold their values, and the goals: circles, users one knows, and new users by their choices."""
    stored = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("tastes-*.json")]
    assert stored
    for report in stored:
        assert {"hardware", "python", "torch", "diffpref"} <= report["environment"].keys()
        circles = report["cycles"]["heads"]
        assert circles["gpm"]["triples"]["value"] >= 0.95 and circles["bradley_terry"]["triples"]["value"] == 0
        assert all(report["known_users"][name]["over_one_taste"]["low"] > 0 for name in ("PAL", "MiCRo"))
        for way in ("PAL", tastes.TELLING, "MiCRo"):
            rows = report["new_users"][way]
            assert list(rows) == ["0", "1", "4", "8", "16"]
            for row in rows.values():
                assert all(found["low"] <= found["value"] <= found["high"] for found in row.values())


def test_the_figure_is_drawn(tmp_path):
    path = next((ROOT / "benchmarks" / "results").glob("tastes-*.json"))
    tastes.figure(json.loads(path.read_text()), tmp_path / "tastes.png")
    assert (tmp_path / "tastes.png").stat().st_size > 10_000
