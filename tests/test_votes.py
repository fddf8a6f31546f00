"""Several scorers: the majority decides, shares of votes are probability and scores."""

import re
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from preference_files import encoded, picture, value

from diffpref.config import DataConfig
from diffpref.data import check, fields, load_preferences
from diffpref.data.streaming import RowStream
from diffpref.data.votes import fractions, list_votes, shares

SCORERS = ["clip", "aesthetic", "pick"]


def png(seed: int) -> bytes:
    return encoded(picture(8, 8, seed))


def write(path, kind: str, pictures: int = 2, **scores):
    count = len(next(iter(scores.values())))
    columns = {"prompt": [f"prompt {i}" for i in range(count)]} | scores
    features = {"prompt": Value("string")} | {name: List(Value("float64")) for name in scores}
    if kind == "pairs":
        for s, side in enumerate(("chosen", "rejected")):
            columns[side] = [value(png(10 * i + s)) for i in range(count)]
            features[side] = ImageFeature()
    else:
        columns["images"] = [[value(png(10 * i + n)) for n in range(pictures)] for i in range(count)]
        features["images"] = List(ImageFeature())
    Dataset.from_dict({name: columns[name] for name in features}, features=Features(features)).to_parquet(path)
    return path


def load(path, **settings):
    return list(load_preferences(DataConfig(path=str(path), scorers=SCORERS, **settings)))


PAIRS = {  # three scorers' (first, second) -> turned, probability, margin
    "all for the first": ([1, 0], [2.5, 1], [3, -1], False, 1.0, 1.0),
    "two for the second": ([1, 0], [1, 2], [0, 1], True, 2 / 3, 1 / 3),
    "one and two halves": ([0, 1], [1, 1], [2, 2], True, 2 / 3, 1 / 3),
    "even": ([0, 1], [1, 0], [2, 2], False, 0.5, 0.0),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_majority_decides_pairs(tmp_path, streaming):
    scores = {name: [list(map(float, case[i])) for case in PAIRS.values()] for i, name in enumerate(SCORERS)}
    rows = load(write(tmp_path / "a.parquet", "pairs", **scores), streaming=streaming)
    for i, (row, case) in enumerate(zip(rows, PAIRS.values(), strict=True)):
        assert row["chosen"]["bytes"] == png(10 * i + case[3]) and row["rejected"]["bytes"] == png(10 * i + 1 - case[3])
        assert (row["probability"], row["margin"]) == pytest.approx(case[4:])


def test_an_even_split_is_a_tie(tmp_path):
    scores = {name: [list(map(float, case[i])) for case in PAIRS.values()] for i, name in enumerate(SCORERS)}
    config = DataConfig(path=str(write(tmp_path / "a.parquet", "pairs", **scores)), scorers=SCORERS)
    rows = load_preferences(config)
    assert check(rows, config).dropped == {"a tie (data.ties)": 1}
    assert "probability" in fields(rows.column_names, config)


@pytest.mark.parametrize("streaming", [False, True])
def test_vote_fractions_of_a_list(tmp_path, streaming):
    """By hand, three scorers on three pictures: the first beats the second three times and the third once; the second
    beats the third once and is once as good."""
    scores = {"clip": [[3.0, 2.0, 1.0]], "aesthetic": [[5.0, 4.0, 6.0]], "pick": [[1.0, 0.0, 1.0]]}
    (row,) = load(write(tmp_path / "a.parquet", "lists", 3, **scores), streaming=streaming)
    wins = [[0, 1, 1.5 / 3], [0, 0, 1 / 3], [1.5 / 3, 2 / 3, 0]]
    assert [pytest.approx(line) for line in wins] == row["wins"]
    assert row["scores"] == pytest.approx([1.5 / 2, (1 / 3) / 2, (1.5 / 3 + 2 / 3) / 2])


def test_equal_counts_are_equal_scores():
    """0.8 + 0.4 is not 0.2 + 1 in floating point; six votes of fifteen are six."""
    line = [[0, 0.2, 0, 1.0], [0.8, 0, 0, 0.4], [1.0, 1.0, 0, 0.2], [0, 0.6, 0.8, 0]]
    assert sum(line[0]) != sum(line[1])
    assert fractions(line, 5) == [6 / 15, 6 / 15, 11 / 15, 7 / 15]


@pytest.mark.parametrize(("seed", "pictures", "scorers"), [(0, 2, 1), (1, 5, 3), (2, 7, 4)])
def test_vote_fractions_equal_rankdpos_count(seed, pictures, scorers):
    """C_i / (n (k - 1)) counted comparison by comparison; shares of two add up to one."""
    given = np.random.default_rng(seed).integers(0, 3, (scorers, pictures)).astype(float).tolist()
    row = {f"s{n}": line for n, line in enumerate(given)} | {"pictures": pictures}
    found = list_votes(row, DataConfig(path="", scorers=[f"s{n}" for n in range(scorers)]))
    for i in range(pictures):
        won = sum((s[i] > s[j]) + (s[i] == s[j]) / 2 for s, j in product(given, range(pictures)) if j != i)
        assert found["scores"][i] == pytest.approx(won / (scorers * (pictures - 1)))
    table = np.array(shares(given))
    assert table + table.T == pytest.approx(1 - np.eye(pictures)) and sum(found["scores"]) == pytest.approx(
        pictures / 2
    )


BROKEN = [[1.0], [1.0, 2.0, 3.0], [], None, [1.0, None], [1.0, float("nan")], [float("inf"), 1.0]]
FAULT = "not one finite vote for each picture (data.scorers)"


def with_a_broken_vote(path, kind, broken):
    """Three rows of two pictures, of which the second has one scorer who did not do its work."""
    good = [[1.0, 2.0]] * 3
    return str(write(path / "a.parquet", kind, clip=good, aesthetic=good, pick=[[1.0, 2.0], broken, [1.0, 2.0]]))


@pytest.mark.parametrize("kind", ["pairs", "lists"])
@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_broken_vote_is_a_fault_of_its_row(tmp_path, broken, kind, capfd):
    config = DataConfig(path=with_a_broken_vote(tmp_path, kind, broken), scorers=SCORERS)
    result = check(load_preferences(config), config)
    assert result.rows["row"][:] == [0, 2] and result.dropped == {FAULT: 1}
    assert f"data: 1 of 3 rows are left out: {FAULT} 1 (row 1)\n" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["pairs", "lists"])
