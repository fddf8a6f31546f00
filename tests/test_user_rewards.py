"""Made-up users who weigh scorers: a direction for each group, and what its user says of the row."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from source_cases import SCORERS, batch, built, weighed, write

from diffpref.cache.team import Team
from diffpref.config import DataConfig
from diffpref.data import load_preferences
from diffpref.data.kinds import kind_of
from diffpref.users.sources import SOURCES
from diffpref.users.sources.rewards import RewardUsers


def asked(source: RewardUsers, rows: Dataset, row: int, key: int):
    """What a row says when the user of this key is asked."""
    values = {name: value for name, value in rows[row].items() if name not in ("chosen", "rejected", "images")}
    return source.says(kind_of(rows.column_names, source.data).says(values, source.data), values, key)


def test_scores_are_measured_over_the_whole_set(tmp_path):
    source, _ = built(weighed(tmp_path / "a.parquet"))
    np.testing.assert_allclose(source.mean, [2, 20])
    np.testing.assert_allclose(source.deviation, [(10 / 6) ** 0.5, (400 / 6) ** 0.5])


@pytest.mark.parametrize("weights", ["one_hot", "sphere"])
def test_a_user_is_a_unit_direction_drawn_from_seed_and_key(tmp_path, weights):
    source, _ = built(weighed(tmp_path / "a.parquet", users={"weights": weights}, seed=5))
    assert (source.width, source.sequence) == (2, False)
    drawn = torch.stack([source.inputs(0, key, None)["user"] for key in range(400)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400))
    assert (drawn >= 0).all()
    again = torch.stack([source.inputs(2, key, "ann")["user"] for key in range(400)])
    assert torch.equal(drawn, again)  # neither the row nor whom the data name is of influence
    other, _ = built(weighed(tmp_path / "a.parquet", users={"weights": weights}, seed=6))
    assert not torch.equal(drawn, torch.stack([other.inputs(0, key, None)["user"] for key in range(400)]))
    if weights == "one_hot":
        assert set(map(tuple, drawn.tolist())) == {(1.0, 0.0), (0.0, 1.0)} and 160 < drawn[:, 0].sum() < 240
    else:  # uniform on a quarter of a circle: the angle's quarters are equally full
        angle = torch.atan2(drawn[:, 1], drawn[:, 0]) / (torch.pi / 2)
        assert all(70 < count < 130 for count in torch.histc(angle, 4, 0, 1))


def test_pairs_are_turned_where_the_user_says_so(tmp_path):
    """By hand: the first row's user prefers the first picture where 4/sd_sharp·v_0 > 20/sd_warm·v_1."""
    source, rows = built(weighed(tmp_path / "a.parquet"))
    seen = set()
    for key in range(40):
        v = source.direction(key)
        first = 4 / (10 / 6) ** 0.5 * v[0] > 20 / (400 / 6) ** 0.5 * v[1]
        said = asked(source, rows, 0, key)
        assert said.pairs == (((0, 1),) if first else ((1, 0),))
        assert said.scores == ((1.0, 0.0) if first else (0.0, 1.0))
        assert said.labels == ((1.0, -1.0) if first else (-1.0, 1.0)) and said.probability is None
        assert said.prompts == ["prompt 0", "prompt 0"]
        seen.add(bool(first))
    assert seen == {True, False}


TIES = {  # data.ties -> pairs, scores and probability of a pair that the user cannot tell apart
    "drop": ((), (0.5, 0.5), None),
    "keep": (((0, 1),), (1.0, 0.0), None),
    "half": (((0, 1),), (0.5, 0.5), (0.5,)),
    "both": (((0, 1), (1, 0)), (0.5, 0.5), None),
}


