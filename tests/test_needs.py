"""What an objective needs of data and settings is said before any model is loaded."""

from dataclasses import replace

import pytest
from datasets import Dataset

from diffpref.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from diffpref.data import load_preferences
from diffpref.needs import SOURCES, check_needs, check_validation
from diffpref.objectives import OBJECTIVES
from diffpref.trainer import Trainer

PICTURE = {"bytes": b"", "path": None}
KINDS = {
    "pairs": {"prompt": ["a"], "chosen": [PICTURE], "rejected": [PICTURE]},
    "lists": {"prompt": ["a"], "images": [[PICTURE, PICTURE]], "scores": [[1.0, 0.0]]},
    "likes": {"prompt": ["a"], "image": [PICTURE], "label": [True]},
    "captions": {"prompt": ["a"], "image": [PICTURE], "rejected_prompt": ["b"]},
}
GIVES = {  # by hand, from the README's table
    "pairs": {"pairs", "scores", "labels"},
    "lists": {"pairs", "scores"},
    "likes": {"labels"},
    "captions": {"pairs", "scores", "labels", "captions"},
}


def config(objective: ObjectiveConfig, **sections) -> Config:
    model, data = ModelConfig("nowhere"), DataConfig("set.parquet")
    return replace(Config(name="run", model=model, data=data, objective=objective), **sections)


def settings(name: str, **options) -> ObjectiveConfig:
    return ObjectiveConfig(name, **({"beta": 8.0 if name == "mapo" else 0.5} | options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fields_that_are_missing_are_named_with_the_data_that_have_them(name, kind):
    rows, missing = Dataset.from_dict(KINDS[kind]), sorted(OBJECTIVES[name].needs - GIVES[kind])
    if not missing:
        check_needs(config(settings(name)), rows)
        return
    with pytest.raises(ValueError) as error:
        check_needs(config(settings(name)), rows)
    assert f"objective.name {name} needs {missing[0]}, which set.parquet does not give" in str(error.value)
    assert SOURCES[missing[0]] in str(error.value)


def test_the_safeguard_needs_pairs():
    with pytest.raises(ValueError, match="^objective.safeguard needs pairs, which set.parquet does not give"):
        check_needs(config(settings("kto", safeguard=0.5)), Dataset.from_dict(KINDS["likes"]))


def test_captions_of_lists_are_not_to_be_had_by_rejected_captions():
    """That adds prompts to pairs and likes; other sets it does not know what to do with."""
    with pytest.raises(ValueError, match="needs captions.* and pairs or likes with data.rejected_captions$"):
        check_needs(config(settings("dcpo")), Dataset.from_dict(KINDS["lists"]))


@pytest.mark.parametrize("name", ["rankdpo", "lipo"])
def test_scores_that_are_no_shares_are_refused(name):
    rows = Dataset.from_dict(KINDS["lists"] | {"scores": [[21.5, 20.0]]})
    with pytest.raises(ValueError, match="reach from 20 to 21.5: set data.scores to votes"):
        check_needs(config(settings(name)), rows)
    check_needs(config(settings(name), data=DataConfig("set.parquet", scores="votes")), rows)
    check_needs(config(settings("listnet")), rows)


def stream_of_lists(folder, scores: list[list[float]]) -> DataConfig:
    """A stream whose pictures cannot be opened."""
    rows = {"prompt": ["a"] * len(scores), "images": [[PICTURE, PICTURE]] * len(scores), "scores": scores}
    Dataset.from_dict(rows).to_parquet(folder / "lists.parquet")
    return DataConfig(str(folder / "lists.parquet"), streaming=True)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (settings("rankdpo"), "reach from 0 to 30: set data.scores to votes"),
        (settings("lipo"), "reach from 0 to 30: set data.scores to votes"),
        (settings("rwr"), r"objective.reward_temperature 1 is too small for scores of up to 30 in .*lists.parquet"),
    ],
)
def test_the_beginning_of_a_stream_is_looked_at(objective, message, tmp_path):
    """Its first 64 rows: the 64th is, the 65th is not."""
    sound = [[1.0, 0.0]] * 63
    data = stream_of_lists(tmp_path, [*sound, [30.0, 0.0]])
    with pytest.raises(ValueError, match=message):
        check_needs(config(objective, data=data), load_preferences(data))
    votes = replace(data, scores="votes")
    check_needs(config(objective, data=votes), load_preferences(votes))
    late = stream_of_lists(tmp_path, [*sound, [1.0, 0.0], [30.0, 0.0]])
    check_needs(config(objective, data=late), load_preferences(late))


def test_scores_that_are_missing_are_not_those_of_the_others():
    """Rows without them are left out later; a stray zero here would be taken for a score."""
    rows = Dataset.from_dict({"prompt": ["a"] * 2, "images": [[PICTURE] * 2] * 2, "scores": [[21.5, None], None]})
    with pytest.raises(ValueError, match="reach from 21.5 to 21.5"):
        check_needs(config(settings("rankdpo")), rows)


