"""The benchmark of personalised tuning: Bayes' conclusion against integrals, contests by hand, and the whole small."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import personalization  # noqa: E402
from personal import bayes, beside, bound, known, outcomes, people  # noqa: E402
from personal.conditions import AMOUNTS, Plan, Scale, opposite  # noqa: E402
from personal.draw import Drawn, How, Model, Studio  # noqa: E402
from personal.known import Known  # noqa: E402
from worlds import EMOJI  # noqa: E402

from diffpref.config import ModelConfig  # noqa: E402
from diffpref.emoji_world.artwork import load_artwork, split_concepts  # noqa: E402
from diffpref.emoji_world.preferences import Pool  # noqa: E402
from diffpref.emoji_world.users import (  # noqa: E402
    ATTRIBUTES,
    MAJORITY,
    PIXEL_SPREAD,
    TRAIN,
    User,
    population,
    utility,
)
from diffpref.families import load_pipeline  # noqa: E402
from diffpref.scorer.features import towers_fingerprint  # noqa: E402
from diffpref.scorer.preference import PreferenceScorer  # noqa: E402
from diffpref.users import UserEmbedding, UserEncoder  # noqa: E402
from diffpref.users.adapter import add_user_adapter, save_user_adapter, user_parameters  # noqa: E402
from diffpref.users.eyes import Eyes  # noqa: E402

K, WARMTH = len(ATTRIBUTES), ATTRIBUTES.index("warmth")


def warm(*values: float) -> np.ndarray:
    """Pictures [n,K] that differ in warmth alone."""
    seen = np.zeros((len(values), K))
    seen[:, WARMTH] = values
    return seen


# --- Bayes ------------------------------------------------------------------------------------------------------------


def test_belief_after_choices_agrees_with_the_integral():
    """Choices that hang on warmth alone: a grid over its weight and the temperature gives the answer."""
    said = np.stack([warm(1, 0), warm(0.2, 1.5), warm(2, 0.5)])
    gaps = said[:, 0, WARMTH] - said[:, 1, WARMTH]
    w = MAJORITY["warmth"] + PIXEL_SPREAD * np.linspace(-5, 5, 401)[:, None]
    t = np.exp(0.25 * np.linspace(-5, 5, 201))[None, :]
    grid = np.exp(-0.5 * np.linspace(-5, 5, 401)[:, None] ** 2 - 0.5 * np.linspace(-5, 5, 201)[None, :] ** 2)
    chance = lambda gap: 0.02 + 0.96 * expit(w * gap / t)  # noqa: E731
    everyone = bayes.crowd(30_000)
    for n, belief in zip((0, 1, 3), bayes.beliefs(everyone, said, (0, 1, 3), np.random.default_rng(0)), strict=True):
        after = grid * np.prod([chance(gap) for gap in gaps[:n]], axis=0)
        expected = (after * chance(1.0)).sum() / after.sum()
        assert belief.prefers(np.stack([warm(1, 0)]))[0] == pytest.approx(expected, abs=0.015)
        liked = (after * (w > 0)).sum() / after.sum()
        assert belief.better(warm(1), warm(0)[0])[0] == pytest.approx(liked, abs=0.02)
    assert belief.effective < 30_000


def two_users() -> User:
    """A crowd: one who likes warmth, one who does not."""
    weights = np.zeros((2, K))
    weights[:, WARMTH] = 3.0, -3.0
    return User(-1, "drawn", tuple(weights.T), np.ones(2), 0.02)


def test_people_are_recognised_by_what_they_choose():
    """By hand: of two users each set has one weight of p²/(p² + q²), and says p or q about the other set."""
    p = 0.02 + 0.96 * expit(3.0)
    q = 1 - p
    likes, dislikes = np.stack([warm(1, 0)] * 2), np.stack([warm(0, 1)] * 2)
    found = np.exp(bayes.same_user(two_users(), np.stack([likes, dislikes]), np.stack([likes, dislikes])))
    same, total = (p**4 + q**4) / (p**2 + q**2), 1
    other = 2 * (p * q) ** 2 / (p**2 + q**2)
    np.testing.assert_allclose(found, total * np.array([[same, other], [other, same]]))
    assert outcomes.places(found).tolist() == [1, 1]


def test_who_knows_a_user_picks_what_they_like():
    user = replace(population()[TRAIN], weights=tuple(warm(1)[0]))
    knows = bayes.Belief(bayes.certain(user), 1.0)
    assert knows.best(warm(0.3, 2.0, -1.0), warm(0.5)[0]) == 1
    np.testing.assert_array_equal(knows.better(warm(1.0, 0.5, 0.2), warm(0.5)[0]), [1, 0.5, 0])
    assert bound.finely(knows) == 1.0


def test_pictures_in_all_shades_by_hand():
    """c·e = 0 leaves what of the posterior's mean is not the mean user's; nobody known is no better than a coin."""
    everyone = bayes.crowd(30_000)
    assert bound.finely(bayes.Belief(everyone, 1.0)) == pytest.approx(0.5, abs=0.02)
    warmth = np.array(everyone.weights[WARMTH])
    lovers = bayes.those(everyone, np.flatnonzero(warmth > np.quantile(warmth, 0.9)))
    assert bound.finely(bayes.Belief(lovers, 1.0)) > 0.95


# --- whom and what ----------------------------------------------------------------------------------------------------


def test_supports_are_nested_disjoint_and_of_other_concepts():
    user, other = people.new_users(2)
    sets = people.support_sets(user, 3, each=8)
    pairs = [frozenset((said.chosen, said.rejected)) for one in sets for said in one]
    assert [len(one) for one in sets] == [8, 8, 8] and len(set(pairs)) == 24
    again = people.support_sets(user, 1, each=8)[0]
    assert [(s.chosen, s.rejected) for s in again] == [(s.chosen, s.rejected) for s in sets[0]]
    assert [s.chosen for s in people.support_sets(other, 1, each=8)[0]] != [s.chosen for s in again]
    training = {*split_concepts(load_artwork().concepts)[0]}
    assert {said.prompt for one in sets for said in one} <= training and not training & {*people.prompts()}
    gaps = [np.subtract(*utility(user, said.seen)) for said in itertools.chain(*people.support_sets(user, 8))]
    assert np.mean(np.array(gaps) > 0) > 0.6  # their own taste, with noise
    assert np.mean(np.array(gaps) > 0) < 1


def someone(number: int, warmth: float) -> Known:
    """A user who cares for warmth alone."""
    user = User(number, "unseen", tuple(warm(warmth)[0].tolist()), 1.0, 0.02)
    vector = torch.nn.functional.normalize(torch.tensor([1.0, warmth]), dim=0)
    own = {n: UserEmbedding(vector, "e", n) for n in people.COUNTS}
    return Known(user, [], own, own, own[16])


def pictures(*values: float) -> Drawn:
    """Of prompts, by their warmth."""
    return Drawn(np.zeros((len(values), 4, 4, 3), np.uint8), warm(*values), np.ones(len(values)))


def contest(tmp_path) -> outcomes.Contest:
    """Four users, 0 and 4 of one seed, 1 and 5 of another; two prompts; those who like warmth get warm pictures."""
    some = [someone(number, warmth) for number, warmth in ((0, 1.0), (1, -1.0), (4, -1.0), (5, -2.0))]
    plan = Plan(some, ["apple", "pear"], Studio(tmp_path, {}), Scale({"16": 2}))
    right = {"4": [pictures(2, 2), pictures(-2, 0), pictures(-1, 1), pictures(-3, -3)]}
    right["16"] = [pictures(3), pictures(-1), pictures(-1), pictures(1)]
    nobody = [pictures(0, 0)] * 4
    return outcomes.Contest(plan, right, {"base": nobody, "impersonal": [pictures(1, 1)] * 4, "null": nobody[:1]})


def test_win_rates_of_right_and_wrong_users_by_hand(tmp_path):
    found = contest(tmp_path).against("4")
    assert found["over base"]["each_user"] == [1.0, 0.75, 0.5, 1.0]
    assert found["over base"]["value"] == 6.5 / 8
    assert found["over impersonal"]["each_user"] == [1.0, 1.0, 0.75, 1.0]
    assert found["wrong over base"]["each_user"] == [0.5, 1.0, 0.0, 0.75]
    assert found["right over wrong"]["each_user"] == [1.0, 0.0, 1.0, 1.0]
    assert found["right - wrong over base"]["value"] == pytest.approx((0.5 - 0.25 + 0.5 + 0.25) / 4)
    assert found["over base"]["low"] < found["over base"]["value"] < found["over base"]["high"]


def test_more_pairs_are_compared_on_the_prompts_of_both(tmp_path):
    """Of the first prompt alone: 16 pairs win 3 of 4, 4 pairs all."""
    found = contest(tmp_path).more("16", "4", "base")
    assert found["value"] == -0.25 and found["n"] == 4
    assert contest(tmp_path).impersonal()["value"] == 0.25


def test_the_bound_picks_from_all_that_was_drawn_with_a_users_seeds(tmp_path):
    of = contest(tmp_path)
    offers = beside.offers(of)(of.plan.people[0].user)
    first, second = offers["drawn"]
    assert sorted(first.candidates[:, WARMTH]) == [-1, -1, 0, 0, 1, 2, 3]  # users 0 and 4, and nobody's three
    assert sorted(second.candidates[:, WARMTH]) == [0, 0, 1, 1, 2]
    assert second.impersonal[WARMTH] == 1 and second.base[WARMTH] == 0
    assert len(offers["drawn, any seeds"][0].candidates) == 4 + 4 + 1 + 4 + 4


def test_places_count_ties_half():
    likeness = np.array([[0.9, 0.1, 0.3], [0.5, 0.5, 0.5], [0.9, 0.8, 0.1]])
    assert outcomes.places(likeness).tolist() == [1, 2, 3]
    found = outcomes.retrieval(np.array([1, 2, 3, 7]), [0, 1, 2, 3])
    assert found["top 1"]["value"] == 0.25 and found["top 5"]["value"] == 0.75 and found["chance"]["top 1"] == 0.25


def test_the_way_from_one_user_to_another_by_hand(tmp_path):
    """The second user's utility less the first's is −3 times the warmth: one prompt falls steadily, one turns back."""
    couple = someone(0, 1.0), someone(1, -2.0)
    plan = Plan(couple, ["apple", "pear"], Studio(tmp_path, {}), Scale({}, couples=1, between=2))
    assert [one.user.user_id for one in opposite(couple)[0]] == [0, 1]
    way = [pictures(-amount, value) for amount, value in zip(AMOUNTS, (0, -1, -2, -3, 1), strict=True)]
    found = outcomes.interpolation(plan, [way])
    assert found["spearman"]["value"] == pytest.approx((1 + 0) / 2)
    assert found["monotone"]["value"] == 0.5
    assert found["difference_by_couple"][0][0] == 0


def test_pictures_are_drawn_once_and_kept_whole(tmp_path):
    model = Model(EMOJI / "pipeline", None, How())
    studio, calls = Studio(tmp_path, {"base": model}), []

    def draw() -> list[Image.Image]:
        calls.append(1)
        return [Image.fromarray(np.full((32, 32, 3), 9, np.uint8))]

    def fails() -> list[Image.Image]:
        raise KeyboardInterrupt

    names, someone_else = people.prompts(1), UserEmbedding(torch.ones(3), "e")
    with pytest.raises(KeyboardInterrupt):
        studio.kept("base", "some/1", names, [1], None, fails)
    assert not list(tmp_path.rglob("*.npz"))
    first, second = (studio.kept("base", "some/1", names, [1], None, draw) for _ in range(2))
    assert len(calls) == 1 and np.array_equal(first.pixels, second.pixels) and second.pixels[0, 0, 0, 0] == 9
    for seed, user in ((2, None), (1, someone_else)):
        studio.kept("base", "some/1", names, [seed], user, draw)
    assert len(calls) == 3 == len([*tmp_path.rglob("1-*.npz")])
    assert Model(EMOJI / "pipeline", None, How(steps=3)).name != model.name


def test_even_and_odd_prompts_are_put_together_in_order(tmp_path, monkeypatch):
    """Half of the prompts first; then all, of which only the other half is drawn."""
    drawn = []

    def draw(self: Model, prompts, seeds, user) -> list[Image.Image]:
        drawn.append(list(seeds))
        return [Image.fromarray(np.full((32, 32, 3), seed % 251, np.uint8)) for seed in seeds]

    monkeypatch.setattr(Model, "draw", draw)
    studio = Studio(tmp_path, {"personal": Model(EMOJI / "pipeline", None, How())})
    plans = [Plan([someone(1, 1.0)], people.prompts(3), studio, Scale(every)) for every in ({"4": 2}, {})]
    half, whole = (plan.right("4")[0].pixels[:, 0, 0, 0].tolist() for plan in plans)
    assert drawn == [[40_001, 40_009], [40_005]]
    assert whole == [40_001 % 251, 40_005 % 251, 40_009 % 251] and half == [whole[0], whole[2]]


# --- the whole --------------------------------------------------------------------------------------------------------


def small_run(folder: Path) -> Path:
    """A run's folder: an encoder that knows nothing, and an adapter that listens to it."""
    torch.manual_seed(0)
    scorer = PreferenceScorer.from_pretrained("bundled")
    eyes = Eyes(scorer.towers, 2).eval()
    encoder = UserEncoder(eyes.width, scorer.towers.width, rank=4, fingerprint=towers_fingerprint(eyes))
    encoder.save_pretrained(folder / "user_encoder")
    unet = load_pipeline(ModelConfig(str(EMOJI / "pipeline"))).unet
    add_user_adapter(unet, encoder.width)
    with torch.no_grad():
        for name, weight in user_parameters(unet).items():
            if "to_v_ip" in name:
                weight.normal_(std=0.05)
    save_user_adapter(unet, folder, {"encoder": encoder.id})
    return folder