@pytest.mark.parametrize("broken", BROKEN[2:5], ids=str)
def test_of_a_stream_too(tmp_path, broken, kind):
    config = DataConfig(path=with_a_broken_vote(tmp_path, kind, broken), scorers=SCORERS, streaming=True)
    stream = RowStream(load_preferences(config), config, 0, True)
    block = next(stream.blocks())
    assert sorted(row["row"] for row in block.rows) == [0, 2] and stream.dropped == {FAULT: 1}


@pytest.mark.parametrize("ties", ["drop", "half", "both"])
def test_a_broken_vote_stops_the_run_if_faults_do(tmp_path, ties):
    path = with_a_broken_vote(tmp_path, "pairs", [1.0, None])
    config = DataConfig(path=path, scorers=SCORERS, ties=ties, faults="raise")
    with pytest.raises(ValueError, match=rf"^data.path: row 1 of .*: {re.escape(FAULT)}"):
        check(load_preferences(config), config)


def test_the_winner_of_a_broken_vote_has_no_caption(tmp_path):
    """Nobody knows whose picture it would be."""
    path = with_a_broken_vote(tmp_path, "pairs", None)
    config = DataConfig(path=path, scorers=SCORERS, kind="captions", rejected_captions="shuffle")
    assert check(load_preferences(config), config).dropped == {"picture missing": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_votes_must_fit_the_pictures_of_a_list(tmp_path, streaming):
    scores = {name: [[1.0, 2.0]] for name in SCORERS}
    (row,) = load(write(tmp_path / "a.parquet", "lists", 3, **scores), streaming=streaming)
    assert row["scores"] is None and row["wins"] is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wrong", [[1.0, 2.0], ["a", "b"], [["a", "b"], ["c", "d"]]], ids=str)
def test_a_column_that_holds_no_votes_is_refused_at_once(tmp_path, wrong, streaming):
    path = write(tmp_path / "a.parquet", "pairs", clip=[[1.0, 2.0]] * 2)
    rows = pq.read_table(path).append_column("pick", pa.array(wrong))
    pq.write_table(rows.replace_schema_metadata(None), path)
    config = DataConfig(path=str(path), scorers=["clip", "pick"], streaming=streaming)
    with pytest.raises(ValueError, match="^data.scorers: the column pick of .* must hold a list of numbers, one for"):
        load_preferences(config)


def test_where_each_picture_has_a_row_votes_are_numbers(tmp_path):
    """ImageRewardDB's layout: three pictures of one prompt, the third of another has no vote."""
    names = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        picture(8, 8, i).save(name)
    table = {"prompt": list("aaabb"), "prompt_id": list("aaabb"), "image_path": names, "rank": [1, 2, 3, 1, 2]}
    pq.write_table(pa.table(table | {"clip": [3.0, 1.0, 2.0, 1.0, None]}), tmp_path / "a.parquet")
    config = DataConfig(path=str(tmp_path / "a.parquet"), scorers=["clip"])
    rows = load_preferences(config)
    assert rows["scores"][:] == [[1.0, 0.0, 0.5], None] and check(rows, config).dropped == {FAULT: 1}
    pq.write_table(pa.table(table | {"clip": [[1.0]] * 5}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column clip of .* must hold a number; it holds List"):
        load_preferences(config)


def test_scorers_that_are_not_there_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", "pairs", clip=[[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"data.scorers: .* lacks the column\(s\) \['aesthetic', 'pick'\]; it has"):
        load(path)


def test_scorers_have_nothing_to_say_of_likes(tmp_path):
    features = Features({"prompt": Value("string"), "image": ImageFeature(), "label": Value("int64")})
    rows = {"prompt": ["a"], "image": [value(png(0))], "label": [1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="data.scorers compare pictures; .* holds likes, which have one each"):
        load(tmp_path / "a.parquet")


# --- numbers that are carried along ----------------------------------------------------------------------------------


def carried(path, **settings):
    config = DataConfig(path=str(path), scorers=SCORERS, **settings)
    return config, load_preferences(config, numbers=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_carry_the_numbers_and_nobody_votes(tmp_path, streaming):
    """Pictures stay where they are; an even split is a pair like any other."""
    scores = {name: [list(map(float, case[i])) for case in PAIRS.values()] for i, name in enumerate(SCORERS)}
    config, rows = carried(write(tmp_path / "a.parquet", "pairs", **scores), streaming=streaming)
    assert set(rows.column_names) == {"prompt", "chosen", "rejected", "given"}
    assert "probability" not in fields(rows.column_names, config)
    for i, (row, case) in enumerate(zip(rows, PAIRS.values(), strict=True)):
        assert row["given"] == [list(map(float, pair)) for pair in case[:3]]
        assert row["chosen"]["bytes"] == png(10 * i)
    if not streaming:
        assert check(rows, config).dropped == {}


def test_a_pair_that_no_scorer_tells_apart_is_a_tie(tmp_path):
    scores = {name: [[1.0, 2.0], [3.0, 3.0], [0.0, float(i)]] for i, name in enumerate(SCORERS)}
    path = write(tmp_path / "a.parquet", "pairs", **scores)
    config, rows = carried(path)
    result = check(rows, config)
    assert result.rows["row"][:] == [0, 2] and result.dropped == {"a tie (data.ties)": 1}
    config, rows = carried(path, ties="keep")
    assert check(rows, config).rows["row"][:] == [0, 1, 2]


def test_lists_carry_the_numbers_beside_the_votes(tmp_path):
    """Two scorers of three who contradict each other leave a list without an order, and users with one."""
    scores = {"clip": [[3.0, 1.0], [1.0, 1.0]], "aesthetic": [[1.0, 3.0], [2.0, 2.0]], "pick": [[2.0, 2.0], [3.0, 3.0]]}
    config, rows = carried(write(tmp_path / "a.parquet", "lists", **scores))
    assert rows["given"][:] == [[[3, 1], [1, 3], [2, 2]], [[1, 1], [2, 2], [3, 3]]]
    assert rows["scores"][:] == [[0.5, 0.5], [0.5, 0.5]] and "wins" not in set(rows.column_names)
    result = check(rows, config)
    assert result.rows["row"][:] == [0] and result.dropped == {"all ties": 1}


@pytest.mark.parametrize("kind", ["pairs", "lists"])
@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_broken_number_is_a_fault_of_its_row(tmp_path, broken, kind):
    config, rows = carried(with_a_broken_vote(tmp_path, kind, broken))
    result = check(rows, config)
    assert result.rows["row"][:] == [0, 2] and result.dropped == {FAULT: 1}


def test_a_label_of_the_set_gives_way_to_the_numbers(tmp_path):
    path = write(tmp_path / "a.parquet", "pairs", clip=[[1.0, 2.0]], aesthetic=[[1.0, 2.0]], pick=[[1.0, 2.0]])
    rows = pq.read_table(path).append_column("margin", pa.array([0.0])).append_column("probability", pa.array([0.5]))
    pq.write_table(rows.replace_schema_metadata(None), path)
    assert not {"margin", "probability"} & set(carried(path)[1].column_names)


@pytest.mark.parametrize("settings", [{"kind": "captions", "rejected_captions": "shuffle"}, {"joint": True}], ids=str)
def test_numbers_of_pictures_that_are_parted_are_left_behind(tmp_path, settings):
    path = write(tmp_path / "a.parquet", "pairs", **{name: [[1.0, 2.0], [2.0, 1.0]] for name in SCORERS})
    _, rows = carried(path, **settings)
    assert len(rows) == 2 and "given" not in set(rows.column_names)
