"""diffpref scorer eval: what it reads, what it scores, what it says, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from eval_cases import MIXED, QUICK, Brightness, grey, pair, ranked, read, results, save
from PIL import Image
from preference_files import FEATURES, captions, encoded, likes, truncated, value
from tiny_scorers import pictures, tiny_scorer

from diffpref.commands.scorer import named, run
from diffpref.data.pictures import open_picture
from diffpref.scorer.evaluation import evaluate, fit, judge, own
from diffpref.scorer.plugins import load_scorer

# --- what is read -----------------------------------------------------------------------------------------------------


def test_pictures_are_read_once_and_ties_are_known(tmp_path, capsys):
    e = read(save(tmp_path / "a.parquet", MIXED))
    assert e.label.tolist() == [1, 1, 1, 0] and e.users == [7, 8, 7, None]
    assert e.pairs.tolist() == [[0, 1], [1, 0], [2, 3], [4, 5]]
    assert (len(e.items), e.pictures) == (6, 5)
    assert e.sizes[3].tolist() == [24, 16]
    assert e.probability is None and e.truth is None
    assert e.left_out == {"prompt empty": 1} and "1 of 5 rows are left out" in capsys.readouterr().out
    scorer = Brightness()
    judgement = judge(scorer, e, workers=1)
    assert len(scorer.seen) == 6
    assert judgement.margin.tolist() == [100, -100, 100, 100]


def test_measures_of_pairs_by_hand(tmp_path):
    found = results(Brightness(), read(save(tmp_path / "a.parquet", MIXED))).measures
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["accuracy"].policy == "1 tie of people left out, 0 exact ties of the scorer counted half"
    assert found["accuracy, three-way"].value == 2 / 4
    assert "exact ties alone" in found["accuracy, three-way"].policy
    assert found["accuracy, mean of users"].value == 0.5  # user 7: 2 of 2, user 8: 0 of 1
    assert found["accuracy, winner smaller"].n == 1 and found["accuracy, of one size"].n == 2
    alike = results(Brightness(), read(save(tmp_path / "b.parquet", MIXED)), prompts_alike=True).measures
    assert alike["accuracy"].value == pytest.approx((0.5 * 1 + 0.5 * 0 + 0.5 * 1) / 1.5)  # two cats, two dogs


def test_a_user_that_is_no_number_is_nobody(tmp_path):
    """Columns of floats say NaN where nobody is known."""
    columns = {name: FEATURES[name] for name in ("prompt", "chosen", "rejected")}
    features = Features(columns | {"user_id": Value("float64")})
    rows = [pair("a", grey(9), grey(1), user) for user in (1.0, float("nan"), 1.0)]
    pq.write_table(Dataset.from_list(rows, features=features).data.table, tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")).users == [1.0, None, 1.0]


def test_lists_by_hand(tmp_path, capsys):
    rows = [
        ranked("a", [10, 20, 30], [1.0, 2.0, 3.0]),
        ranked("b", [10, 20], [2.0, 1.0]),
        ranked("c", [10], [1.0]),
        ranked("d", [10, 20], [1.0, 1.0]),
        ranked("e", [10, 20, 30], [1.0, 1.0, 0.0]),
    ]
    e = read(save(tmp_path / "a.parquet", rows))
    assert e.left_out == {"list of one": 1, "all ties": 1} and "left out" in capsys.readouterr().out
    assert (len(e.lists), len(e.pairs), int((e.label == 0).sum())) == (3, 7, 1)
    found = results(Brightness(), e).measures
    assert found["Kendall tau-b"].value == pytest.approx((1 - 1 - 2 / np.sqrt(6)) / 3)
    assert found["inversion accuracy"].value == pytest.approx((1 + 0 + 0) / 3)
    assert found["accuracy"].value == pytest.approx(3 / 6)
    assert found["Kendall tau-b"].interval == "95 % interval: bootstrap of whole prompts"
    assert not any("user" in name for name in found)


def test_votes_are_probabilities(tmp_path):
    """A list's wins say how sure each pair is, and calibration is against that."""
    wins = [[0.0, 0.75], [0.25, 0.0]]
    rows = [ranked(p, [60, 50], [0.75, 0.25]) | {"wins": wins} for p in "ab"]
    e = read(save(tmp_path / "a.parquet", rows))
    assert e.probability.tolist() == [0.75, 0.75]
    found = results(Brightness(10 / np.log(3)), e).measures  # σ(10/T) = 3/4
    assert found["calibration error"].value == pytest.approx(0, abs=1e-6)
    assert "against probabilities" in found["calibration error"].policy


