"""diffpref scorer eval: what is drawn, and what is said of measures that the data do not allow."""

import pytest
from eval_cases import MIXED, QUICK, Brightness, grey, pair, read, results, save
from matplotlib.figure import Figure

from diffpref.scorer.evaluation import judge
from diffpref.scorer.outcome import Outcome, draw, table


def test_the_reliability_is_drawn_against_what_is_known(tmp_path):
    """σ(8) and σ(−8) are predicted, 0.9 and 0.3 are known; the labels say 1 and 1. Both ways round, four dots in two
    bins."""
    rows = [pair("a", grey(9), grey(1), 1, truth=0.9), pair("b", grey(1), grey(9), 2, truth=0.3)]
    path, figure = save(tmp_path / "a.parquet", rows), Figure()
    found, labels = (results(Brightness(), read(path, truth)) for truth in ("truth", None))
    assert (found.reliability_against, labels.reliability_against) == ("known probabilities", "labels")
    draw(ax := figure.subplots(), found)
    assert ax.collections[0].get_offsets()[:, 1].tolist() == pytest.approx([(0.1 + 0.3) / 2, (0.9 + 0.7) / 2])
    error = found.measures["calibration error, known probabilities"].value
    assert ax.get_title(loc="left") == f"brightness\ncalibration error {error:.3f}, n=2\nagainst known probabilities"
    assert ax.get_ylabel() == "known probability"
    draw(ax := figure.subplots(), labels)
    assert ax.collections[0].get_offsets()[:, 1].tolist() == pytest.approx([0.5, 0.5])


def test_what_is_not_measured_is_said(tmp_path):
    rows = [pair("a cat", grey(9), grey(1), None), pair("a cat", grey(8), grey(2), None)]
    e = read(save(tmp_path / "a.parquet", rows))
    found = results(Brightness(), e)
    assert found.not_measured == {
        "ties": "no tied pair",
        "lists": "the data are pairs",
        "users": "no user_id",
        "cycles": "no cyclic triple in the data",
        "size bias": "all pictures have the same number of pixels",
        "shape bias": "all pictures have the same shape",
        "prompt length": "all prompts have the same number of words",
    }
    said = table(Outcome({"data": "a.parquet"}, e, [judge(Brightness(), e, workers=1)], [found], [], QUICK))
    assert "not measured: ties (no tied pair), lists (the data are pairs), users (no user_id), cycles (no" in said
    one = results(Brightness(), read(save(tmp_path / "b.parquet", [row | {"user_id": 3} for row in rows])))
    assert one.not_measured["users"] == "1 user with a choice"
    every = results(Brightness(), read(save(tmp_path / "c.parquet", MIXED))).not_measured
    assert list(every) == ["lists", "cycles", "prompt length"]


def test_one_score_for_all_pictures(tmp_path):
    """Then it is not the pictures that are alike."""
    rows = [pair("a cat", grey(9), grey(9, 20, 30), 1), pair("cats", grey(9, 10, 30), grey(9), 2)]
    said = results(Brightness(), read(save(tmp_path / "a.parquet", rows))).not_measured
    assert said["size bias"] == said["shape bias"] == said["prompt length"] == "all scores are equal"


def test_an_aspect_that_nobody_judged(tmp_path):
    rows = [pair("a", grey(9), grey(1), 1, beauty=1.0, fit=0.0), pair("b", grey(9), grey(1), 1, beauty=1.0, fit=0.0)]
    e = read(save(tmp_path / "a.parquet", rows), aspects=["beauty", "fit"])
    assert results(Brightness(), e).not_measured["fit"] == "no pair is judged in it"
