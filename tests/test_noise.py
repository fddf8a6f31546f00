"""x_t and target by their equations; who shares which noise."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffpref.batch import Encoded, Structure
from diffpref.config import NoiseConfig
from diffpref.noise import add_noise, generator, logit_normal, parameterization


def encoded(groups: int = 3, keys: list[int] | None = None, dtype=torch.float32) -> Encoded:
    items = torch.arange(groups)
    structure = Structure(items.repeat(2), torch.stack([items, items + groups], 1), torch.ones(groups))
    latents = torch.randn(2 * groups, 4, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Encoded(latents, {}, keys or list(range(groups)), structure)


def scheduler(kind: str):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_variance_preserving_equals_diffusers_in_fp32(kind):
    ours, theirs, batch = parameterization(scheduler(kind)), scheduler(kind), encoded()
    noise, u = torch.randn_like(batch.latents), torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9991, 1 - 2**-24])
    x_t, target, t = ours.noise_latents(batch.latents, noise, u)
    assert t.tolist() == [0, 100, 500, 700, 999, 999]
    torch.testing.assert_close(x_t, theirs.add_noise(batch.latents, noise, t))
    expected = noise if kind == "epsilon" else theirs.get_velocity(batch.latents, noise, t)
    torch.testing.assert_close(target, expected)


def test_flow_is_the_straight_path_at_the_schedulers_own_levels():
    """At u = k/1000 our shifted σ is the one the pipeline's scheduler has for that position, and t = 1000·σ."""
    theirs, batch = scheduler("flow"), encoded(1)
    ours, noise = parameterization(theirs), torch.randn_like(batch.latents)
    x_t, target, t = ours.noise_latents(batch.latents, noise, torch.tensor([0.25, 0.8]))
    sigma = theirs.sigmas[[750, 200]]
    torch.testing.assert_close(t, 1000 * sigma, rtol=1e-6, atol=1e-4)
    expected = (1 - sigma.view(-1, 1, 1, 1)) * batch.latents + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(x_t, expected)
    assert torch.equal(target, noise - batch.latents)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_half_precision_latents_do_not_round_the_schedule(kind):
    half, config = encoded(dtype=torch.bfloat16), NoiseConfig()
    full = Encoded(half.latents.float(), {}, half.keys, half.structure)
    noised, exact = (add_noise(x, parameterization(scheduler(kind)), config, seed=0) for x in (half, full))
    assert noised.x_t.dtype == torch.float32 and torch.equal(noised.x_t, exact.x_t)


def noise_of(strategy: str, keys: list[int], seed: int = 0):
    batch = encoded(len(keys), keys)
    clean = Encoded(torch.zeros_like(batch.latents), {}, batch.keys, batch.structure)
    return add_noise(clean, parameterization(scheduler("epsilon")), NoiseConfig(strategy=strategy), seed)


def test_a_pair_shares_timestep_and_noise_and_different_pairs_do_not():
    noised = noise_of("shared", [0, 1, 2])
    assert torch.equal(noised.target[:3], noised.target[3:]) and torch.equal(noised.t[:3], noised.t[3:])
    assert len(noised.target[:, 0, 0, 0].unique()) == 3 and len(noised.level.unique()) == 3


def test_independent_noise_still_shares_the_timestep():
    noised = noise_of("independent", [0, 1, 2])
    assert len(noised.target[:, 0, 0, 0].unique()) == 6 and torch.equal(noised.t[:3], noised.t[3:])


def test_noise_depends_on_seed_and_position_only():
    together, apart = noise_of("shared", [4, 5]), [noise_of("shared", [k]) for k in (4, 5)]
    for i, single in enumerate(apart):
        assert torch.equal(together.target[i], single.target[0]) and together.level[i] == single.level[0]
    assert not torch.equal(noise_of("shared", [4], seed=1).target, apart[0].target)


def test_generators_of_neighbouring_keys_are_unrelated():
    draws = torch.stack([torch.randn(500, generator=generator(0, key)) for key in range(40)])
    off_diagonal = torch.corrcoef(draws) - torch.eye(40)
    assert (
        off_diagonal.abs().max() < 0.25
        and len({generator(a, b).initial_seed() for a in range(30) for b in range(30)}) == 900
    )


def test_logit_normal_is_symmetric_about_the_middle_and_below_one():
    u = torch.stack([logit_normal(generator(k), NoiseConfig(logit_std=2.0)) for k in range(2000)])
    assert abs(u.median() - 0.5) < 0.05 and 0 <= u.min() and u.max() < 1


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type 'sample' is not trainable here; known"):
        parameterization(scheduler("sample"))