def test_two_prompts_under_one_picture(tmp_path):
    e = read(save(tmp_path / "a.parquet", captions(4)))
    assert e.pictures == 4 and len(e.items) == 8
    assert results(Brightness(), e).measures["accuracy"].value == 0.5
    with pytest.raises(ValueError, match="compares pictures under one prompt, and these pairs have two"):
        judge(tiny_scorer(head="gpm"), e, workers=1)


def test_what_somebody_knows_of_the_pairs(tmp_path):
    rows = [pair("a", grey(9), grey(1), 1, truth=0.9), pair("b", grey(1), grey(9), 2, truth=0.7)]
    found = results(Brightness(), read(save(tmp_path / "a.parquet", rows), truth="truth")).measures
    assert found["expected accuracy"].value == pytest.approx((0.9 + 0.3) / 2)
    assert found["Bayes bound"].value == pytest.approx(0.8)
    assert found["short of bound"].value == pytest.approx(0.2)
    assert "known probabilities" in " ".join(found)


def test_aspects_of_the_data_and_of_the_scorer(tmp_path):
    """An aspect that the head names is judged by its own scores, another by the overall one."""
    first, second = (value(encoded(p)) for p in pictures(2))
    marks = {"beauty": 1.0, "fit": None}, {"beauty": 0.0, "fit": -1.0}
    path = save(tmp_path / "a.parquet", [pair("a cat", first, second, 1, **m) for m in marks])
    scorer = tiny_scorer(head="aspects", settings={"names": ["beauty", "other"]})
    scorer.head.logit_scale[0] = -3.0
    e = read(path, aspects=["beauty", "fit"])
    found = judge(scorer, e, workers=1)
    one, two = (scorer.judged([scorer.prepare(p)], ["a cat"]).aspects[0, 0].item() for p in pictures(2))
    assert found.aspects["beauty"] == pytest.approx([one - two] * 2, rel=1e-4) and list(found.aspects) == ["beauty"]
    measures = results(scorer, e).measures
    assert measures["accuracy, beauty"].policy.startswith("the scorer's own aspect; 1 tie of people")
    assert measures["accuracy, fit"].policy.startswith("by its one score") and measures["accuracy, fit"].n == 1
    assert measures["accuracy, fit"].value == 1 - measures["accuracy"].value


# --- what scores ------------------------------------------------------------------------------------------------------


def choices(number: int, seed: int = 0, users: int = 3) -> list[dict]:
    """Pairs of smooth pictures, some of them in several pairs."""
    rng, images = np.random.default_rng(seed), [value(encoded(p)) for p in pictures(6, seed)]
    sides = [rng.choice(6, 2, replace=False) for _ in range(number)]
    return [pair(f"prompt {i % 2}", images[a], images[b], i % users) for i, (a, b) in enumerate(sides)]


def test_cyclic_tastes_are_asked_for_pairs(tmp_path):
    """The margins of a head without scores are its own log-odds, each two pictures asked once."""
    e, scorer = read(save(tmp_path / "a.parquet", choices(9))), tiny_scorer(head="gpm")
    found = judge(scorer, e, batch_size=4, workers=1).margin
    for (first, second), margin in zip(e.pairs.tolist(), found, strict=True):
        sides = [[scorer.prepare(open_item(e, item))] for item in (first, second)]
        assert margin == pytest.approx(scorer.logits(*sides, [e.items[first].prompt]).item(), abs=1e-5)


def open_item(e, item: int) -> Image.Image:
    """The picture of an item."""
    where = e.items[item]
    return open_picture(list(e.kind.named_pictures(e.rows[where.row]).values())[where.picture])


def test_each_user_has_their_own_scorer(tmp_path):
    """Users 0 and 1 are known, 2 is judged as the population."""
    scorer = tiny_scorer(head="pal", settings={"prototypes": 3, "users": 2}, users=[0, 1])
    scorer.head.users.weight.copy_(torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0]]))
    for part in scorer.head.tastes.parameters():
        part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    e = read(save(tmp_path / "a.parquet", choices(9)), personal=True)
    found = judge(scorer, e, workers=1)
    assert found.strangers == 1
    for item, score in zip(range(len(e.items)), found.scores, strict=True):
        user = e.items[item].user
        one = scorer if user == 2 else scorer.for_user(user)
        expected = one.judge([one.prepare(open_item(e, item))], [e.items[item].prompt]).item()
        assert score == pytest.approx(expected, rel=1e-4)
    alone = judge(scorer, read(str(tmp_path / "a.parquet")), workers=1)
    assert alone.strangers == 0 and not np.allclose(alone.margin, found.margin)


