"""FLUX: its transformer is called as its own pipeline calls it, at its levels, and the command trains it."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import tiny_flux
from tiny_runs import PIPELINES, distance, make_world, run, weights

from diffpref.families import family_of
from diffpref.noise import parameterization


def trace(pipe, **options) -> dict:
    """What the stock pipeline calls its transformer with at its last step, and what comes of it."""
    seen: dict = {}

    def note(module, arguments, given, output):
        seen.update(given, output=output[0])

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    pipe(["a cat", "a dog"], num_inference_steps=3, output_type="latent", **options)
    handle.remove()
    return seen


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()  # as in the pipeline; T5 rounds otherwise with a graph
def test_it_is_called_as_its_pipeline_calls_it(guidance, height, width):
    """Patches, their places, share of time, guidance: the pipeline's own call, and then ours with the same latents."""
    pipe = tiny_flux(guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    stock = trace(pipe, height=height, width=width, generator=generators)
    x_t = pipe._unpack_latents(stock["hidden_states"], height, width, pipe.vae_scale_factor)
    ours: dict = {}
    pipe.transformer.register_forward_pre_hook(lambda m, a, given: ours.update(given), with_kwargs=True)
    family, t = family_of(pipe), 1000 * stock["timestep"]
    prediction = family.denoise(pipe.transformer, x_t, t, family.encode_prompts(pipe, ["a cat", "a dog"]))
    for key in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance"):
        torch.testing.assert_close(ours[key], stock[key], rtol=0, atol=0)
    assert torch.equal(pipe._pack_latents(x_t, *x_t.shape), stock["hidden_states"])
    expected = pipe._unpack_latents(stock["output"], height, width, pipe.vae_scale_factor)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert (stock["guidance"] is not None) == guidance


@pytest.mark.parametrize("dynamic, shift", [(True, math.exp(1.15)), (False, 3.0)])
def test_levels_are_those_its_scheduler_draws_at(dynamic, shift):
    """At its own size a pipeline of 4 steps stands at σ = s·u/(1 + (s − 1)·u) for u = 1, 3/4, 1/2, 1/4."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25])
    scheduler.set_timesteps(sigmas=u.tolist(), mu=1.15 if dynamic else None)
    expected = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(scheduler.sigmas[:-1], expected)
    torch.testing.assert_close(parameterization(scheduler).timestep(u), 1000 * expected)


def test_it_trains_at_the_size_it_draws():
    pipe = tiny_flux()
    family = family_of(pipe)
    seen = trace(pipe, generator=torch.Generator().manual_seed(0))["img_ids"][-1]
    assert ((seen[1:] + 1) * family.patch(pipe.transformer)).tolist() == [family.side(pipe.transformer)] * 2


@pytest.mark.parametrize("guidance", [True, False])
def test_runs_begin_at_the_reference_and_a_cache_changes_nothing(guidance, tmp_path, monkeypatch):
    """The guidance that the transformer is told stands in the cache, beside what the text encoders made."""
    monkeypatch.setitem(PIPELINES, "flux", lambda: tiny_flux(guidance))
    world, sections = make_world(tmp_path, ("flux",)), {"data": {"resolution": 32}, "sample": {"prompts": []}}
    train = {"adam_epsilon": 1e-2, "gradient_checkpointing": True}  # above the rounding of other batches
    _, lines, plain = run(world, "plain", "flux", train=train, **sections)
    cache = {"latents": True, "text": True}
    _, cached_lines, cached = run(world, "cached", "flux", train=train, cache=cache, **sections)
    for first in (lines[0], cached_lines[0]):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["rewards/margins"] == 0
    assert any(w.abs().max() > 0 for key, w in weights(plain).items() if "lora_B" in key)
    assert distance(cached, plain) < 1e-6


def test_sides_are_multiples_of_the_packed_patch(tmp_path, monkeypatch):
    monkeypatch.setitem(PIPELINES, "flux", tiny_flux)
    world = make_world(tmp_path, ("flux",))
    with pytest.raises(ValueError, match="data.resolution: sides must be multiples of 8 for this pipeline"):
        run(world, "odd", "flux", data={"resolution": 36})