def test_rewards_whose_weights_are_too_large_are_refused():
    """exp(score / T): 25 / 1.2 is more than 20, 25 / 1.25 is not."""
    rows = Dataset.from_dict(KINDS["lists"] | {"scores": [[25.0, -300.0]]})
    with pytest.raises(ValueError) as error:
        check_needs(config(settings("rwr", reward_temperature=1.2)), rows)
    assert str(error.value) == (
        "objective.reward_temperature 1.2 is too small for scores of up to 25 in set.parquet: the weight exp(score / T)"
        " would be exp(20.8333); set it to 1.25 or more, or data.scores to votes"
    )
    check_needs(config(settings("rwr", reward_temperature=1.25)), rows)
    check_needs(config(settings("rwr"), data=DataConfig("set.parquet", scores="votes")), rows)


@pytest.mark.parametrize("kind", ["pairs", "captions"])
def test_the_winner_of_a_pair_has_the_score_one(kind):
    with pytest.raises(
        ValueError, match="0.04 is too small for scores of up to 1 in set.parquet.*set it to 0.05 or more$"
    ):
        check_needs(config(settings("rwr", reward_temperature=0.04)), Dataset.from_dict(KINDS[kind]))
    check_needs(config(settings("rwr", reward_temperature=0.05)), Dataset.from_dict(KINDS[kind]))


TIED = KINDS["pairs"] | {"margin": [0.0]}
HALF = (
    "data.ties half sets the probability of a tie to one half, which objective.name {} does not read; use osp or smpo"
)
LIKED = "objective.name {} takes labels, and a tie has no liked picture; set data.ties to drop"


@pytest.mark.parametrize(
    ("name", "ties", "message"),
    [
        *[(name, "half", HALF) for name in ("dpo", "ipo", "mapo", "sft", "dspo", "rpo")],
        *[("kto", ties, LIKED) for ties in ("keep", "half", "both")],
    ],
)
def test_ties_that_would_be_taken_for_wins_are_refused(name, ties, message):
    wanted = config(settings(name), data=DataConfig("set.parquet", ties=ties))
    with pytest.raises(ValueError) as error:
        check_needs(wanted, Dataset.from_dict(TIED))
    assert str(error.value).startswith(message.format(name))
    check_needs(wanted, Dataset.from_dict(KINDS["pairs"]))  # no margin, no ties


def test_the_wrong_caption_of_a_tie_is_no_dislike():
    rows = Dataset.from_dict(TIED | {"rejected_prompt": ["b"]})
    with pytest.raises(ValueError, match="objective.name text_kto takes labels, and a tie has no liked picture"):
        check_needs(config(settings("text_kto"), data=DataConfig("set.parquet", ties="both")), rows)


@pytest.mark.parametrize(
    ("name", "ties"),
    [
        *[(name, "half") for name in ("osp", "smpo", "rankdpo", "lipo", "diffusion_lpo", "pro", "listnet", "rwr")],
        *[("dpo", ties) for ties in ("drop", "keep", "both")],
        ("kto", "drop"),
    ],
)
def test_ties_that_are_read_as_such_are_not(name, ties):
    """Half is probability one half and equal scores: objectives that read either know a tie."""
    check_needs(config(settings(name), data=DataConfig("set.parquet", ties=ties)), Dataset.from_dict(TIED))


@pytest.mark.parametrize("kind", ["likes", "captions"])
def test_only_pairs_have_ties(kind):
    rows = Dataset.from_dict(KINDS[kind] | {"margin": [0.0]})
    check_needs(config(settings("kto"), data=DataConfig("set.parquet", ties="half")), rows)


def test_held_out_rows_need_what_the_loss_needs_only_for_its_gradient():
    data = DataConfig("set.parquet", validation="held_out.parquet")
    wanted = config(settings("kto"), data=data, train=TrainConfig(gradient_noise_draws=4))
    with pytest.raises(ValueError) as error:
        check_validation(wanted, Dataset.from_dict(KINDS["lists"]))
    assert str(error.value).startswith(
        "data.validation: train.gradient_noise_draws takes the loss of these rows; objective.name kto needs labels,"
        " which held_out.parquet does not give"
    )
    check_validation(wanted, Dataset.from_dict(KINDS["pairs"]))
    check_validation(replace(wanted, train=TrainConfig()), Dataset.from_dict(KINDS["lists"]))


def test_options_of_other_objectives_are_refused():
    with pytest.raises(ValueError, match="objective.margin_cap is not used by objective.name sft"):
        check_needs(config(settings("sft", margin_cap=2.0)), Dataset.from_dict(KINDS["pairs"]))


@pytest.mark.parametrize("name", ["sft", "mapo"])
def test_full_tuning_needs_a_copy_only_for_a_reference(name):
    model, rows = ModelConfig("nowhere", tuning="full"), Dataset.from_dict(KINDS["pairs"])
    check_needs(config(settings(name), model=model), rows)
    for objective in (settings("dpo"), settings(name, drift_weight=0.1)):
        with pytest.raises(ValueError, match="set reference.kind to frozen_copy"):
            check_needs(config(objective, model=model), rows)


def test_the_trainer_says_so_before_it_looks_for_a_model(tmp_path):
    """The model does not exist, and is not asked for."""
    path = tmp_path / "likes.parquet"
    Dataset.from_dict({"prompt": ["a"], "image": [PICTURE], "label": [True]}).to_parquet(path)
    wanted = config(settings("dpo"), data=DataConfig(str(path)), output_dir=tmp_path)
    with pytest.raises(ValueError, match="objective.name dpo needs pairs"):
        Trainer(wanted)
