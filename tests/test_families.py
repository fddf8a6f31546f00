"""One path for SD, SDXL, SD3 and FLUX: encoders as the pipeline's own, policy and reference, LoRA files that stock
diffusers loads."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from tiny_pipelines import IMAGE_SIZE, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from diffpref.adapters import METADATA_KEYS, add_lora, save_lora
from diffpref.batch import Encoded, PreferenceBatch, Structure
from diffpref.config import LoraSettings, ModelConfig, NoiseConfig
from diffpref.encode import Encoder
from diffpref.errors import item_errors
from diffpref.families import family_of, load_pipeline
from diffpref.noise import add_noise, parameterization
from diffpref.predict import Models, adapter_off, frozen_copy

PIPELINES = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd("v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3-t5": lambda: tiny_sd3(t5=True),
    "flux": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance=False),
}


UNET_TARGETS = ["to_q", "conv1", "conv2"]
CONVOLUTIONS = {  # FLUX has none: its patches go through a linear map
    "StableDiffusionPipeline": UNET_TARGETS,
    "StableDiffusionXLPipeline": UNET_TARGETS,
    "StableDiffusion3Pipeline": ["to_q", "proj"],
    "FluxPipeline": ["to_q", "x_embedder"],
}


@pytest.fixture(params=PIPELINES)
def pipe(request):
    pipeline = PIPELINES[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch(prompts=("a cat", "")) -> PreferenceBatch:
    count, items = len(prompts), torch.arange(2 * len(prompts))
    images = torch.rand(2 * count, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    size, corner = torch.tensor([[48, 40]]).expand(2 * count, 2), torch.tensor([[8, 4]]).expand(2 * count, 2)
    structure = Structure(items // 2, items.view(-1, 2), torch.ones(count))
    keys, shape = list(range(count)), (images.shape[2], images.shape[3])
    both = [prompt for prompt in prompts for _ in range(2)]
    return PreferenceBatch(both, shape, size, corner, keys, structure, items, images)


def forward(pipe, reference=None, dtype=torch.float32):
    family, encoded = family_of(pipe), Encoder(pipe, seed=0)(batch())
    noised = add_noise(encoded, parameterization(pipe.scheduler), NoiseConfig(), seed=0)
    denoiser = getattr(pipe, family.denoiser)
    models = Models(family, denoiser, reference and reference(denoiser), dtype, nullcontext)
    inputs = noised.x_t, noised.t, encoded.conditioning
    return models.policy(*inputs), models.reference(*inputs) if reference else None, noised


def shake(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Move the LoRA away from the identity."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g).to(p))


def add(pipe, **settings) -> torch.nn.Module:
    denoiser = getattr(pipe, family_of(pipe).denoiser)
    add_lora(denoiser, family_of(pipe), LoraSettings(rank=4, **settings), seed=0)
    return denoiser


def draw(pipe) -> np.ndarray:
    size, g = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, guidance_scale=2.0, generator=g, output_type="np", **size).images


def test_prompts_are_encoded_as_the_pipeline_encodes_them_and_once(pipe, monkeypatch):
    encoder, calls, original = Encoder(pipe, seed=0), [], pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: calls.append(a or k) or original(*a, **k))
    once = encoder.encode_prompts(["a cat", "a dog", "a cat"])
    again = encoder.encode_prompts(["a dog"])
    assert len(calls) == 2, "each by itself, and once"
    for key, value in once.items():
        assert torch.equal(value[0], value[2]) and torch.equal(value[1], again[key][0])
        assert key == "guidance" or not torch.equal(value[0], value[1])


@pytest.mark.parametrize("pipe", ["sd", "sdxl", "sd3", "sd3-t5"], indirect=True)  # FLUX's guidance is distilled
def test_empty_prompt_is_what_guidance_uses(pipe):
    """The dropped caption must be the pipeline's own unconditional input, or guidance drifts from training."""
    _, negative, *_ = pipe.encode_prompt(*["a cat"] * (3 if "3" in type(pipe).__name__ else 1), device="cpu",
                                         num_images_per_prompt=1, do_classifier_free_guidance=True)  # fmt: skip
    torch.testing.assert_close(Encoder(pipe, seed=0).encode_prompts([""])["prompt_embeds"], negative)


def test_latents_decode_back_in_the_pipelines_scale(pipe):
    """Undoing scale and shift as the pipeline does before decoding gives the posterior's own moments."""
    images, vae = batch(), pipe.vae
    latents = Encoder(pipe, seed=0).encode_images(images)
    z = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    posterior = vae.encode(images.images).latent_dist
    normal = ((z - posterior.mean) / posterior.std).flatten()
    assert abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.1
    assert torch.equal(latents, Encoder(pipe, seed=0).encode_images(images))
    assert not torch.equal(latents, Encoder(pipe, seed=1).encode_images(images))


def test_a_vae_that_overflows_in_fp16_encodes_in_fp32():
    pipe, exact = tiny_sdxl(), tiny_sdxl()
    pipe.vae.half()
    exact.vae.half().float()
    assert torch.equal(Encoder(pipe, seed=0).encode_images(batch()), Encoder(exact, seed=0).encode_images(batch()))
    assert pipe.vae.dtype == torch.float16


