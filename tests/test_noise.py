"""x_t and target by their equations; who shares which noise; what an error counts in another space."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from analytic_models import KINDS, Gaussian, coefficients, encoded, item_noise, scheduler

from diffpref.config import NoiseConfig, ObjectiveConfig
from diffpref.noise import (
    RectifiedFlow,
    VariancePreserving,
    add_noise,
    check_strategy,
    error_weight,
    generator,
    needs_model,
    parameterization,
)
from diffpref.noise.inversion import GRIDS
from diffpref.noise.schedules import IN_VELOCITY, mixture
from diffpref.triton_kernels.noise_pairs import noise_pairs


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_variance_preserving_equals_diffusers_in_fp32(kind):
    ours, theirs, batch = parameterization(scheduler(kind)), scheduler(kind), encoded([0, 1, 2] * 2)
    noise, u = torch.randn_like(batch.latents), torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9991, 1 - 2**-24])
    x_t, target = noise_pairs(batch.latents, noise, mixture(ours, u))
    assert (t := ours.timestep(u)).tolist() == [0, 100, 500, 700, 999, 999]
    torch.testing.assert_close(x_t, theirs.add_noise(batch.latents, noise, t))
    expected = noise if kind == "epsilon" else theirs.get_velocity(batch.latents, noise, t)
    torch.testing.assert_close(target, expected)


def test_flow_is_the_straight_path_at_the_schedulers_own_levels():
    """At u = k/1000 our shifted σ is the one the pipeline's scheduler has for that position, and t = 1000·σ."""
    theirs, batch = scheduler("flow"), encoded([0, 0])
    ours, noise = parameterization(theirs), torch.randn_like(batch.latents)
    u = torch.tensor([0.25, 0.8])
    x_t, target = noise_pairs(batch.latents, noise, mixture(ours, u))
    sigma = theirs.sigmas[[750, 200]]
    torch.testing.assert_close(ours.timestep(u), 1000 * sigma, rtol=1e-6, atol=1e-4)
    expected = (1 - sigma.view(-1, 1, 1, 1)) * batch.latents + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(x_t, expected)
    assert torch.equal(target, noise - batch.latents)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_half_precision_latents_do_not_round_the_schedule(kind):
    config, half = NoiseConfig(), encoded([0, 1, 2] * 2)
    half = replace(half, latents=half.latents.bfloat16())
    full = replace(half, latents=half.latents.float())
    noised, exact = (add_noise(x, parameterization(scheduler(kind)), config, seed=0) for x in (half, full))
    assert noised.x_t.dtype == torch.float32 and torch.equal(noised.x_t, exact.x_t)


def noise_of(strategy: str, keys: list[int], seed: int = 0):
    batch = encoded(list(range(len(keys))) * 2, keys=keys)
    clean = replace(batch, latents=torch.zeros_like(batch.latents))
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


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type 'sample' is not trainable here; known"):
        parameterization(scheduler("sample"))


