"""diffpref rank: what scorers say, put together as the papers do, and what the trainer makes of the file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_files import encoded, picture, value
from scipy.stats import kendalltau
from tiny_pipelines import tiny_sd
from tiny_runs import ENV, ROOT, make_world
from tiny_runs import run as train
from tiny_scorers import tiny_scorer

from diffpref.commands import rank as command
from diffpref.commands import sample, score
from diffpref.config import DataConfig
from diffpref.data import check, fields, load_preferences
from diffpref.data.kinds import COMPARISONS
from diffpref.synpic.preferences import HELD, Pictures
from diffpref.synpic.ranking import BY
from diffpref.synpic.scored import Place

# Three scorers on three pictures: the first beats the second three times and the third 1.5 times; the second beats the
# third once.
CAT = {"clip": [3.0, 2.0, 1.0], "aesthetic": [5.0, 4.0, 6.0], "pick": [1.0, 0.0, 1.0]}
DOG = {"clip": [0.0, 0.5, 4.0], "aesthetic": [1.0, 2.0, 3.0], "pick": [7.0, 8.0, 9.0]}
WINS = [[0, 1, 1.5 / 3], [0, 0, 1 / 3], [1.5 / 3, 2 / 3, 0]]
SCORERS = list(CAT)


def png(seed: int) -> bytes:
    return encoded(picture(32, 32, seed))


def scored(prompt: str, scores: dict, first: int = 0, **more) -> list[dict]:
    """Rows of one prompt, as diffpref score writes them."""
    pipelines = ("base", "tuned", "other", "fourth")
    return [
        {
            "prompt": prompt,
            "image": value(png(first + i)),
            "pipeline": pipelines[i % 4],
            "seed": i,
            "key": f"{prompt} {first + i}",
            "error": None,
            **{name: values[i] for name, values in scores.items()},
            **more,
        }
        for i in range(len(next(iter(scores.values()))))
    ]


ROWS = [*scored("a cat", CAT), *scored("a dog", DOG, 10)]


def write(path: Path, rows: list[dict], scores: list[str] | None = None, **settings) -> str:
    """As diffpref score does; scores: by default all columns of fractions."""
    names = [name for name, one in rows[0].items() if isinstance(one, float)] if scores is None else scores
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"diffpref_scores": json.dumps(names)})
    pq.write_table(table, path, **settings)
    return str(path)


def unsaid(path: Path, rows: list[dict]) -> str:
    """A file of others, which does not say what its scores are."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def ranked(folder: Path, rows: list[dict], *options: str) -> list[dict]:
    """What the command makes of rows, in one file."""
    command.run([write(folder / "scored.parquet", rows), "--out", str(folder / "out.parquet"), *options])
    return pq.read_table(folder / "out.parquet").to_pylist()


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


# --- several scorers, one score ---------------------------------------------------------------------------------------


def by_hand(name: str) -> list[float]:
    """z over all six pictures, then the mean over the three scorers, of the first prompt."""
    every = np.array([[*CAT[s], *DOG[s]] for s in SCORERS])
    z = (every - every.mean(axis=1, keepdims=True)) / every.std(axis=1, keepdims=True)
    return {"votes": [3 / 4, 1 / 6, 7 / 12], "majority": [3 / 4, 0.0, 3 / 4], "mean": z.mean(axis=0)[:3]}[name]


@pytest.mark.parametrize("by", BY)
def test_lists_by_hand(tmp_path, by):
    cat, dog = ranked(tmp_path, ROWS, "--by", by)
    assert cat["prompt"] == "a cat" and cat["scores"] == pytest.approx(by_hand(by), abs=1e-12)
    assert [pytest.approx(line) for line in WINS] == cat["wins"], "the share of scorers, whatever decides"
    assert [cat[name] for name in SCORERS] == [CAT[name] for name in SCORERS]
    assert (cat["pipelines"], cat["seeds"]) == (["base", "tuned", "other"], [0, 1, 2])
    assert cat["keys"] == ["a cat 0", "a cat 1", "a cat 2"]
    assert [one["bytes"] for one in dog["images"]] == [png(10), png(11), png(12)]
    assert np.argsort(dog["scores"]).tolist() == [0, 1, 2] and (cat["group_id"], dog["group_id"]) == (0, 1)


