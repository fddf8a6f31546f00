"""Where users come from while training: a table, states made before, and what all sources have in common."""

import pickle
import re
from pathlib import Path

import preference_files as files
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from source_cases import batch, built, config_of, weighed, write

from diffpref.cache.team import Team
from diffpref.config import Config, DataConfig, UsersConfig
from diffpref.data import load_preferences
from diffpref.users.sources import SOURCES
from diffpref.users.sources.contract import UserSource
from diffpref.users.sources.states import StateUsers
from diffpref.users.sources.table import TableUsers, UserTable
from diffpref.users.vlm.pairs import row_digest
from diffpref.users.vlm.states import Entry, Pair, as_embedding, read_states, write_states

USERS = ["ann", "bob", None, "ann", "cy"]


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


def test_held_out_rows_are_of_the_same_users(tmp_path):
    config = config_of(write(tmp_path / "a.parquet", user_id=USERS), "table")
    source, rows = built(config)
    other = load_preferences(DataConfig(write(tmp_path / "b.parquet", user_id=["cy", "dan", "eve", None])))
    assert source.for_rows(rows, config) is source
    with pytest.raises(
        ValueError, match=r"data.validation: 2 of its users \(dan, eve\) are none of the 3 of data.path"
    ):
        source.for_rows(other, config)


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
        SOURCES[source](config, load_preferences(config.data), Team())


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
    assert "lacks 1 of the 3 users of" in capfd.readouterr().out
    for key in range(8):
        assert torch.equal(source.inputs(0, key, "ann")["user"], states["ann", 1])
        assert torch.equal(source.inputs(2, key, "ann")["user"], states["ann", 0])
        assert torch.equal(source.inputs(5, key, "bob")["user"], states["bob", 0])
        assert source.inputs(4, key, "bob") is None
    assert source.inputs(6, 0, "cy") is None and source.inputs(7, 0, None) is None
    drawn = {tuple(source.inputs(1, key, "ann")["user"].flatten().tolist()) for key in range(8)}
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
    with pytest.raises(ValueError, match=r"users.path: .* lacks 2 of the 2 users of .* \(dan, eve\); make them"):
        built(other)
    with pytest.raises(FileNotFoundError, match="diffpref user describe makes one"):
        built(config_of(path, "states", users={"path": str(tmp_path / "none.safetensors")}))


def test_held_out_pairs_are_kept_apart_from_the_states_too(described, tmp_path):
    """The first and the third of other rows are the pairs of ann's two sets."""
    config, states = described
    held_out = load_preferences(config.data).select([2, 6, 0, 1])
    source = built(config)[0].for_rows(held_out, config)
    assert torch.equal(source.inputs(0, 5, "ann")["user"], states["ann", 0])
    assert torch.equal(source.inputs(2, 5, "ann")["user"], states["ann", 1])
    assert source.inputs(1, 5, "cy") is None


def test_states_of_lists_have_no_pair_to_keep_apart(described, tmp_path):
    config, states = described
    lists = write(tmp_path / "l.parquet", "lists", user_id=["bob", "bob", "ann"])
    source, _ = built(config_of(lists, "states", users={"path": config.users.path}))
    assert torch.equal(source.inputs(0, 0, "bob")["user"], states["bob", 0])


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