def test_a_broken_picture_leaves_its_pairs_out(tmp_path):
    """For every scorer, also one that could read it, so that all have the same pairs."""
    rows = [pair("a", grey(9), grey(1), 1), pair("b", truncated(), grey(1), 1), pair("b", grey(8), grey(2), 2)]
    e = read(save(tmp_path / "a.parquet", rows))
    judgements = [judge(Brightness(), e, name=name, workers=1) for name in "xy"]
    assert [len(one.faults) for one in judgements] == [1, 1] and "damaged" in next(iter(judgements[0].faults.values()))
    found, gaps = evaluate(judgements, e, [own(one) for one in judgements], QUICK)
    assert found[0].measures["accuracy"].n == 2
    assert [(a, b, gap.value, gap.n) for a, b, gap in gaps] == [("x", "y", 0.0, 2)]
    with pytest.raises(ValueError, match="no pair is left: 3 of 6 pictures"):
        e.without({0, 2, 4})


def test_no_number_is_the_scorers_fault(tmp_path):
    e = read(save(tmp_path / "a.parquet", MIXED[:3]))
    with pytest.raises(ValueError, match="brightness gives a picture no number .*nan.* weights may be damaged"):
        judge(Brightness(wrong=100.0), e, workers=1)


# --- thresholds and temperature ---------------------------------------------------------------------------------------


def graded(levels: list[tuple[int, int, float]]) -> list[dict]:
    """(chosen, rejected, margin of people) under prompts of their own."""
    return [pair(f"p{i}", grey(a), grey(b), i % 4, margin=m) for i, (a, b, m) in enumerate(levels)]


def test_thresholds_come_from_other_pairs(tmp_path):
    other = read(save(tmp_path / "o.parquet", graded([(60, 50, 0.0), (62, 50, 0.0), (90, 50, 1.0), (95, 50, 1.0)])))
    e = read(save(tmp_path / "a.parquet", graded([(61, 50, 0.0), (80, 50, 1.0), (50, 85, 1.0), (55, 50, 1.0)])))
    judged, judgement = judge(Brightness(), other, workers=1), judge(Brightness(), e, workers=1)
    fitted = fit(judged, other, "o.parquet", temperature=False)
    assert fitted.thresholds["three"].value == 12 and fitted.temperature == 1
    found = evaluate([judgement], e, [fitted], QUICK)[0][0].measures["accuracy, three-way, tie-calibrated"]
    assert found.value == 2 / 4 and "chosen on o.parquet" in found.policy
    alone = evaluate([judgement], e, [own(judgement)], QUICK)[0][0].measures["accuracy, three-way, tie-calibrated"]
    assert alone.value >= found.value and "in-sample" in alone.policy