# --- who shares what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("strategy", ["shared", "independent"])
def test_a_groups_draws_are_level_then_noise_of_its_own_generator(strategy, timesteps):
    """To the bit, for groups of any size whose items lie in any order: a run of before repeats."""
    batch = encoded([1, 0, 2, 1, 1, 2], keys=[40, 41, 90])
    config = NoiseConfig(strategy=strategy, timesteps=timesteps, logit_mean=0.3, logit_std=1.5)
    noised = add_noise(batch, parameterization(scheduler("epsilon")), config, seed=6)
    for number, key in enumerate(batch.keys):
        items, g = (batch.structure.group == number).nonzero().squeeze(1), generator(6, key)
        normal = timesteps == "logit_normal"
        u = torch.sigmoid(0.3 + 1.5 * torch.randn((), generator=g)) if normal else torch.rand((), generator=g)
        noise = torch.randn(*((len(items),) if strategy == "independent" else ()), 4, 5, 3, generator=g)
        assert (noised.level[items] == u).all() and torch.equal(noised.target[items], noise.expand(len(items), 4, 5, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["shared", "shared_latent", "independent"])
def test_x_t_is_picture_and_noise_of_its_own_timestep(strategy, kind):
    batch, parameters = encoded([0, 1, 0, 2]), parameterization(scheduler(kind))
    batch = replace(batch, latents=batch.latents[[0, 1, 0, 3]])
    noised = add_noise(batch, parameters, NoiseConfig(strategy=strategy), seed=0)
    a, s = (value.double() for value in coefficients(parameters, noised.t))
    whole = a * batch.latents.double() + s * item_noise(noised, batch.latents, parameters)
    torch.testing.assert_close(noised.x_t.double(), whole, rtol=1e-6, atol=2e-6)
    assert 0.7 < noised.target.square().mean().sqrt() < 1.6  # ε and v of 1; of a flow, ε − x0 with x0 of 1.1


def test_prompts_of_one_picture_share_its_x_t():
    batch = encoded([0, 1, 1, 0, 1])
    batch = replace(batch, latents=batch.latents[[0, 1, 1, 0, 1]])
    noised = add_noise(batch, parameterization(scheduler("epsilon")), NoiseConfig(strategy="shared_latent"), seed=0)
    assert torch.equal(noised.x_t[[0, 1, 1]], noised.x_t[[3, 2, 4]])


def test_pictures_that_differ_have_no_shared_latent():
    message = "noise.strategy shared_latent is for several prompts of one picture.*set it to shared"
    with pytest.raises(ValueError, match=message):
        add_noise(encoded([0, 0]), parameterization(scheduler("flow")), NoiseConfig(strategy="shared_latent"), seed=0)


# --- the space of the errors ----------------------------------------------------------------------------------------


def views(kind: str, x_t, answer, a, s) -> dict[str, torch.Tensor]:
    """What a model's answer for x_t says in every space, from x_t = a·x0 + s·ε and the definitions of v."""
    if kind == "flow":  # v = ε − x0
        x0, noise = x_t - s * answer, x_t + a * answer
    elif kind == "epsilon":
        x0, noise = (x_t - s * answer) / a, answer
    else:  # v = a·ε − s·x0
        x0, noise = a * x_t - s * answer, a * answer + s * x_t
    velocity = noise - x0 if kind == "flow" else a * noise - s * x0
    return {"epsilon": noise, "velocity": velocity, "sample": x0, "model": answer}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", list(get_args(get_type_hints(ObjectiveConfig)["error_space"])))
def test_the_weight_turns_the_models_error_into_that_of_the_space(space, kind):
    """Target and answer converted, wide and in fp64, at levels all over the schedule; and the table of the reference:
    flow's ε-error is (1−σ)² times its v-error, a v-model's a² times."""
    own = parameterization(scheduler(kind))
    doubled = replace(own, alphas_cumprod=own.alphas_cumprod.double()) if isinstance(own, VariancePreserving) else own
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    a, s = (value.view(-1, 1, 1, 1) for value in doubled.coefficients(u))
    x_t, target, answer = torch.randn(3, 9, 4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth, guess = (views(kind, x_t, value, a, s) for value in (target, answer))
    error, in_space = ((truth[name] - guess[name]).square().mean((1, 2, 3)) for name in ("model", space))
    torch.testing.assert_close(error_weight(doubled, space, u) * error, in_space, rtol=1e-12, atol=0)


def test_weights_by_hand():
    u = torch.tensor([0.5])
    flow, eps, v = (parameterization(scheduler(kind, **settings)) for kind, settings in
                    (("flow", {"shift": 3.0}), ("epsilon", {}), ("v_prediction", {})))  # fmt: skip
    table = [(flow, "epsilon", 0.0625), (flow, "velocity", 1.0), (flow, "sample", 0.5625)]  # σ = 3·0.5/2 = 0.75
    alpha = scheduler("epsilon").alphas_cumprod[500].item()
    table += [(eps, "epsilon", 1.0), (eps, "velocity", 1 / alpha), (eps, "sample", (1 - alpha) / alpha)]
    table += [(v, "epsilon", alpha), (v, "velocity", 1.0), (v, "sample", 1 - alpha)]
    for parameters, space, expected in table:
        assert error_weight(parameters, space, u).item() == pytest.approx(expected, rel=1e-5)
        assert error_weight(parameters, "model", u).item() == 1


def test_the_weight_travels_with_x_t():
    batch, parameters = encoded([0, 1, 2, 0]), parameterization(scheduler("flow"))
    noised = add_noise(batch, parameters, NoiseConfig(), seed=0, error_space="epsilon")
    torch.testing.assert_close(noised.weight, (1 - noised.t / 1000) ** 2)
    assert torch.equal(add_noise(batch, parameters, NoiseConfig(), seed=0).weight, torch.ones(4))


def test_an_infinite_weight_is_refused_where_it_can_be_drawn():
    ends_in_noise = parameterization(scheduler("epsilon", rescale_betas_zero_snr=True))
    assert ends_in_noise.alphas_cumprod[-1] == 0
    for space in ("velocity", "sample"):
        with pytest.raises(ValueError, match=f"objective.error_space {space}: .*infinite at timestep 999"):
            check_strategy(NoiseConfig(), ends_in_noise, space)
        check_strategy(NoiseConfig(timesteps="range", timestep_range=(0.0, 0.9)), ends_in_noise, space)
        check_strategy(NoiseConfig(timesteps="list", timestep_list=[900, 998, 1]), ends_in_noise, space)
    check_strategy(NoiseConfig(), ends_in_noise, "epsilon")
    for space in IN_VELOCITY:
        check_strategy(NoiseConfig(), parameterization(scheduler("v_prediction", rescale_betas_zero_snr=True)), space)
        check_strategy(NoiseConfig(), parameterization(scheduler("flow")), space)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"strategy": "ddim"}, "flow", "noise.strategy ddim inverts an eps or v model, .* shared_latent, .* flow$"),
        ({"strategy": "renoise"}, "flow", "noise.strategy renoise inverts an eps or v model, and this is a rectified"),
        (
            {"strategy": "flow"},
            "v_prediction",
            "noise.strategy flow inverts a rectified flow, .*, ddim, renoise$",
        ),
        ({"strategy": "flow", "inversion_grid": "snap"}, "flow", "noise.inversion_grid snap .* set it to exact"),
        ({"strategy": "ddim", "inversion_grid": "snap", "inversion_steps": 1001}, "epsilon", "inversion_steps 1001 is"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(settings, kind, message):
    for refuse in (check_strategy, lambda *what: add_noise(encoded([0]), *what[::-1], seed=0, model=Gaussian(kind))):
        with pytest.raises(ValueError, match=message):
            refuse(NoiseConfig(**settings), parameterization(scheduler(kind)))


def test_a_grid_of_another_spacing_is_not_snapped_to():
    unknown = replace(parameterization(scheduler("epsilon")), spacing="linspace")
    with pytest.raises(ValueError, match="noise.inversion_grid snap knows the timestep spacings leading, trai"):
        check_strategy(NoiseConfig(strategy="ddim", inversion_grid="snap"), unknown)
    check_strategy(NoiseConfig(strategy="ddim"), unknown)


def test_inversions_need_a_model_and_say_so():
    assert [needs_model(NoiseConfig(strategy=s)) for s in ("shared", "shared_latent", "independent")] == [False] * 3
    assert [needs_model(NoiseConfig(strategy=s)) for s in ("ddim", "renoise", "flow")] == [True] * 3
    with pytest.raises(ValueError, match="noise.strategy ddim inverts pictures with a model, and none was given"):
        add_noise(encoded([0]), parameterization(scheduler("epsilon")), NoiseConfig(strategy="ddim"), seed=0)


def test_choices_are_the_registries():
    assert set(get_args(get_type_hints(NoiseConfig)["inversion_grid"])) == set(GRIDS)
    assert set(get_args(get_type_hints(ObjectiveConfig)["error_space"])) == {"model", *IN_VELOCITY}


def test_the_schedulers_grid_is_read_from_its_configuration():
    stable_diffusion = parameterization(scheduler("epsilon", set_alpha_to_one=False, steps_offset=1))
    assert (stable_diffusion.spacing, stable_diffusion.offset) == ("leading", 1)
    assert stable_diffusion.first_alpha == pytest.approx(1 - 0.00085, rel=1e-6)
    assert isinstance(parameterization(scheduler("flow")), RectifiedFlow)
