"""The choices of many people, the batches of persons that an encoder is trained on, and support pairs while tuning."""

import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_people import BROKEN, EACH, NAMELESS, PEOPLE, PROMPTS, choices_of, make_people, stream

from diffpref.cache.team import Team
from diffpref.config import CacheConfig, Config, DataConfig, ModelConfig, UsersConfig
from diffpref.data import load_preferences
from diffpref.data.kinds import Said
from diffpref.users.choices import Choices
from diffpref.users.encoder import UserEncoder, homogeneous
from diffpref.users.meta.config import EpisodeConfig
from diffpref.users.meta.episodes import EpisodeStream
from diffpref.users.meta.learner import Task
from diffpref.users.sources.contract import PRESENT
from diffpref.users.sources.encoder import SupportPairs
from diffpref.users.sources.tastes import DrawnTastes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def choices(world) -> Choices:
    """Of all people."""
    return choices_of(world)


@pytest.fixture(scope="module")
def encoder(world) -> UserEncoder:
    return UserEncoder.from_pretrained(world / "user_encoder")


# --- choices and episodes ---------------------------------------------------------------------------------------------


def test_a_row_is_looked_at_as_it_is_embedded(world, choices, encoder):
    """Each picture and prompt once."""
    rows, scorer = load_preferences(DataConfig(str(world / "pairs.parquet"))), encoder.scorer()
    assert len(choices.table) == PROMPTS + 4 * PROMPTS and choices.width == encoder.settings["features"]
    for i in (0, 17, PEOPLE * EACH - 1):
        pictures = [Image.open(io.BytesIO(rows[i][side]["bytes"])) for side in ("chosen", "rejected")]
        expected = torch.cat([scorer.embed(prompts=[rows[i]["prompt"]]).prompts, scorer.embed(images=pictures).images])
        torch.testing.assert_close(choices.look(i), expected, atol=1e-5, rtol=1e-4)
    assert {user: len(of) for user, of in choices.of.items()} == {f"person {i}": EACH for i in range(PEOPLE)}


def test_rows_of_nobody_and_rows_that_cannot_be_used_are_left_out(world):
    found = choices_of(world, "some.parquet")
    left = [i for i in range(3 * EACH) if i not in (BROKEN, NAMELESS)]
    assert sorted(np.concatenate(list(found.of.values())).tolist()) == left
    assert found.index[BROKEN].tolist() == [-1] * 3 and found.index[NAMELESS].min() >= 0
    others = found.elsewhere("person 0", NAMELESS)
    assert len(others) == EACH - 2 and not {BROKEN, NAMELESS} & set(others.tolist())
    assert found.elsewhere("a stranger", 0).tolist() == []


def test_elsewhere_shares_no_prompt_and_no_picture(choices):
    for row in range(0, PEOPLE * EACH, 5):
        for user in (choices.user[row], "person 1", "person 2"):
            mine, others = choices.of[user], choices.elsewhere(user, row)
            expected = [i for i in mine.tolist() if choices.prompts[i] != choices.prompts[row]]
            assert others.tolist() == expected and row not in others and len(mine) - len(others) <= 1


def test_a_picture_under_another_prompt_is_the_same_picture(choices):
    """Rows 0 and 1 share a rejected picture, though not the prompt."""
    changed = pickle.loads(pickle.dumps(choices))
    changed.index[1, 2] = changed.index[0, 1]
    assert set(changed.of["person 0"]) - set(changed.elsewhere("person 0", 0)) == {0, 1}
    assert set(choices.of["person 0"]) - set(choices.elsewhere("person 0", 0)) == {0}


def test_a_person_is_asked_what_they_have_not_said(choices):
    persons, sizes = list(choices.of), set()
    made = stream(choices, persons)
    for number in range(60):
        person = persons[number % len(persons)]
        support, other, query = made.episode(person, np.random.default_rng(number))
        rows = [set(part.tolist()) for part in (support, other, query)]
        assert set.union(*rows) <= set(choices.of[person].tolist()) and len(query) == 3
        assert len(set.union(*rows)) == sum(map(len, rows))
        asked = {choices.prompts[i] for i in rows[2]}
        assert not asked & {choices.prompts[i] for i in rows[0] | rows[1]}
        sizes.add(len(support))
    assert sizes == {0, 1, 2, 3}


def test_people_of_few_prompts_still_have_a_support(choices):
    """Ten choices on two prompts: one prompt is asked, of the other something is shown."""
    few = pickle.loads(pickle.dumps(choices))
    few.index[:EACH, 0] = np.arange(EACH) % 2
    few.index[:EACH, 1:] = np.arange(2 * EACH).reshape(EACH, 2) + 1000
    for number in range(10):
        parts = stream(few, [], support=(3, 3)).episode("person 0", np.random.default_rng(number))
        assert len(parts[0]) == 3 and len(parts[2]) == 3
        assert {few.index[i, 0] for i in parts[0]} != {few.index[i, 0] for i in parts[2]}
    few.of["person 0"] = few.of["person 0"][:1]
    support, _, query = stream(few, []).episode("person 0", np.random.default_rng(0))
    assert len(support) == 0 and query.tolist() == [0]