def test_scales_do_not_matter(tmp_path):
    """Votes and majority see the order alone; the mean sees no scale and no zero, but what lies far off."""
    larger = [row | {"pick": 1e6 * row["pick"] - 3.0, "clip": 1e-3 * row["clip"]} for row in ROWS]
    odd = [row | {"clip": row["clip"] ** 3} for row in ROWS]
    for by in BY:
        plain = [row["scores"] for row in ranked(tmp_path, ROWS, "--by", by, "--overwrite")]
        assert [
            pytest.approx(scores, abs=1e-9) for scores in plain
        ] == [row["scores"] for row in ranked(tmp_path, larger, "--by", by, "--overwrite")]  # fmt: skip
        bent = [row["scores"] for row in ranked(tmp_path, odd, "--by", by, "--overwrite")]
        assert (bent == plain) == (by != "mean")


def test_a_scorer_that_says_the_same_of_all_adds_nothing_to_the_mean(tmp_path):
    silent = [row | {"silent": 5.0} for row in ROWS]
    alone = ranked(tmp_path, ROWS, "--by", "mean", "--scorers", "clip")
    both = ranked(tmp_path, silent, "--by", "mean", "--scorers", "clip", "silent", "--overwrite")
    assert both[0]["scores"] == pytest.approx([x / 2 for x in alone[0]["scores"]])


def test_five_scorers_that_split_evenly_are_all_equal(tmp_path):
    """Each of five pictures is first, second, …, last once."""
    around = {f"s{n}": [float((i + n) % 5) for i in range(5)] for n in range(5)}
    left = ranked(tmp_path, [*scored("a cat", around), *scored("a dog", around | {"s0": [9.0, 1.0, 2.0, 3.0, 4.0]}, 9)])
    assert [row["prompt"] for row in left] == ["a dog"]


# --- what is left out -------------------------------------------------------------------------------------------------


def test_what_says_nothing_is_left_out_and_counted(tmp_path, capsys):
    even = {"clip": [1.0, 2.0], "aesthetic": [2.0, 1.0], "pick": [0.0, 0.0]}
    close = {"clip": [1.0, 2.0], "aesthetic": [2.0, 1.0], "pick": [0.0, 1.0]}
    broken = scored("a bird", {name: [1.0, None, 2.0] for name in SCORERS}, 30)
    broken[1]["error"] = "not a picture: no format that PIL knows"
    half = [row | {"pick": None} for row in scored("a fish", {name: [1.0, 2.0] for name in SCORERS}, 40)]
    rows = [
        *ROWS,
        *scored("even", even, 20),
        *scored("close", close, 24),
        *broken,
        *half[:1],
        *scored("a fish", {name: [3.0] for name in SCORERS}, 44),
        *scored(" ", DOG, 50),
    ]
    found = ranked(tmp_path, rows, "--min-gap", "0.5")
    assert [row["prompt"] for row in found] == ["a cat", "a dog", "a bird"]
    assert len(found[2]["images"]) == 2 and found[2]["pipelines"] == ["base", "other"]
    text = capsys.readouterr().out
    pictures = "1 that could not be scored, 1 not scored by all, 3 without a prompt"
    assert set(re.search("left out +pictures (.*); groups", text)[1].split(", ")) == set(pictures.split(", "))
    groups = re.search("; groups (.*)", text)[1].split(", ")
    assert set(groups) == {"1 of one picture", "1 all equal", "1 of a smaller gap than --min-gap"}
    assert "groups       3 (1 of 2, 2 of 3 pictures)" in text


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(
        ValueError, match="no group of pictures is left to be ranked; left out: groups 6 of one picture"
    ):
        ranked(tmp_path, ROWS, "--group-by", "seed")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"scored.parquet, row 4: pick gives (nan|-?inf); a picture without a score"):
        ranked(tmp_path, [row | ({"pick": bad} if i == 4 else {}) for i, row in enumerate(ROWS)])


def test_a_scorer_that_is_not_asked_may_say_what_it_likes(tmp_path):
    rows = [row | {"pick": float("nan")} for row in ROWS]
    assert len(ranked(tmp_path, rows, "--scorers", "clip", "aesthetic")) == 2


# --- who won ----------------------------------------------------------------------------------------------------------


