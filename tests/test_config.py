"""A configuration that cannot work is refused with the key in the message."""

import dataclasses
import pathlib
from typing import get_args, get_type_hints

import pytest
import yaml

from diffpref.config import (
    LIMITS,
    Config,
    NoiseConfig,
    ObjectiveConfig,
    ReferenceConfig,
    config_hash,
    known_keys,
    load_config,
    to_dict,
)
from diffpref.noise import STRATEGIES, TIMESTEPS
from diffpref.objectives import OBJECTIVES
from diffpref.predict import REFERENCES
from diffpref.scorer.config import load_scorer_config
from diffpref.users.meta.config import load_encoder_config

BASE = {"name": "run", "model": {"pretrained_model_name_or_path": "base"}, "data": {"path": "pairs.parquet"}}
ROOT = pathlib.Path(__file__).parents[1]
LOADERS = {"scorer_": load_scorer_config, "user_encoder_": load_encoder_config}  # of what is no diffusion run


def load(folder, *overrides: str, **sections) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(BASE | sections))
    return load_config(["--config", str(path), *overrides])


def test_file_then_command_line(tmp_path):
    config = load(tmp_path, "--train.seed", "7", train={"seed": 3, "learning_rate": 0.5})
    assert (config.train.seed, config.train.learning_rate) == (7, 0.5)
    assert config.run_dir == pathlib.Path("runs/run")


def test_scientific_notation_in_yaml_is_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE) + "train: {learning_rate: 1e-4}\n")
    assert load_config(["--config", str(path)]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"learning_rat": 1}},
            "unknown configuration key 'train.learning_rat'; did you mean 'train.learning_rate'?",
        ),
        ({"colour": 1}, "unknown configuration key 'colour'"),
        ({"train": {"max_train_steps": "many"}}, 'train.max_train_steps"'),
        ({"lora": {"rank": 1.5}}, 'lora.rank"'),
        ({"objective": {"name": "ppo"}}, "Got value: ppo"),
        ({"objective": {"beta": -1.0}}, "objective.beta must be positive, got -1.0"),
        ({"data": {"path": "x", "caption_dropout": 1.5}}, "data.caption_dropout must lie in [0, 1], got 1.5"),
        ({"judge": {"judge": "diffpref.nowhere.judge"}}, 'judge.judge"'),
        ({"judge": {"judge": "math.sqrt"}}, "judge.judge needs pictures to judge; give sample.prompts"),
        ({"judge": {"measures": {"a": "math.sqrt"}}}, "judge.measures needs pictures to measure; give sample.prompts"),
        ({"sample": {"validation_steps": 5}}, "sample.validation_steps needs something to draw or to rank; give"),
        ({"model": {**BASE["model"], "dtype": "float16"}}, "model.dtype float16 needs train.mixed_precision fp16"),
        ({"train": {"seed": -1}}, "train.seed must not be negative, got -1"),
        ({"objective": {"label_smoothing": 0.5}}, "objective.label_smoothing must lie in (0, 0.5), got 0.5"),
        ({"objective": {"probability_range": [0.9, 0.1]}}, "objective.probability_range must be lowest and highest"),
        ({"noise": {"timesteps": "list"}}, "noise.timesteps list needs noise.timestep_list"),
        ({"noise": {"timestep_list": [1000]}}, "noise.timestep_list must be timesteps from 0 to 999, got [1000]"),
        ({"objective": {"name": "mapo", "error_space": "sample"}}, "objective.error_space scales the errors"),
        ({"train": {"gradient_noise_draws": 2}}, "train.gradient_noise_draws takes its batch from held-out"),
        ({"name": "a/b"}, "name must name a folder, not a path, got 'a/b'"),
    ],
)
def test_mistakes_in_the_file(tmp_path, sections, message):
    with pytest.raises(ValueError) as error:
        load(tmp_path, **sections)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--train.learning_rat", "1"], "unknown configuration key 'train.learning_rat'; did you mean"),
        (["--train.learning_rate", "fast"], 'train.learning_rate"'),
        (["--train.learning_rate", ".nan"], "train.learning_rate must be positive, got nan"),
        (["--config", "nowhere.yaml"], "File does not exist:"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, override, message):
    with pytest.raises(ValueError) as error:
        load(tmp_path, *override)
    assert message in str(error.value)


def test_required_keys_are_named():
    with pytest.raises(ValueError, match="required: name, data.path, model.pretrained_model_name_or_path"):
        load_config([])


def test_choices_are_the_registries():
    """The names are written once more in the types, which are the command's help; they must not drift apart."""
    assert set(get_args(get_type_hints(ObjectiveConfig)["name"])) == set(OBJECTIVES)
    assert set(get_args(get_type_hints(NoiseConfig)["strategy"])) == set(STRATEGIES)
    assert set(get_args(get_type_hints(NoiseConfig)["timesteps"])) == set(TIMESTEPS)
    assert set(get_args(get_type_hints(ReferenceConfig)["kind"])) == set(REFERENCES)


def test_limits_name_keys_that_exist():
    assert set(LIMITS) <= set(known_keys())


def test_resolved_configuration_reads_back(tmp_path):
    config = load(tmp_path, judge={"judge": "math.sqrt"}, sample={"prompts": ["a", "b"]})
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(["--config", str(path)]) == config


def test_hash_is_of_what_is_computed_not_of_where(tmp_path):
    config = load(tmp_path)
    renamed = dataclasses.replace(config, name="other", output_dir=tmp_path)
    warmer = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1.0))
    assert config_hash(config) == config_hash(renamed) != config_hash(warmer)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_recorded_configurations_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    load = next((load for start, load in LOADERS.items() if path.name.startswith(start)), load_config)
    assert load(["--config", str(path)]).name


def test_every_objective_has_a_configuration(monkeypatch):
    """Laid over the quickstart's; each says how it is called."""
    monkeypatch.chdir(ROOT)
    paths, found = sorted((ROOT / "configs" / "objectives").glob("*.yaml")), set()
    for path in paths:
        config = load_config(["--config", "configs/quickstart.yaml", "--config", str(path)])
        found.add(config.objective.name)
        assert config.name == path.stem and config.train.max_train_steps == 240, "the quickstart's keys remain"
        assert f"--config configs/quickstart.yaml --config configs/objectives/{path.name}" in path.read_text()
    assert found == set(OBJECTIVES)
