"""A user's embedding: its file, the way from one user to another, and the neighbourhood."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial import geometric_slerp
from scipy.stats import kstest
from tiny_users import embedding

from diffpref.users import UserEmbedding
from diffpref.users.embedding import layout


def angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Degrees between vectors [L,U] and [L,U], in fp64."""
    a, b = first.double(), second.double()
    return torch.rad2deg(torch.arccos((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5])
def test_a_file_holds_all_of_it(tmp_path, length):
    user = embedding(0, length, name="Zoë")
    user.save(tmp_path / "me.safetensors")
    same = UserEmbedding.load(tmp_path / "me.safetensors")
    assert torch.equal(same.states, user.states) and same.states.dtype == torch.float32
    assert (same.encoder, same.pairs, same.name) == ("tiny", 4, "Zoë")
    assert (same.width, same.sequence) == (8, length > 1)
    assert [path.name for path in tmp_path.iterdir()] == ["me.safetensors"]


def test_a_vector_alone_is_a_sequence_of_one_in_fp32():
    user = UserEmbedding(torch.ones(3, dtype=torch.bfloat16, requires_grad=True), "tiny")
    assert user.states.shape == (1, 3) and user.states.dtype == torch.float32 and not user.states.requires_grad


NO_USERS = {
    "no numbers": ((torch.tensor([1.0, math.nan]), "e"), "of Zoë has NaN or infinite numbers"),
    "infinite": ((torch.tensor([1.0, math.inf]), "e"), "NaN or infinite"),
    "a batch": ((torch.zeros(2, 1, 3), "e"), r"one vector \[U\] or several \[L,U\], not \[2, 1, 3\]"),
    "nothing": ((torch.zeros(0, 3), "e"), r"not \[0, 3\]"),
    "no encoder": ((torch.ones(3), None), "encoder None is no name"),
    "no pairs": ((torch.ones(3), "e", -1), "-1 no number of pairs"),
}


@pytest.mark.parametrize("case", NO_USERS)
def test_what_is_no_user_is_refused(case):
    given, message = NO_USERS[case]
    with pytest.raises(ValueError, match=message):
        UserEmbedding(*given, **({"name": "Zoë"} if len(given) < 3 else {}))


GOOD = {"format": "1", "encoder": "tiny", "pairs": "4", "name": ""}
BAD_FILES = {
    "other tensors": ({"image": torch.ones(1, 3)}, GOOD),
    "more tensors": ({"user": torch.ones(1, 3), "image": torch.ones(1, 3)}, GOOD),
    "no metadata": ({"user": torch.ones(1, 3)}, None),
    "another format": ({"user": torch.ones(1, 3)}, GOOD | {"format": "2"}),
    "a word for a number": ({"user": torch.ones(1, 3)}, GOOD | {"pairs": "four"}),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_hold_no_user(tmp_path, case):
    tensors, facts = BAD_FILES[case]
    save_file(tensors, tmp_path / "me.safetensors", facts)
    with pytest.raises(ValueError, match="me.safetensors holds no user of format 1"):
        UserEmbedding.load(tmp_path / "me.safetensors")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*me.safetensors"):
        UserEmbedding.load(tmp_path / "me.safetensors")
    with pytest.raises(ValueError, match="is a folder; a user is a file"):
        UserEmbedding.load(tmp_path)
    (tmp_path / "me.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="me.safetensors is damaged"):
        UserEmbedding.load(tmp_path / "me.safetensors")
    save_file({"user": torch.tensor([[math.nan]])}, tmp_path / "me.safetensors", GOOD)
    with pytest.raises(ValueError, match="me.safetensors: the embedding of this user has NaN"):
        UserEmbedding.load(tmp_path / "me.safetensors")


# --- from one user to another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_the_way_between_is_scipys(amount):
    first, second = embedding(0), embedding(1)
    ends = (torch.nn.functional.normalize(one.states[0].double(), dim=0).numpy() for one in (first, second))
    expected = geometric_slerp(*ends, amount)
    np.testing.assert_allclose(first.mix(second, amount).states[0], expected, atol=1e-6)


def test_sequences_turn_vector_by_vector_and_keep_their_lengths_in_proportion():
    a, b = torch.tensor([[2.0, 0, 0], [0, 3, 0]]), torch.tensor([[0.0, 4, 0], [0, 0, 3]])
    mixed = UserEmbedding(a, "tiny", 4).mix(UserEmbedding(b, "tiny", 3), 1 / 3)
    r = 2 + 2 / 3  # from 2 to 4
    expected = [[r * math.cos(math.pi / 6), r * math.sin(math.pi / 6), 0]]
    expected += [[0, 3 * math.cos(math.pi / 6), 3 * math.sin(math.pi / 6)]]
    torch.testing.assert_close(mixed.states, torch.tensor(expected))
    assert mixed.pairs == 7


def test_near_users_mix_without_dividing_by_nothing():
    base = torch.tensor([[1.0, 0.0]])
    for gap in (0.0, 1e-7, 1e-5):
        other = torch.tensor([[1.0, gap]])
        mixed = UserEmbedding(base, "tiny").mix(UserEmbedding(other, "tiny"), 0.5)
        torch.testing.assert_close(mixed.states, torch.tensor([[1.0, gap / 2]]), atol=1e-9, rtol=1e-6)


def test_mixes_are_named_for_both():
    mixed = embedding(0, name="Ann").mix(embedding(1, name="Bob"), 0.25)
    assert mixed.name == "0.75 Ann + 0.25 Bob" and embedding(0, name="Ann").mix(embedding(1), 0.25).name == ""


IMPOSSIBLE_MIXES = {
    "opposite": (UserEmbedding(-embedding(0).states, "tiny"), 0.5, "opposite: no one way"),
    "almost opposite": (UserEmbedding(-embedding(0).states + 1e-5, "tiny"), 0.5, "opposite: no one way"),
    "nobody": (UserEmbedding(torch.zeros(8), "tiny"), 0.5, "a zero vector.* has no direction to mix"),
    "another encoder": (embedding(1, encoder="other"), 0.5, r"of one encoder.*\(1 x 8, of the encoder other\)"),
    "another width": (embedding(1, width=6), 0.5, r"not Ann \(1 x 8, .*a user \(1 x 6,"),
    "too far": (embedding(1), 1.5, "amount is 1.5; it goes from 0"),
    "no number": (embedding(1), math.nan, "amount is nan"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE_MIXES)
def test_what_cannot_be_mixed(case):
    other, amount, message = IMPOSSIBLE_MIXES[case]
    with pytest.raises(ValueError, match=message):
        embedding(0, name="Ann").mix(other, amount)


# --- the neighbourhood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3])
def test_neighbours_lie_within_the_angle_and_the_user_is_the_first(length):
    user = embedding(0, length)
    user = UserEmbedding(3 * user.states, "tiny", 4, "Ann")
    first, *others = user.neighbours(9, max_angle=20, seed=5)
    assert first is user and len(others) == 8
    found = torch.stack([angles(user.states, one.states) for one in others])
    assert found.max() <= 20 + 1e-4 and found.min() > 0.1 and found.flatten().unique().numel() == 8 * length
    for one in others:
        torch.testing.assert_close(one.states.norm(dim=1), torch.full((length,), 3.0))
        assert (one.encoder, one.pairs) == ("tiny", 4)


def test_angles_are_uniform_and_sides_are_any():
    """Kolmogorov and Smirnov against the uniform; the mean of the directions across is near nothing."""
    user = UserEmbedding(torch.eye(4)[0], "tiny")
    others = torch.cat([one.states for one in user.neighbours(2001, max_angle=30, seed=1)[1:]])
    assert kstest(angles(user.states.expand_as(others), others).numpy() / 30, "uniform").pvalue > 0.01
    across = torch.nn.functional.normalize(others[:, 1:], dim=1)
    assert across.mean(0).norm() < 4 / math.sqrt(2000)
    torch.testing.assert_close(across.T @ across / 2000, torch.eye(3) / 3, atol=0.04, rtol=0)


def test_neighbours_are_those_of_their_seed_however_many_are_asked_for():
    few, many, others = (embedding(0).neighbours(k, seed=s) for k, s in ((3, 0), (5, 0), (3, 1)))
    assert all(torch.equal(a.states, b.states) for a, b in zip(few, many, strict=False))
    assert not torch.equal(few[1].states, others[1].states)
    assert all(torch.equal(one.states, embedding(0).states) for one in embedding(0).neighbours(1))
    for one in embedding(0).neighbours(3, max_angle=0):  # best of k
        torch.testing.assert_close(one.states, embedding(0).states)


@pytest.mark.parametrize("given", [(0, 30), (2, -1), (2, 91), (2, math.nan)])
def test_impossible_neighbourhoods(given):
    with pytest.raises(ValueError, match=f"k is {given[0]} and max_angle {given[1]}"):
        embedding(0).neighbours(*given)
    with pytest.raises(ValueError, match="no direction, so no neighbours"):
        UserEmbedding(torch.zeros(3), "tiny").neighbours(2)


# --- what pipelines take ----------------------------------------------------------------------------------------------


def test_conditioning_of_stock_pipelines():
    user = embedding(0)
    (both,), (alone,) = (user.conditioning(guidance)["ip_adapter_image_embeds"] for guidance in (True, False))
    assert both.shape == (2, 1, 8) and torch.equal(both[0], torch.zeros(1, 8)) and torch.equal(both[1], user.states)
    assert torch.equal(alone, user.states[None])
    (sequence,) = embedding(0, 5).conditioning()["ip_adapter_image_embeds"]
    assert sequence.shape == (2, 1, 5, 8) and torch.equal(sequence[1, 0], embedding(0, 5).states)
    assert layout(user.states, sequence=True).shape == (1, 1, 1, 8)  # one vector for an adapter of sequences
