"""Where users come from while training: a table, states made before, and made-up users who weigh scorers."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import preference_files as files
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import save_file

from diffpref.config import Config, DataConfig, ModelConfig, TrainConfig, UsersConfig
from diffpref.data import check, load_preferences
from diffpref.data.kinds import kind_of
from diffpref.users.sources import SOURCES
from diffpref.users.sources.contract import PRESENT, UserSource
from diffpref.users.sources.rewards import RewardUsers
from diffpref.users.sources.states import StateUsers
from diffpref.users.sources.table import TableUsers, UserTable
from diffpref.users.vlm.pairs import row_digest
from diffpref.users.vlm.states import Entry, Pair, as_embedding, read_states, write_states

USERS = ["ann", "bob", None, "ann", "cy"]
SCORERS = ["sharp", "warm"]


def config_of(path: str, source: str, **settings: Any) -> Config:
    data = DataConfig(path, **settings.pop("data", {}))
    users = UsersConfig(source, **settings.pop("users", {}))
    return Config(name="a", model=ModelConfig(""), data=data, users=users, train=TrainConfig(**settings))


def write(path: Path, kind: str = "pairs", **columns: list) -> str:
    """Sound rows with some more columns."""
    rows = files.EXAMPLES[kind](len(next(iter(columns.values()))))
    if kind == "lists":
        rows = [{name: value for name, value in row.items() if name in ("prompt", "images", "scores")} for row in rows]
    features = {name: files.FEATURES[name] for name in rows[0]}
    for name, values in columns.items():
        features[name] = Value("string") if name == "user_id" else List(Value("float64"))
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    pq.write_table(Dataset.from_list(rows, features=Features(features)).data.table, path)
    return str(path)


def built(config: Config) -> tuple[Any, Dataset]:
    """The source, and the checked rows it is of."""
    rows = check(load_preferences(config.data, numbers=config.users.source == "rewards"), config.data).rows
    return SOURCES[config.users.source](config, rows), rows


def batch(source: UserSource, *made: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What the module takes of groups; None is nobody."""
    inputs = [source.absent() if one is None else one for one in made]
    present = torch.tensor([one is not None for one in made]).float()
    return {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]} | {PRESENT: present}


# --- a table ---------------------------------------------------------------------------------------------------------


def test_a_table_gives_each_user_a_direction_of_their_own_and_nobody_zeros(tmp_path):
    source, _ = built(config_of(write(tmp_path / "a.parquet", user_id=USERS), "table", users={"width": 6}))
    assert (source.width, source.sequence) == (6, False)
    made = [source.inputs(row, 0, user) for row, user in enumerate(USERS)]
    assert made[2] is None and source.inputs(0, 0, "") is None
    table = source.module()
    users = table(batch(source, *made))
    assert users.shape == (5, 1, 6) and users.dtype == torch.float32
    assert torch.equal(users[2], torch.zeros(1, 6)) and torch.equal(users[0], users[3])
    torch.testing.assert_close(users[[0, 1, 4]].norm(dim=-1), torch.ones(3, 1))
    cosines = users[[0, 1, 4], 0] @ users[[0, 1, 4], 0].T
    assert (cosines - torch.eye(3)).abs().max() < 0.95


def test_users_do_not_depend_on_the_order_of_rows(tmp_path):
    """The same numbers and directions; another seed gives others."""
    one, _ = built(config_of(write(tmp_path / "a.parquet", user_id=USERS), "table", seed=3))
    other, _ = built(config_of(write(tmp_path / "b.parquet", user_id=USERS[::-1]), "table", seed=3))
    assert one.names == other.names == ["ann", "bob", "cy"]
    assert torch.equal(one.module().vectors(), other.module().vectors())
    assert not torch.equal(one.module().vectors(), TableUsers(one.names, 64, seed=4).module().vectors())


