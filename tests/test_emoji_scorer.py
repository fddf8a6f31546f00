"""The scorer that ships with the package: as good on what nobody trained on as its page says."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.config import load_config
from diffpref.emoji_world.artwork import load_artwork, split_concepts
from diffpref.emoji_world.held_out import HELD_OUT
from diffpref.emoji_world.ship_scorer import SCORER, measured
from diffpref.emoji_world.users import TRAIN
from diffpref.scorer import PreferenceScorer
from diffpref.scorer.judges import bundled


@pytest.fixture(scope="module")
def scorer() -> PreferenceScorer:
    return PreferenceScorer.from_pretrained("bundled", device="cpu")


def test_held_out_choices_are_of_unseen_users_on_unseen_concepts():
    rows = pq.read_table(HELD_OUT, columns=["prompt", "user_id", "truth_population"]).to_pylist()
    trained, held = split_concepts(load_artwork().concepts)
    assert {row["prompt"] for row in rows} <= set(held) and not {row["prompt"] for row in rows} & set(trained)
    assert min(row["user_id"] for row in rows) >= TRAIN and len({row["user_id"] for row in rows}) == 56
    assert all(0 < row["truth_population"] < 1 for row in rows)


def test_it_is_near_the_bound_and_calibrated(scorer):
    """Within three points of one who knows the population, whose probabilities its own are near."""
    found = measured(scorer)
    assert found["short of bound"]["value"] < 0.03
    assert found["calibration error"]["value"] < 0.03
    recorded = json.loads((SCORER / "scorer.json").read_text())["measured"]
    assert found["expected accuracy"]["value"] == pytest.approx(recorded["expected accuracy"]["value"], abs=0.003)


def test_it_reads_its_prompt(scorer):
    """A drawing under its own name is liked better than under another one."""
    art = load_artwork()
    pictures = [Image.fromarray(((x + 1) * 127.5).byte().permute(1, 2, 0).numpy()) for x in art.images[::9]]
    own = [art.caption(i, styled=False) for i in range(0, len(art.images), 9)]
    other = own[7:] + own[:7]
    better = scorer.score(images=pictures, prompts=own) > scorer.score(images=pictures, prompts=other)
    assert better.float().mean() > 0.95


def test_it_is_small_and_says_what_it_is(scorer):
    assert sum(path.stat().st_size for path in SCORER.iterdir()) < 15e6
    assert "emoji world" in scorer.description and "training users" in scorer.trained_on


def test_it_judges_a_run_by_its_dotted_path(scorer):
    rows = pq.read_table(HELD_OUT).slice(0, 4).to_pylist()
    prompts = [row["prompt"] for row in rows]
    given = [
        "--name",
        "a",
        "--data.path",
        "x",
        "--model.pretrained_model_name_or_path",
        "y",
        "--sample.prompts",
        "[a,b]",
    ]
    config = load_config([*given, "--sample.prompts", "[a,b]", "--judge.judge", "diffpref.scorer.judges.bundled"])
    found = config.judge.judge([row["chosen"] for row in rows], prompts)
    expected = scorer.score(images=[row["chosen"] for row in rows], prompts=prompts).double() / scorer.temperature
    assert config.judge.judge is bundled and np.allclose(found, expected.numpy())