def test_draws_depend_on_the_key_alone(choices):
    persons = list(choices.of)

    def drawn(**options: Any) -> list[torch.Tensor]:
        return [episodes.query for episodes in stream(choices, persons, **options)]

    first = drawn()
    late = EpisodeStream(choices, persons, EpisodeConfig((0, 3), 3), seed=0, size=5, batches=range(3, 6))
    assert all(torch.equal(a, b.query) for a, b in zip(first[3:], late, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(), strict=True))
    for others in (drawn(seed=1), drawn(rank=1), first[1:]):
        assert not any(torch.equal(a, b) for a, b in zip(first, others, strict=False))
    assert next(iter(stream(choices, persons, size=99))).query.shape[0] == PEOPLE  # nobody twice


def test_equal_seeds_ask_the_same_however_much_is_shown(choices):
    """So that accuracies by the number of choices seen are of the same questions."""
    made = [stream(choices, list(choices.of), support=(n, 5), exactly=True) for n in (0, 2, 5)]
    for none, two, five in zip(*made, strict=True):
        assert torch.equal(none.query, two.query) and torch.equal(two.query, five.query)
        assert torch.equal(two.support[:, :2], five.support[:, :2])
        assert [episodes.mask.sum(1).unique().tolist() for episodes in (none, two, five)] == [[0], [2], [5]]


def test_the_loss_by_hand(choices, encoder):
    """-log σ of the log-odds of what was asked, and the contrast of two supports of the same people."""
    episodes = next(iter(stream(choices, list(choices.of), support=(1, 3), query=6)))
    config = EpisodeConfig((1, 3), 6, dispersion=0.5, temperature=0.2)
    loss, numbers = Task(encoder, config)(episodes)
    losses = []
    for g in range(5):
        user = encoder(episodes.support[g : g + 1, :][:, episodes.mask[g]], torch.ones(1, int(episodes.mask[g].sum())))
        for prompt, chosen, rejected in episodes.query[g][episodes.asked[g]]:
            odds = encoder.scores(user, chosen[None], prompt[None]) - encoder.scores(user, rejected[None], prompt[None])
            losses.append(math.log1p(math.exp(-odds.item())))
    supports = (episodes.support, episodes.mask), (episodes.other, episodes.other_mask)
    u, v = (encoder(*support).double().numpy() for support in supports)
    alike = np.exp(u @ v.T / 0.2)
    apart = -np.log(np.diag(alike) / alike.sum(1)).mean()
    assert numbers["dispersion"].item() == pytest.approx(apart, rel=1e-5)
    assert loss.item() == pytest.approx(np.mean(losses) + 0.5 * apart, rel=1e-5)
    assert len(numbers["accuracy"]) == len(losses)
    assert Task(encoder, EpisodeConfig((1, 3), 6))(episodes)[0].item() == pytest.approx(np.mean(losses), rel=1e-5)


# --- support pairs, while a model is tuned ----------------------------------------------------------------------------


def config_of(world: Path, file: str = "pairs.parquet") -> Config:
    """Of a run for users whom the encoder reads."""
    data = DataConfig(str(world / file), num_workers=0)
    users = UsersConfig("encoder", str(world / "user_encoder"), support=(1, 4))
    model, cache = ModelConfig("nobody"), CacheConfig(folder=world / "cache")
    return Config(name="tuning", model=model, data=data, users=users, cache=cache, output_dir=world / "runs")


@pytest.fixture(scope="module")
def source(world) -> SupportPairs:
    config = config_of(world)
    return SupportPairs.build(config, load_preferences(config.data), Team())


def test_support_is_of_the_user_and_never_of_the_pair(source, choices):
    """Drawn anew for each group, and the same for the same one."""
    sizes = set()
    for row in range(0, PEOPLE * EACH, 7):
        user, query = choices.user[row], choices.look(row)
        drawn = [source.drawn(row, key, user) for key in range(6)]
        assert drawn[3].tolist() == source.drawn(row, 3, user).tolist()
        shown = [choices.look(rows) for rows in drawn]
        assert len({pairs.sum().item() for pairs in shown}) > 3
        sizes |= {len(pairs) for pairs in shown}
        mine = choices.look(choices.of[user]).flatten(1)
        for pair in torch.cat(shown):
            assert (mine == pair.flatten()).all(1).any()
            assert not any(torch.equal(part, other) for part in pair for other in query)
    assert sizes == {1, 2, 3, 4}