def test_the_summary_says_who_wins_and_whether_scorers_agree(tmp_path, capsys):
    ranked(tmp_path, ROWS, "--by", "majority")
    text = capsys.readouterr().out
    assert "best         base 0.250, other 0.750, tuned 0.000 of the groups" in text, "a tie is shared"
    tau = (kendalltau(CAT["clip"], CAT["pick"]).statistic + 1) / 2
    assert f"agreement    clip, pick: Kendall's tau-b {tau:.3f}, mean of 2 groups" in text
    assert f"written to   {tmp_path}/out.parquet: 2 lists" in text


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COMPARISONS)
def test_pairs_by_hand(tmp_path, how):
    found = ranked(tmp_path, ROWS, "--pairs", how)
    order = {"all": [(0, 2), (0, 1), (2, 1)], "best_worst": [(0, 1)], "adjacent": [(0, 2), (2, 1)]}[how]
    votes, cat = [3 / 4, 1 / 6, 7 / 12], [row for row in found if row["prompt"] == "a cat"]
    assert [(row["chosen"]["bytes"], row["rejected"]["bytes"]) for row in cat] == [(png(i), png(j)) for i, j in order]
    assert [row["probability"] for row in cat] == pytest.approx([WINS[i][j] for i, j in order])
    assert [row["margin"] for row in cat] == pytest.approx([votes[i] - votes[j] for i, j in order])
    assert [row["clip"] for row in cat] == [[CAT["clip"][i], CAT["clip"][j]] for i, j in order]
    assert len({row["group_id"] for row in found}) == 2


def test_pairs_of_a_small_margin_are_left_out(tmp_path):
    found = ranked(tmp_path, ROWS, "--pairs", "all", "--min-gap", "0.5")
    assert min(row["margin"] for row in found) >= 0.5 and sum(row["prompt"] == "a cat" for row in found) == 1


# --- where the pictures lie -------------------------------------------------------------------------------------------


def test_pictures_may_lie_in_files_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "drawn").mkdir()
    for i in range(6):
        (tmp_path / f"drawn/{i}.png").write_bytes(png(i))
    rows = [without(row, "image") | {"path": f"drawn/{i}.png"} for i, row in enumerate(ROWS)]
    assert [one["bytes"] for one in ranked(tmp_path, rows)[1]["images"]] == [png(3), png(4), png(5)], "beside the file"
    monkeypatch.chdir(tmp_path)
    assert ranked(tmp_path, rows, "--overwrite")[0]["images"][2] == {"bytes": png(2), "path": None}
    (tmp_path / "drawn/4.png").unlink()
    with pytest.raises(ValueError, match="the picture at drawn/4.png cannot be read: picture missing: no file"):
        ranked(tmp_path, rows, "--overwrite")
    assert pq.read_metadata("out.parquet").num_rows == 2, "what was there stays"