def test_the_temperature_is_fitted(tmp_path):
    """Right by 20 three times, wrong once: σ(20/T) = 3/4."""
    e = read(save(tmp_path / "a.parquet", graded([(70, 50, 1.0)] * 3 + [(50, 70, 1.0)])))
    judgement = judge(Brightness(), e, workers=1)
    fitted = fit(judgement, e, "", temperature=True)
    assert fitted.temperature == pytest.approx(20 / np.log(3)) and fitted.source == "fitted in-sample"
    found = evaluate([judgement], e, [fitted], QUICK)[0][0]
    assert found.measures["calibration error"].value == pytest.approx(0, abs=1e-6)
    right = read(save(tmp_path / "b.parquet", graded([(70, 50, 1.0), (90, 50, 1.0)])))
    assert "every one of these labels right" in fit(judge(Brightness(), right), right, "", temperature=True).source
    tied = read(save(tmp_path / "c.parquet", graded([(70, 50, 0.0), (90, 50, 0.0)])))
    with pytest.raises(ValueError, match="fitted on pairs with a winner"):
        fit(judge(Brightness(), tied), tied, "", temperature=True)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of tiny scorers."""
    place = tmp_path_factory.mktemp("models")
    tiny_scorer(place / "one", seed=0, name="one")
    tiny_scorer(place / "two", head="gpm", seed=1, name="two")
    return place


def test_the_command(tmp_path, models):
    """Odd shapes, ties, users that are missing, a broken picture, two scorers: a table, JSON and a plot."""
    images = [value(encoded(p, "jpeg")) for p in (*pictures(3), *pictures(2, 1, (90, 20)))]
    odd = [
        value(encoded(p.convert(mode))) for p, mode in zip(pictures(3, 2, (21, 50)), ("L", "RGBA", "P"), strict=True)
    ]
    every = [*images, *odd]
    rows = [
        pair(f"prompt {i % 5} of {'several ' * (i % 3)}words", every[i % 8], every[(i + 3) % 8],
             i % 6 if i % 7 else None, margin=float(i % 9 != 0), truth=0.5 + i % 5 / 10)
        for i in range(40)
    ]  # fmt: skip
    rows.append(pair("broken", truncated(), every[0], 1, margin=1.0, truth=0.6))
    path = save(tmp_path / "a.parquet", rows)
    command = [sys.executable, "-m", "diffpref.cli", "scorer", "eval", "--data", path, "--truth", "truth", "--by-user"]
    command += ["--model", str(models / "one"), str(models / "two"), "--fit-temperature", "--batch-size", "16"]
    files = ["--out", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), "--seed", "3"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=os.environ, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert any(line.split() == ["one", "two"] for line in lines)
    for name in ("accuracy", "one − two", "calibration error", "accuracy, worst tenth of users", "Bayes bound"):
        assert any(line.startswith(name) for line in lines), name
    assert "5 ties of people left out, 0 exact ties of the scorer counted half" in done.stdout
    assert "1 picture one cannot score, among them: picture damaged" in done.stdout
    assert "prompts and of whole users, variances combined" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["pairs"], report["users"], report["resampling"]["seed"]) == (41, 6, 3)
    assert [one["name"] for one in report["models"]] == ["one", "two"]
    assert report["model"] == [str(models / "one"), str(models / "two")] and report["truth"] == "truth"
    accuracies = [one["measures"]["accuracy"] for one in report["models"]]
    gap = report["differences"][0]
    assert gap["value"] == pytest.approx(accuracies[0]["value"] - accuracies[1]["value"])
    assert accuracies[0]["n"] == 35 and report["unreadable"][0]["row"] == 40
    assert {"torch", "open_clip_torch", "torchmetrics"} <= set(report["environment"])
    with Image.open(tmp_path / "r.png") as drawn:
        assert drawn.width > 600


def test_personal_and_calibration_by_command(tmp_path, models, capsys):
    """In process: other pairs for the temperature, each choice for its own user, whom this scorer does not know."""
    path, other = save(tmp_path / "a.parquet", choices(12)), save(tmp_path / "o.parquet", choices(12, 3))
    run(["eval", "--model", str(models / "one"), "--data", path, "--calibration", other, "--fit-temperature",
         "--personal", "--prompts-alike", "--workers", "1"])  # fmt: skip
    said = capsys.readouterr().out
    assert f"fitted on {other}" in " ".join(said.split())
    assert "one: does not know 3 users, judged as the population" in said


def test_names_in_tables(tmp_path):
    """All trained scorers lie in folders named scorer: they are called as they call themselves, if that differs."""
    names = {"a/scorer": "cats", "b/scorer": "cats", "c/scorer": "dogs"}
    for place, name in names.items():
        tiny_scorer(tmp_path / place, name=name)
    asked = {str(tmp_path / place): load_scorer(str(tmp_path / place), device="cpu") for place in names}
    alike = str(tmp_path / "a/scorer"), str(tmp_path / "b/scorer")
    assert list(named(asked | {"plugin": Brightness()})) == [*alike, "dogs", "plugin"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (likes(3), [], "accuracy is of pairs, and .* holds likes"),
        (MIXED, ["--truth", "gone"], "--truth and --aspects: .* lacks the column.*'gone'"),
        (graded([(70, 50, 0.0), (90, 50, 0.0)]), [], "none of the 2 pairs has a winner"),
        (MIXED, ["--out", "gone/r.json"], "there is no folder .*gone to write r.json"),
        (MIXED, ["--out", "r.txt"], "r.txt must end with one of .json"),
        (MIXED, ["--plot", "gone/r.png"], "there is no folder"),
        (MIXED, ["--batch-size", "0"], "must be a positive number"),
        (MIXED, ["--seed", "-1"], "--seed must not be negative"),
        (MIXED, ["--kind", "lists"], "holds pairs"),
        (MIXED, ["--device", "nonsense"], "device 'nonsense' is not to be had here: .*; cpu is always there"),
    ],
)
def test_mistakes(tmp_path, models, monkeypatch, rows, options, message):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "a.parquet", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(["eval", "--model", str(models / "one"), "--data", path, "--workers", "1", *options])


def test_mistakes_in_names(tmp_path, models):
    path = save(tmp_path / "a.parquet", MIXED)
    with pytest.raises(ValueError, match="names a scorer twice"):
        run(["eval", "--model", "x", "x", "--data", path])
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(["eval", "--model", str(tmp_path / "nowhere"), "--data", path])
    with pytest.raises(FileNotFoundError, match="no data set at"):
        run(["eval", "--model", str(models / "one"), "--data", str(tmp_path / "gone.parquet")])
    with pytest.raises(ValueError, match="diffpref scorer has no 'evaluate'; there are eval, train"):
        run(["evaluate"])


def test_help_says_what_there_is(capsys):
    run(["--help"])
    assert "diffpref scorer eval --help" in capsys.readouterr().out