def test_sdxl_is_told_each_pictures_size_and_corner():
    encoded = Encoder(tiny_sdxl(), seed=0)(batch())
    assert encoded.conditioning["time_ids"].tolist() == [[48, 40, 8, 4, 32, 32]] * 4


@pytest.mark.parametrize("kind", [adapter_off, frozen_copy])
def test_a_fresh_lora_is_exactly_the_reference(pipe, kind):
    add(pipe)
    policy, reference, noised = forward(pipe, kind)
    assert policy.requires_grad and not reference.requires_grad
    assert item_errors(policy, reference, noised.target, noised.weight).advantage.abs().max() == 0


def test_adapter_off_is_the_base_and_comes_back_on_after_an_exception(pipe):
    base, *_ = forward(pipe)
    denoiser = add(pipe)
    shake(denoiser)
    policy, reference, _ = forward(pipe, adapter_off)
    torch.testing.assert_close(reference, base)
    assert (policy - base).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="inside"), adapter_off(denoiser)():
        raise RuntimeError("inside")
    torch.testing.assert_close(forward(pipe)[0], policy)
    assert all(p.requires_grad for n, p in denoiser.named_parameters() if "lora" in n)


def test_frozen_copy_does_not_follow_the_policy(pipe):
    denoiser = getattr(pipe, family_of(pipe).denoiser)
    reference = frozen_copy(denoiser)
    before, *_ = forward(pipe)
    shake(denoiser)
    torch.testing.assert_close(forward(pipe, lambda _: reference)[1], before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 9.0},
        {"use_rslora": True, "alpha": 3.0},
        {"use_dora": True},
        {"convolutions": True},
        {"convolutions": True, "use_dora": True},
    ],
    ids=str,
)
def test_lora_file_gives_stock_diffusers_the_same_pictures(pipe, settings, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    base, settings = draw(pipe), dict(settings)
    if settings.pop("convolutions", False):  # the quickstart's targets; a flow transformer has its patch embedding
        settings["target_modules"] = CONVOLUTIONS[type(pipe).__name__]
    denoiser = add(pipe, **settings)
    shake(denoiser)
    ours, file = draw(pipe), save_lora(pipe, denoiser, tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base")
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    np.testing.assert_allclose(draw(stock), ours, atol=2e-5)
    assert np.abs(ours - base).max() > 1e-2
    with safe_open(file, "pt") as weights:
        metadata = json.loads(weights.metadata()["lora_adapter_metadata"])
    assert {key.split(".", 1)[1] for key in metadata} == set(METADATA_KEYS)


def test_lora_masters_are_fp32_on_a_half_precision_base(pipe):
    pipe = pipe.to(torch.bfloat16)
    denoiser = add(pipe)
    trained = {n: p.dtype for n, p in denoiser.named_parameters() if p.requires_grad}
    frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
    assert set(trained.values()) == {torch.float32} and frozen == {torch.bfloat16}
    policy, reference, noised = forward(pipe, adapter_off, torch.bfloat16)
    errors = item_errors(policy, reference, noised.target, noised.weight)
    assert noised.x_t.dtype == noised.target.dtype == errors.policy.dtype == torch.float32
    assert errors.advantage.abs().max() == 0


def test_adapter_start_depends_on_its_seed_alone():
    states = []
    for seed, ambient in ((0, 1), (0, 2), (1, 1)):
        pipe = tiny_sd()
        torch.manual_seed(ambient)
        add_lora(pipe.unet, family_of(pipe), LoraSettings(rank=2), seed)
        states.append(torch.cat([p.flatten() for p in pipe.unet.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="lora.target_modules: no module of the unet is named 'nowhere'"):
        add(tiny_sd(), target_modules=["to_q", "nowhere"])


def test_load_pipeline_takes_each_family(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(ModelConfig(str(tmp_path), dtype="bfloat16"))
    assert type(loaded) is type(pipe) and loaded.vae.dtype == torch.bfloat16


def test_what_is_not_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a diffusers pipeline .no model_index.json in it."):
        load_pipeline(ModelConfig(str(tmp_path)))
    with pytest.raises(
        ValueError, match="model.pretrained_model_name_or_path: cannot load a pipeline from 'nowhere/at/all'"
    ):
        load_pipeline(ModelConfig("nowhere/at/all"))


def test_a_family_we_do_not_know_is_refused(tmp_path):
    from diffusers import DDIMPipeline

    sd = tiny_sd()
    DDIMPipeline(unet=sd.unet, scheduler=sd.scheduler).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="DDIMPipeline is of no family known here; known pipelines: StableDiffusionPipeline"
    ):
        load_pipeline(ModelConfig(str(tmp_path)))


def test_encoded_is_plain_data():
    encoded = Encoder(tiny_sd(), seed=0)(batch())
    assert isinstance(encoded, Encoded) and not encoded.latents.requires_grad and encoded.latents.dtype == torch.float32


def test_a_prompt_does_not_depend_on_which_others_came_with_it(pipe):
    """A resumed run meets them in other company."""
    together = Encoder(pipe, seed=0).encode_prompts(["a cat", "", "a dog on a mat"])
    alone = Encoder(pipe, seed=0).encode_prompts(["a dog on a mat"])
    assert all(torch.equal(value[2], alone[key][0]) for key, value in together.items())
