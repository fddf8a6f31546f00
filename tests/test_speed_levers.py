"""Each thing that makes a step fast, switched by the real command: the weights it trains are the same but for rounding.

What changes the estimator is named as such in the configuration, and is not here: noise.source, noise.stratified,
reference.draws.
"""

from pathlib import Path

import forked
import pytest
from tiny_runs import command, distance, make_world, settings, weights

from diffpref.config import computed, load_config

# Adam turns the rounding of a gradient near zero into a whole step; with an epsilon above the rounding it does not.
CALM = {"adam_epsilon": 1e-2, "max_train_steps": 3}
LEVERS = {
    "workers": {"data": {"num_workers": 2}},
    "cache": {"cache": {"latents": True, "text": True}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "kept": {"train": {"gradient_checkpointing": False}},
    "unfused": {"train": {"optimizer": "adamw_unfused"}},
    "triton": {"train": {"kernel": "triton"}},  # through its interpreter, where there is no GPU
    "torch": {"train": {"kernel": "torch"}},
    "channels last": {"train": {"channels_last": True}},
    "compiled": {"train": {"compile": "aot_eager"}},
    "sdpa": {"model": {"attention": "sdpa"}},
    "casts at every layer": {"lora": {"compute": "float32"}},
}
HALF = {"model": {"dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), ("sd",))


def trained(world: Path, name: str, sections: dict) -> Path:
    """The folder of a run by the command."""
    train = CALM | sections.get("train", {})
    line = settings(world, name, **(sections | {"train": train, "sample": {"prompts": []}}))
    done = forked.call(command(*line))
    assert done.returncode == 0, done.stderr[-3000:]
    return world / "runs" / name


@pytest.fixture(scope="module")
def plain(world) -> Path:
    return trained(world, "plain", {})


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_only_rounding(world, plain, lever):
    folder = trained(world, lever.replace(" ", "-"), LEVERS[lever])
    assert distance(folder, plain) < 1e-5
    moved = sum(float(value.abs().sum()) for name, value in weights(folder).items() if "lora_B" in name)
    assert moved > 0, "something was trained"


def test_in_half_precision_casts_change_no_more_than_rounding_there_does(world, plain):
    """Beside the run in fp32: the adapter that computes in bf16 trains what the one that is cast to fp32 trains."""
    light, cast = (trained(world, name, HALF | {"lora": {"compute": name}}) for name in ("input", "float32"))
    assert 0 < distance(light, cast) < 2 * distance(cast, plain)
    assert distance(light, plain) < 2 * distance(cast, plain) < 0.1


@pytest.mark.parametrize("lever", [lever for lever in LEVERS if lever != "cache"])
def test_a_run_may_go_on_with_another_lever(world, lever):
    """They are no part of what a run computes."""
    one, other = (load_config(settings(world, "same", **sections)) for sections in ({}, LEVERS[lever]))
    left = {key for key in computed(one) if computed(one)[key] != computed(other)[key]}
    assert left <= {"train.optimizer"}