@pytest.mark.parametrize("ties", TIES)
def test_a_tie_is_one_for_the_user(tmp_path, ties):
    """The second row is a tie for who looks at sharpness alone, and none for the other."""
    source, rows = built(weighed(tmp_path / "a.parquet", users={"weights": "one_hot"}, data={"ties": ties}))
    keys = {source.direction(key)[0].item(): key for key in range(20)}
    tied, other = asked(source, rows, 1, keys[1.0]), asked(source, rows, 1, keys[0.0])
    assert (tied.pairs, tied.scores, tied.probability) == TIES[ties]
    assert other.pairs == ((1, 0),) and other.probability == ((1.0,) if ties == "half" else None)


def test_a_dropped_caption_stays_dropped(tmp_path):
    source, rows = built(weighed(tmp_path / "a.parquet"))
    values = {name: rows[0][name] for name in ("prompt", "given")}
    said = kind_of(rows.column_names, source.data).says(values, source.data).without_prompts()
    assert source.says(said, values, 0).prompts == ["", ""]


LISTED = {  # data.comparisons -> pairs of a list that the user puts in the order 2, 0, 1
    "all": {(2, 0), (2, 1), (0, 1)},
    "best_worst": {(2, 1)},
    "adjacent": {(2, 0), (0, 1)},
}


@pytest.mark.parametrize("comparisons", LISTED)
def test_lists_are_ranked_by_the_users_own_scores(tmp_path, comparisons):
    sharp, warm = [[2.0, 1.0, 3.0], [1.0, 2.0]], [[1.0, 2.0, 1.0], [2.0, 1.0]]
    config = weighed(
        tmp_path / "a.parquet", "lists", sharp, warm, users={"weights": "one_hot"}, data={"comparisons": comparisons}
    )
    source, rows = built(config)
    keys = {source.direction(key)[0].item(): key for key in range(20)}
    said = asked(source, rows, 0, keys[1.0])
    assert set(said.pairs) == LISTED[comparisons] and said.scores == (0.5, 0.0, 1.0) and said.probability is None
    tied = asked(source, rows, 0, keys[0.0])  # the warm one ties the first and the third
    assert set(tied.pairs) == {(1, 0), (1, 2)} and tied.scores == (0.25, 1.0, 0.25)


def test_held_out_rows_are_measured_by_the_deviations_of_the_training_rows(tmp_path):
    config = weighed(tmp_path / "a.parquet", users={"weights": "one_hot"})
    source, rows = built(config)
    path = write(tmp_path / "b.parquet", "lists", sharp=[[0.0, 9.0, 1.0]], warm=[[9.0, 0.0, 1.0]])
    lists = load_preferences(DataConfig(path, scorers=SCORERS), numbers=True)
    other = source.for_rows(lists, config)
    assert other.mean is source.mean and other.deviation is source.deviation
    key = next(key for key in range(20) if source.direction(key)[0] == 1)
    assert asked(other, lists, 0, key).scores == (0.0, 1.0, 0.5) and asked(source, rows, 0, key).pairs == ((0, 1),)
    with pytest.raises(ValueError, match="needs pairs or lists of pictures under one prompt"):
        source.for_rows(load_preferences(DataConfig(path)), config)


def test_users_reach_the_adapter_as_they_are(tmp_path):
    source, _ = built(weighed(tmp_path / "a.parquet"))
    users = source.module()(batch(source, source.inputs(0, 3, None), None))
    assert users.shape == (2, 1, 2) and torch.equal(users[0, 0], source.direction(3)) and not users[1].any()
    assert source.module().id == "rewards: sharp, warm" and not list(source.module().parameters())


def test_what_cannot_be_weighed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.scorers: warm gave the same to every picture of .*; leave it out"):
        built(weighed(tmp_path / "a.parquet", warm=[[1.0, 1.0]] * 3))
    for data in ({"joint": True}, {"kind": "captions", "rejected_captions": "shuffle"}):
        with pytest.raises(ValueError, match="needs pairs or lists of pictures under one prompt, each picture with a"):
            built(weighed(tmp_path / "b.parquet", data=data))
    config = weighed(tmp_path / "c.parquet", data={"streaming": True})
    with pytest.raises(ValueError, match="measures all scores before training; set data.streaming to false"):
        SOURCES["rewards"](config, load_preferences(config.data, numbers=True), Team())
