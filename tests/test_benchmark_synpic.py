"""The Syn-Pic benchmark: its halves of the users, its verdicts by hand, and a page that holds the stored numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import synpic  # noqa: E402


def test_each_head_sees_the_choices_of_other_users(tmp_path):
    scale = synpic.Scale(tmp_path)
    users = [pq.read_table(synpic.half_of_users(scale, name))["user_id"].to_pylist() for name in synpic.HALVES]
    assert set(users[0]) == set(range(100)) and set(users[1]) == set(range(100, 200))
    assert len(users[0]) + len(users[1]) == 6000


def test_pictures_are_made_of_one_half_of_the_concepts_and_judged_on_the_other(tmp_path):
    scale = synpic.Scale(tmp_path)
    made, judged = (
        set(synpic.prompts(scale, str(held_out), held_out).read_text().splitlines()) for held_out in (False, True)
    )
    assert (len(made), len(judged), made & judged) == (73, 36, set())
    assert judged == set((synpic.EMOJI / "evaluation_prompts.txt").read_text().splitlines())


def test_verdicts_by_hand():
    def drawn(scores):
        return synpic.Drawn([], ["a", "a", "b", "b"], np.array(scores), 0.5)

    said = synpic.verdicts({"base": drawn([0.0, 4.0, 0.0, 4.0]), "tuned": drawn([1.0, 3.0, 2.0, 4.0])})
    rate = said["tuned"]["win_rate"]
    assert (rate["value"], rate["n"], rate["ties"], rate["clusters"]) == (0.625, 4, 1, 2) and said.keys() == {"tuned"}
    assert said["tuned"]["gain"] == 0.25, "half a unit; the base's deviation is 2"


def test_the_page_holds_the_stored_numbers():
    stored = sorted((ROOT / "benchmarks" / "results").glob("synpic-*.json"))
    if not stored:
        pytest.skip("no results yet")
    assert (ROOT / "gallery" / "synpic" / "README.md").read_text() in [
        synpic.page(json.loads(path.read_text())) for path in stored
    ]