def test_pictures_may_lie_in_the_shards_that_were_scored(tmp_path):
    """As file and row; in row groups of any size."""
    shards = [write(tmp_path / f"{i}.parquet", ROWS[3 * i : 3 * i + 3], row_group_size=2) for i in range(2)]
    rows = [without(row, "image") | {"file": shards[i // 3], "row": i % 3} for i, row in enumerate(ROWS)]
    found = ranked(tmp_path, rows)
    assert [one["bytes"] for row in found for one in row["images"]] == [row["image"]["bytes"] for row in ROWS]
    with pytest.raises(ValueError, match=r"the picture at .*1.parquet, row 3 cannot be read: the file has 3 rows"):
        ranked(tmp_path, [*rows[:-1], rows[-1] | {"row": 3}], "--overwrite")
    write(tmp_path / "1.parquet", [without(row, "image") for row in ROWS])
    with pytest.raises(ValueError, match="it has no column image; score with --keep-images"):
        ranked(tmp_path, rows, "--overwrite")


def test_few_pictures_are_held_at_once(tmp_path):
    """Those of a file are read a row group at a time, each once when they are asked for in order."""
    rows = [{"prompt": "a", "image": value(png(i))} for i in range(2 * HELD + 1)]
    path, pictures = write(tmp_path / "a.parquet", rows, row_group_size=1), Pictures()
    assert all(pictures.read(Place(path, i))["bytes"] == png(i) for i in range(len(rows)))
    assert pictures.group.cache_info().currsize == HELD
    assert pictures.read(Place(path, 2 * HELD))["bytes"] == png(2 * HELD) and pictures.group.cache_info().hits == 1


# --- several files ----------------------------------------------------------------------------------------------------


def test_files_of_other_scorers_of_the_same_pictures_are_joined(tmp_path):
    whole = ranked(tmp_path, ROWS)
    one = write(tmp_path / "one.parquet", [without(row, "pick") for row in ROWS])
    other = write(tmp_path / "other.parquet", [without(row, "clip", "aesthetic") for row in ROWS[::-1]])
    command.run([one, other, "--scorers", *SCORERS, "--out", str(tmp_path / "joined.parquet")])
    assert pq.read_table(tmp_path / "joined.parquet").to_pylist() == whole


def test_shards_of_one_scoring_are_put_together(tmp_path):
    whole = ranked(tmp_path, ROWS)
    (tmp_path / "parts").mkdir()
    for i in range(6):
        write(tmp_path / f"parts/{i}.parquet", ROWS[i : i + 1])
    command.run([str(tmp_path / "parts"), "--out", str(tmp_path / "out.parquet"), "--overwrite"])
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == whole


def test_two_scores_of_one_picture_are_refused(tmp_path):
    other = write(tmp_path / "other.parquet", [row | {"clip": row["clip"] + 1} for row in ROWS])
    with pytest.raises(ValueError, match=r"clip gives two scores, 3.0 and 4.0, to the picture key a cat 0"):
        command.run([write(tmp_path / "a.parquet", ROWS), other, "--out", str(tmp_path / "out.parquet")])


def test_scores_that_differ_in_their_last_digits_are_one(tmp_path):
    """As those of the same picture in batches of other sizes do."""
    rows = [row | {"clip": row["clip"] * (1 + 4e-7), "pick": row["pick"] + 4e-7} for row in ROWS]
    files = [write(tmp_path / "a.parquet", ROWS), write(tmp_path / "other.parquet", rows)]
    command.run([*files, "--scorers", *SCORERS, "--out", str(tmp_path / "joined.parquet")])
    assert pq.read_table(tmp_path / "joined.parquet").to_pylist() == ranked(tmp_path, ROWS)
    write(tmp_path / "other.parquet", [row | {"clip": row["clip"] + 2e-4} for row in ROWS])
    with pytest.raises(ValueError, match="clip gives two scores, 3.0 and 3.0002"):
        command.run([*files, "--scorers", *SCORERS, "--out", str(tmp_path / "none.parquet")])


def test_groups_may_share_more_than_their_prompt(tmp_path):
    rows = [row | {"seed": i % 2} for i, row in enumerate([*scored("a", {"s": [1.0, 5.0, 3.0, 2.0]})])]
    found = ranked(tmp_path, rows, "--group-by", "seed")
    assert [(row["s"], row["seeds"]) for row in found] == [([1.0, 3.0], [0, 0]), ([5.0, 2.0], [1, 1])]


# --- whose scores -----------------------------------------------------------------------------------------------------


def test_only_what_is_said_to_be_scores_votes(tmp_path):
    rows, out = [row | {"truth_utility": -row["clip"]} for row in ROWS], str(tmp_path / "out.parquet")
    whole = ranked(tmp_path, ROWS)
    command.run([write(tmp_path / "truth.parquet", rows, SCORERS), "--out", out, "--overwrite"])
    assert pq.read_table(out).to_pylist() == whole
    other = unsaid(tmp_path / "other.parquet", rows)
    message = (
        "other.parquet does not say which columns are scores; --scorers names them, of clip, aesthetic, pick, truth_"
    )
    for files in ([other], [str(tmp_path / "scored.parquet"), other]):
        with pytest.raises(ValueError, match=message):
            command.run([*files, "--out", out, "--overwrite"])
    known = unsaid(tmp_path / "known.parquet", ROWS)
    command.run([str(tmp_path / "scored.parquet"), known, "--out", out, "--overwrite"])
    assert pq.read_table(out).to_pylist() == whole
    one = unsaid(tmp_path / "one.parquet", [without(row, "pick", "aesthetic") for row in ROWS])
    command.run([one, "--out", out, "--overwrite"])
    assert "clip" in pq.read_schema(out).names


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no file": ({}, ["nowhere.parquet"], "there is no parquet file at nowhere.parquet; diffpref score writes them"),
    "no such scorer": ({}, ["--scorers", "hps"], "--scorers: there is no column 'hps'; there are prompt, image"),
    "no numbers": ({}, ["--scorers", "key"], "--scorers: the column key holds string and no numbers"),
    "no such group": ({}, ["--group-by", "model"], "--group-by: there is no column 'model'"),
    "a name that is taken": ({"scores": 1.0}, [], "--scorers: scores is a column of preferences; rename it"),
    "no prompt": ({"prompt": ...}, [], "it needs prompt, a scorer's numbers, and where the pictures lie"),
    "no place": ({"image": ...}, [], "it needs prompt, a scorer's numbers, and where the pictures lie"),
    "no scores": (dict.fromkeys(SCORERS, ...), [], "no column of scores is there; --scorers can name some"),
    "a gap": ({}, ["--min-gap", "-1"], "argument --min-gap: must be 0 or more"),
    "no gap": ({}, ["--min-gap", "nan"], "argument --min-gap: must be 0 or more"),
    "a kind": ({}, ["--by", "median"], "argument --by: invalid choice: 'median'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said(tmp_path, mistake):
    changes, options, message = MISTAKES[mistake]
    rows = [without(row | changes, *(name for name in changes if changes[name] is ...)) for row in ROWS]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        ranked(tmp_path, rows, *options) if mistake != "no file" else command.run([*options, "--out", "x.parquet"])


def test_choices_are_those_of_the_tables():
    assert set(command.COMPARISONS) == set(COMPARISONS) and set(command.BY) == set(BY)


def test_the_command_as_a_user_gives_it(tmp_path):
    """A file that is there is not replaced, and that is one line."""
    line = [sys.executable, "-m", "diffpref.cli", "rank", write(tmp_path / "a.parquet", ROWS), "--out"]
    (tmp_path / "out.parquet").write_text("mine")
    done = subprocess.run([*line, str(tmp_path / "out.parquet")], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and (tmp_path / "out.parquet").read_text() == "mine"
    assert done.stderr == f"error: {tmp_path}/out.parquet is there already; --overwrite replaces it\n"


# --- the trainer takes it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), ("sd",))


@pytest.mark.parametrize(
    ("objective", "options", "data"),
    [
        ("rankdpo", [], {}),
        ("rankdpo", ["--by", "mean"], {"scores": "votes"}),
        ("smpo", [], {}),
        ("dpo", ["--pairs"], {"min_margin": 0.1}),
    ],
)
def test_the_trainer_takes_what_is_written(world, tmp_path, objective, options, data):
    ranked(tmp_path, ROWS, *options)
    settings = {"data": {"path": str(tmp_path / "out.parquet"), **data}, "sample": {"prompts": []}}
    name = "-".join([objective, *options]).replace("--", "")
    report, log, _ = train(world, name, objective={"name": objective}, train={"max_train_steps": 2}, **settings)
    assert report["steps"] == 2 and all(np.isfinite(line["loss"]) for line in log)


def test_the_trainers_own_vote_on_the_scorers_columns_is_the_same(tmp_path):
    ranked(tmp_path, ROWS)
    config = DataConfig(path=str(tmp_path / "out.parquet"), scorers=SCORERS)
    voted, plain = list(load_preferences(config)), list(load_preferences(DataConfig(path=config.path)))
    assert [row["scores"] for row in voted] == [row["scores"] for row in plain]
    assert [row["wins"] for row in voted] == [row["wins"] for row in plain]
    rows = load_preferences(config)
    assert check(rows, config).dropped == {} and fields(rows.column_names, config) == {"pairs", "scores", "probability"}


# --- from pipelines to preferences ------------------------------------------------------------------------------------


def test_sample_score_rank(tmp_path):
    """Two pipelines, two scorers: the pictures go through as they were drawn, whether they lie in the shards or not."""
    for seed in range(2):
        tiny_sd(seed=seed).save_pretrained(tmp_path / f"pipe-{seed}")
        tiny_scorer(tmp_path / f"judge-{seed}", seed=seed)
    pipelines = [f"p{seed}={tmp_path}/pipe-{seed}" for seed in range(2)]
    wanted = ["--prompts", "a cat", "a dog", "--seeds", "2", "--steps", "1", "--shard-size", "3", "--device", "cpu"]
    sample.run(["--pipeline", *pipelines, *wanted, "--out", str(tmp_path / "drawn")])
    models = ["--model", *(f"j{seed}={tmp_path}/judge-{seed}" for seed in range(2)), "--device", "cpu"]
    found = {}
    for kept in (False, True):
        out, made = tmp_path / f"scored-{kept}.parquet", tmp_path / f"lists-{kept}.parquet"
        score.run([str(tmp_path / "drawn"), *models, "--out", str(out), *(["--keep-images"] if kept else [])])
        command.run([str(out), "--by", "mean", "--out", str(made)])
        found[kept] = pq.read_table(made).to_pylist()
    assert found[True] == found[False] and [row["prompt"] for row in found[True]] == ["a cat", "a dog"]
    drawn = {
        row["key"]: row for path in (tmp_path / "drawn").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    }
    for row in found[True]:
        assert row["pipelines"] == ["p0", "p0", "p1", "p1"] and row["seeds"] == [0, 1, 0, 1]
        assert [one["bytes"] for one in row["images"]] == [drawn[key]["image"]["bytes"] for key in row["keys"]]
        assert len(set(row["j0"])) == 4 == len(set(row["j1"]))