def test_only_the_users_of_a_batch_get_a_gradient_and_it_turns_them():
    source = TableUsers(["ann", "bob", "cy"], 4)
    table = source.module()
    users = table(batch(source, source.inputs(0, 0, "cy"), None))
    (users * torch.arange(8.0).reshape(2, 1, 4)).sum().backward()
    gradient = table.users.weight.grad
    assert gradient[2].abs().max() > 0.1 and not gradient[:2].any()
    torch.testing.assert_close((gradient[2] * table.users.weight[2]).sum(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_a_table_is_saved_with_its_names(tmp_path):
    table = TableUsers(["ann", "bob", "ü 7"], 5, seed=1).module()
    assert table.save(tmp_path).name == "user_table.safetensors" and [p.name for p in tmp_path.iterdir()] == [
        "user_table.safetensors"
    ]
    for place in (tmp_path, tmp_path / "user_table.safetensors"):
        found = UserTable.load(place)
        assert found.names == {"ann": 0, "bob": 1, "ü 7": 2} and found.id == table.id
        assert torch.equal(found.users.weight, table.users.weight) and found.users.weight.requires_grad
    user = found.embedding("bob")
    assert torch.equal(user.states, table.vectors()[1:2]) and (user.encoder, user.name) == (table.id, "bob")


def test_a_table_that_went_on_learning_is_another_one():
    table = TableUsers(["ann", "bob"], 5).module()
    before = table.id
    with torch.no_grad():
        table.users.weight[0, 0] += 0.01
    assert table.id != before


def test_users_that_a_table_does_not_know_are_refused():
    source = TableUsers(["ann", "bob", "cy", "dan"], 4)
    with pytest.raises(ValueError, match="user 'eve' is none of the 4 users of the training rows"):
        source.inputs(0, 0, "eve")
    with pytest.raises(ValueError, match=re.escape("the table of 4 users (ann, bob, cy, …) does not know 'eve'")):
        source.module().embedding("eve")


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="user_table.safetensors"):
        UserTable.load(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    save_file({"users": torch.ones(2, 3)}, tmp_path / "nameless.safetensors")
    table = TableUsers(["ann"], 2).module()
    with torch.no_grad():
        table.users.weight[0, 0] = float("nan")
    table.save(tmp_path)
    for name, message in (("broken", "damaged"), ("nameless", "no table of users"), ("user_table", "NaN or infinite")):
        with pytest.raises(ValueError, match=message):
            UserTable.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("source", ["table", "states"])
def test_rows_that_name_nobody_are_refused_with_the_mend(tmp_path, source):
    mend = f"users.source {source} needs to know whose rows these are: give .* a column user_id, a name in each row"
    nameless = files.write(tmp_path / "a.parquet", files.rows(2))
    with pytest.raises(ValueError, match=rf"{mend}; it has \['prompt', 'chosen', 'rejected', 'row'\]"):
        built(config_of(nameless, source))
    with pytest.raises(ValueError, match=f"{mend}; the column is there, and names nobody"):
        built(config_of(write(tmp_path / "b.parquet", user_id=[None, None]), source))
    config = config_of(write(tmp_path / "c.parquet", user_id=USERS), source, data={"streaming": True})
    with pytest.raises(ValueError, match=f"users.source {source} needs to know all users .* data.streaming to false"):
        SOURCES[source](config, load_preferences(config.data))


# --- states made before ----------------------------------------------------------------------------------------------


def state_file(path: Path, rows: Dataset, sets: dict[str, list[list[int]]], length: int = 3) -> dict:
    """A file of states of sets of rows, each of some user."""
    entries, states = [], {}
    for user, chunks in sets.items():
        for number, chunk in enumerate(chunks):
            pairs = tuple(Pair(row + 100, rows[row]["prompt"], row_digest(rows[row])) for row in chunk)
            entries.append(Entry(user, number, "elsewhere.parquet", pairs, ""))
            states[user, number] = torch.randn(length, 4, generator=torch.manual_seed(len(entries)))
    write_states(path, {"id": "vlm"}, entries, list(states.values()))
    return states


@pytest.fixture
def described(tmp_path) -> tuple[Config, dict]:
    """Eight pairs of three users. Ann has two sets of states, bob one, and cy none."""
    path = write(tmp_path / "a.parquet", user_id=["ann"] * 4 + ["bob", "bob", "cy", None])
    rows = load_preferences(DataConfig(path))
    states = state_file(tmp_path / "s.safetensors", rows, {"ann": [[0], [2]], "bob": [[4]]})
    return config_of(path, "states", users={"path": str(tmp_path / "s.safetensors")}), states


def test_states_are_those_of_the_file_and_never_of_the_pair_itself(described, capfd):
    """The file was made of other data, where rows have other numbers; a pair is known by its prompt and pictures."""
    config, states = described
    source, _ = built(config)
    assert (source.width, source.sequence) == (4, True)
    assert "has no states of 1 of the 3 users of" in capfd.readouterr().out
    for key in range(8):
        assert torch.equal(source.inputs(0, key, "ann")["states"], states["ann", 1])
        assert torch.equal(source.inputs(2, key, "ann")["states"], states["ann", 0])
        assert torch.equal(source.inputs(5, key, "bob")["states"], states["bob", 0])
        assert source.inputs(4, key, "bob") is None
    assert source.inputs(6, 0, "cy") is None and source.inputs(7, 0, None) is None
    drawn = {tuple(source.inputs(1, key, "ann")["states"].flatten().tolist()) for key in range(8)}
    assert drawn == {tuple(states["ann", number].flatten().tolist()) for number in (0, 1)}


def test_users_who_are_sequences_and_users_who_are_vectors(described, tmp_path):
    config, states = described
    source, rows = built(config)
    users = source.module()(batch(source, source.inputs(5, 0, "bob"), None))
    assert users.shape == (2, 1, 3, 4)
    assert torch.equal(users[0, 0], states["bob", 0]) and not users[1].any()
    single = state_file(tmp_path / "one.safetensors", rows, {"ann": [[0]]}, length=1)
    flat, _ = built(config_of(config.data.path, "states", users={"path": str(tmp_path / "one.safetensors")}))
    users = flat.module()(batch(flat, None, flat.inputs(1, 0, "ann")))
    assert not flat.sequence and users.shape == (2, 1, 4)
    assert torch.equal(users[1], single["ann", 0]) and not users[0].any()
    found = as_embedding(read_states(tmp_path / "one.safetensors"), "ann")
    assert torch.equal(found.states, users[1]) and found.encoder == flat.module().id


def test_states_of_other_users_are_refused(described, tmp_path):
    config, _ = described
    path = write(tmp_path / "b.parquet", user_id=["dan", "eve"])
    other = config_of(path, "states", users={"path": config.users.path})
    with pytest.raises(ValueError, match=r"users.path: .* no states of 2 of the 2 users of .* \(dan, eve\); make them"):
        built(other)
    with pytest.raises(FileNotFoundError, match="diffpref user describe makes one"):
        built(config_of(path, "states", users={"path": str(tmp_path / "none.safetensors")}))


def test_states_of_lists_have_no_pair_to_keep_apart(described, tmp_path):
    config, states = described
    lists = write(tmp_path / "l.parquet", "lists", user_id=["bob", "bob", "ann"])
    source, _ = built(config_of(lists, "states", users={"path": config.users.path}))
    assert torch.equal(source.inputs(0, 0, "bob")["states"], states["bob", 0])


# --- users who weigh scorers -----------------------------------------------------------------------------------------

SHARP = [[4.0, 0.0], [2.0, 2.0], [1.0, 3.0]]  # mean 2, variance (4 + 4 + 0 + 0 + 1 + 1) / 6
WARM = [[10.0, 30.0], [20.0, 30.0], [10.0, 20.0]]  # mean 20, variance (100 + 100 + 0 + 100 + 100 + 0) / 6


def weighed(path: Path, kind: str = "pairs", sharp: list = SHARP, warm: list = WARM, **settings: Any) -> Config:
    users = settings.pop("users", {})
    data = {"scorers": SCORERS} | settings.pop("data", {})
    return config_of(write(path, kind, sharp=sharp, warm=warm), "rewards", users=users, data=data, **settings)


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
        SOURCES["rewards"](config, load_preferences(config.data, numbers=True))


# --- all of them -----------------------------------------------------------------------------------------------------


def sources(tmp_path: Path, described: tuple[Config, dict]) -> list[UserSource]:
    table, _ = built(config_of(write(tmp_path / "t.parquet", user_id=USERS), "table"))
    return [table, built(described[0])[0], built(weighed(tmp_path / "r.parquet"))[0]]


def test_sources_live_in_other_processes(tmp_path, described):
    """Pickled, a source says the same; what it gives of somebody and of nobody can be one batch."""
    for source in sources(tmp_path, described):
        copy = pickle.loads(pickle.dumps(source))
        one, two = source.inputs(1, 7, "ann"), copy.inputs(1, 7, "ann")
        assert one.keys() == two.keys() == source.absent().keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        nobody = copy.absent()
        assert all((one[name].shape, one[name].dtype) == (nobody[name].shape, nobody[name].dtype) for name in one)
        users = copy.module()(batch(source, one, None))
        assert users.shape == (2, 1, *((3,) if source.sequence else ()), source.width) and not users[1].any()


def test_every_source_of_the_configuration_is_there():
    sources = UsersConfig.__dataclass_fields__["source"].type.__args__
    assert set(SOURCES) == set(sources) - {"none"}


def test_states_need_no_rows_of_their_own(described):
    """A source made of the file alone excludes nothing."""
    source = StateUsers(read_states(described[0].users.path))
    assert source.inputs(4, 0, "bob") is not None
