"""noise.source philox: what groups and items are given, and what the training command makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from analytic_models import KINDS, Gaussian, encoded, item_noise, scheduler
from forked import call
from tiny_runs import command, make_world, run, same, settings

from diffpref.config import NoiseConfig
from diffpref.noise import add_noise, parameterization
from diffpref.noise.draw import SOURCES
from diffpref.triton_kernels.philox import philox_normal

GROUPS, KEYS, SHAPE = [1, 0, 2, 1, 1, 2], [40, -7, 2**62 + 1], (4, 5, 3)


def noised(strategy: str = "shared", kind: str = "epsilon", kernel: str = "auto", batch=None, **settings):
    """Items of three groups, in any order."""
    batch = batch or encoded(GROUPS, SHAPE, KEYS)
    config = NoiseConfig(strategy=strategy, **{"source": "philox", **settings})
    return add_noise(batch, parameterization(scheduler(kind)), config, 6, model=Gaussian(kind), kernel=kernel)


def test_sources_are_those_of_the_configuration():
    assert set(get_args(get_type_hints(NoiseConfig)["source"])) == set(SOURCES)


@pytest.mark.parametrize("strategy", ["shared", "independent"])
def test_noise_is_that_of_seed_key_and_place_in_the_group(strategy):
    """To the bit; a group's items share one, or take one draw each, in their order."""
    target = noised(strategy).target
    for number, key in enumerate(KEYS):
        items = [item for item, group in enumerate(GROUPS) if group == number]
        for place, item in enumerate(items):
            draw = place if strategy == "independent" else 0
            assert torch.equal(target[item], philox_normal([key], SHAPE, seed=6, draw=draw)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_levels_and_weights_are_the_generators_own(kind):
    """The source of noise is no other estimator: the same timesteps, other noise."""
    philox, plain = noised(kind=kind), noised(kind=kind, source="generator")
    assert torch.equal(philox.t, plain.t) and torch.equal(philox.level, plain.level)
    assert not torch.equal(philox.x_t, plain.x_t)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize(("strategy", "kind"), [*(("shared", kind) for kind in KINDS), ("independent", "flow")])
def test_kernel_and_pytorch_give_the_same_bits(strategy, kind, source):
    one, other = (noised(strategy, kind, kernel, source=source) for kernel in ("torch", "triton"))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("x_t", "target", "t", "weight"))


def test_one_latent_for_several_prompts():
    batch = encoded([0, 1, 1, 0], SHAPE, KEYS[:2])
    batch = replace(batch, latents=batch.latents[[0, 1, 1, 0]])
    x_t = noised("shared_latent", batch=batch).x_t
    assert torch.equal(x_t[0], x_t[3]) and torch.equal(x_t[1], x_t[2]) and not torch.equal(x_t[0], x_t[1])


@pytest.mark.parametrize(("strategy", "kind"), [("ddim", "epsilon"), ("renoise", "v_prediction"), ("flow", "flow")])
def test_inversion_with_fresh_noise_is_the_same_in_both(strategy, kind):
    """The same in PyTorch and in the kernel; without eta no noise is drawn, and the source changes nothing."""
    given = {"inversion_steps": 2, "inversion_eta": 0.5}
    fresh = noised(strategy, kind, "torch", **given)
    assert torch.equal(fresh.x_t, noised(strategy, kind, "triton", **given).x_t)
    still, plain = (noised(strategy, kind, source=source, inversion_steps=2) for source in ("philox", "generator"))
    assert torch.equal(still.x_t, plain.x_t)
    assert 0.02 < (fresh.x_t - still.x_t).std() < 1


def test_every_step_of_an_inversion_draws_anew():
    """On the straight path and with a model that says 0, x_t − a·x0 is made of the steps' noise alone."""
    batch, parameters = encoded(GROUPS, SHAPE, KEYS), parameterization(scheduler("flow"))
    config = NoiseConfig(strategy="flow", source="philox", inversion_steps=3, inversion_eta=1.0)
    found = add_noise(batch, parameters, config, 6, model=lambda x, t, conditioning: torch.zeros_like(x))
    velocity = (item_noise(found, batch.latents, parameters) - batch.latents).flatten(1)
    places = [GROUPS[:item].count(group) for item, group in enumerate(GROUPS)]
    drawn = [
        philox_normal([KEYS[group]], (60,), seed=6, draw=2**16 * step + place)[0].double()
        for group, place in zip(GROUPS, places, strict=True)
        for step in (1, 2)  # the first starts at the picture, where DDIM's deviation is 0
    ]
    for item, noise in enumerate(torch.stack(drawn).view(len(GROUPS), 2, 60)):
        solution = torch.linalg.lstsq(noise.T, velocity[item][:, None])
        assert (noise.T @ solution.solution - velocity[item][:, None]).abs().max() < 1e-5
        assert (solution.solution > 0.05).all()


@pytest.mark.parametrize("error_space", ["model", "velocity"])
@pytest.mark.parametrize(
    ("source", "strategy"), [("generator", "shared"), ("philox", "shared"), ("philox", "independent")]
)
def test_nothing_waits_for_the_device(source, strategy, error_space):
    """On the meta device there are no numbers to wait for: whoever reads one gets an error."""
    batch = encoded(GROUPS, SHAPE, KEYS)
    batch = replace(batch, latents=batch.latents.to("meta"), structure=batch.structure.to(torch.device("meta")))
    config, parameters = NoiseConfig(strategy=strategy, source=source), parameterization(scheduler("epsilon"))
    found = add_noise(batch, parameters, config, 6, error_space=error_space)
    assert found.x_t.shape == found.target.shape == (6, *SHAPE) and found.x_t.device.type == "meta"
    assert found.t.shape == found.weight.shape == (6,)


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), ("sd",))


def short(steps: int, source: str = "philox", **train) -> dict:
    """Sections of a run of so many steps, with a checkpoint after each, and no pictures."""
    train = {"max_train_steps": steps, "checkpointing_steps": 1, **train}
    return {"train": train, "noise": {"source": source}, "sample": {"prompts": []}}


def test_the_command_trains_on_it_and_goes_on_to_the_bit(world):
    """A run of the command; the same with a stop after one of two steps; and other noise from the other source."""
    done = call(command(*settings(world, "whole", **short(2))))
    assert done.returncode == 0, done.stderr
    run(world, "part", **short(1))
    run(world, "part", **short(2, resume_from_checkpoint="latest"))
    run(world, "plain", **short(2, source="generator"))
    runs = world / "runs"
    assert same(runs / "whole", runs / "part") and not same(runs / "whole", runs / "plain")