def test_a_user_shows_what_they_have(source, choices):
    few = SupportPairs(pickle.loads(pickle.dumps(choices)), source.encoder, (4, 4), 0)
    few.choices.of["person 0"] = few.choices.of["person 0"][:3]
    assert len(few.drawn(1, 0, "person 0")) == 2
    assert few.inputs(1, 0, "a stranger") is None and few.inputs(1, 0, None) is None


def test_the_loaders_processes_draw_the_same(source, choices):
    copy = pickle.loads(pickle.dumps(source))
    for row in (0, 40):
        one, other = (made.inputs(row, 5, choices.user[row]) for made in (source, copy))
        assert torch.equal(one["user"], other["user"])


def test_a_user_is_what_the_encoder_reads_in_the_pairs_that_were_drawn(source, choices):
    """And nobody is zeros."""
    rows = (0, 30, 60)
    known = [source.inputs(row, 0, choices.user[row]) for row in rows] + [source.absent()]
    users = source.module()({"user": torch.stack([k["user"] for k in known]), PRESENT: torch.tensor([1.0, 1, 1, 0])})
    assert users.shape == (4, 1, source.width) and not users[3].any() and source.module().id == source.encoder.id
    for row, user in zip(rows, users, strict=False):
        support = choices.look(source.drawn(row, 0, choices.user[row]))
        expected = source.encoder(support[None].float(), torch.ones(1, len(support), dtype=torch.bool))
        assert torch.allclose(user, expected, atol=1e-6)


def test_held_out_rows_are_read_by_their_own_choices(world, source):
    held = source.for_rows(load_preferences(DataConfig(str(world / "some.parquet"))), config_of(world, "some.parquet"))
    assert sorted(held.choices.of) == ["person 0", "person 1", "person 2"] and held.encoder is source.encoder
    assert held.inputs(0, 0, "person 5") is None and source.inputs(0, 0, "person 5") is not None
    assert (held.sizes, held.seed) == (source.sizes, source.seed)


def test_a_source_needs_its_encoder_and_people(world):
    config = config_of(world)
    rows = load_preferences(config.data)
    with pytest.raises(FileNotFoundError, match="runs holds no encoder of users"):
        SupportPairs.build(replace(config, users=replace(config.users, path=str(world / "runs"))), rows, Team())
    with pytest.raises(ValueError, match="no column user_id"):
        SupportPairs.build(config, rows.remove_columns("user_id"), Team())


# --- users of the encoder's prior -------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["taste", "difference"])
def test_drawn_users_say_what_the_encoder_thinks_of_them(world, choices, encoder, labels):
    """Of every pair; with labels `difference`, beside what everybody thinks of it."""
    config = config_of(world)
    config = replace(config, users=replace(config.users, source="tastes", labels=labels))
    made = DrawnTastes.build(config, load_preferences(config.data), Team())
    nobody, said, turns = homogeneous(torch.zeros(1, made.width - 1)), Said(((0, "a"), (1, "a")), ((0, 1),)), 0
    for row in range(0, PEOPLE * EACH, 3):
        user = made.inputs(row, 7 * row, None)["user"][None]
        assert torch.equal(user[0], made.inputs(row, 7 * row, "anybody")["user"])
        assert not torch.equal(user[0], made.inputs(row, 7 * row + 1, None)["user"])
        assert user.norm().item() == pytest.approx(1) and 10**-0.5 - 1e-6 <= user[0, 0] <= 1.04**-0.5 + 1e-6
        prompt, chosen, rejected = choices.look([row]).unbind(1)
        odds = encoder.scores(user, chosen, prompt) - encoder.scores(user, rejected, prompt)
        if labels == "difference":
            odds -= encoder.scores(nobody, chosen, prompt) - encoder.scores(nobody, rejected, prompt)
        pairs = made.says(said, {}, 7 * row, row).pairs
        assert pairs == (((0, 1),) if odds > 0 else ((1, 0),))
        turns += pairs == ((1, 0),)
    assert 20 < turns < 76  # of 96


def test_drawn_users_need_no_names(world, encoder):
    """And travel to the loader's processes; a row that cannot be used is known as such."""
    config = config_of(world, "some.parquet")
    rows = load_preferences(config.data).remove_columns("user_id")
    made = pickle.loads(pickle.dumps(DrawnTastes.build(config, rows, Team())))
    assert made.differences.isnan().all(1).nonzero().flatten().tolist() == [BROKEN]
    known = [made.inputs(3, 0, None), made.absent()]
    users = torch.stack([k["user"] for k in known])
    found = made.module()({"user": users, PRESENT: torch.tensor([1.0, 0.0])})
    assert torch.equal(found[0, 0], users[0]) and not found[1].any() and found.shape == (2, 1, encoder.width)
    held = made.for_rows(rows.select(range(4)), config)
    torch.testing.assert_close(held.differences, made.differences[:4])
    assert made.module().id == held.id == encoder.id