def few_shipped() -> tuple[Pool, dict[bytes, np.ndarray]]:
    """The pictures of eight concepts, so that there is less to embed."""
    pool, look = people.shipped()
    some = np.isin(pool.concepts, sorted(set(pool.concepts))[:8])
    files = list(itertools.compress(pool.png, some))
    return Pool(list(itertools.compress(pool.concepts, some)), pool.drawn[some], files, pool.seen[some]), look


def stopped_after(draws: int, monkeypatch) -> None:
    """Let the first so many drawings through, and stop the next as Ctrl-C does."""
    whole, made = Model.draw, []

    def counted(self: Model, *arguments) -> list[Image.Image]:
        if len(made) == draws:
            raise KeyboardInterrupt
        made.append(arguments)
        return whole(self, *arguments)

    monkeypatch.setattr(Model, "draw", counted)


def test_the_command_draws_measures_and_goes_on(tmp_path, monkeypatch):
    """Two prompts, two steps. Stopped and given again, it keeps what it has drawn."""
    few, run = few_shipped(), small_run(tmp_path / "run")
    for module in (people, known):
        monkeypatch.setattr(module, "shipped", lambda: few)
    monkeypatch.setattr(personalization, "QUICK", Scale({}, 1, 2, (1, 2), (1, 2), candidates=2))
    line = ["run", "--personal", str(run), "--impersonal", str(run), "--quick", "--users", "5", "--prompts", "2"]
    line += ["--steps", "2", "--crowd", "500", "--folder", str(tmp_path / "kept"), "--gallery", str(tmp_path / "page")]
    line += ["--out", str(tmp_path / "found.json"), "--conditions", "4", "1", "between", "around", "spread"]
    with monkeypatch.context() as stop, pytest.raises(KeyboardInterrupt):
        stopped_after(11, stop)
        personalization.main(line)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.npz")}
    personalization.main(line)
    assert len(made) == 11 and {path: path.stat().st_mtime_ns for path in made} == made
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["nobody"]["over base"]["value"] == 0.5  # a user of zeros is the base
    assert {"interpolation", "rps", "diversity", "retrieval", "accuracy", "bound"} <= found.keys()
    assert list(found["win_rates"]) == ["4", "1"] and found["rps"]["RPS over base"]["n"] == 2
    page = (tmp_path / "page" / "README.md").read_text()
    assert "nan" not in page and all((tmp_path / "page" / name).exists() for name in ("sheet.png", "curves.png"))


def test_stored_results_hold_what_is_said_of_them():
    """After four pairs: over the base, over the impersonal LoRA, right over wrong, concepts kept; and the bound."""
    files = (ROOT / "benchmarks" / "results").glob("personalization-*.json")
    stored = [json.loads(path.read_text()) for path in files if "-bound-" not in path.name]
    assert stored
    for report in stored:
        wins, bounds = report["win_rates"], report["bound"]
        assert {"hardware", "python", "torch", "diffpref"} <= report["environment"].keys()
        assert wins["4"]["over base"]["value"] >= 0.76 and wins["4"]["over base"]["low"] > 0.70
        assert wins["4"]["over impersonal"]["low"] > 0.55 and wins["4"]["right over wrong"]["low"] > 0.5
        assert report["concept_recognition"]["4"]["personal - impersonal"]["value"] > -0.03
        for n, row in wins.items():
            assert all(found["low"] <= found["value"] <= found["high"] for found in row.values())
            assert row["over base"]["value"] <= bounds[n]["drawn: over base"]["value"]
