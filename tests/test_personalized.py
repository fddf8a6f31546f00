"""Pipelines that draw for a user: right for each, for nobody, for several at once, and put back as they were."""

import inspect
import math

import numpy as np
import pytest
import torch
from tiny_pipelines import IMAGE_SIZE, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl, unet
from tiny_pipelines import WIDTH as TEXT
from tiny_users import ME, QUICK, SIZE, WIDTH, YOU, embedding, same, seeded, trained

from diffpref.adapters import add_lora, save_lora
from diffpref.config import LoraSettings
from diffpref.families import family_of
from diffpref.sample import sample
from diffpref.users import PersonalizedPipeline, load_user_adapter
from diffpref.users.adapter import save_user_adapter, set_user_scale
from diffpref.users.formats import FORMATS
from diffpref.users.personalized import ARGUMENTS, denoiser_of

FAMILIES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
PROMPTS = ["a cat", "a dog, flat", "red"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An adapter for each family, and a LoRA for SD."""
    folder = tmp_path_factory.mktemp("world")
    for name, make in FAMILIES.items():
        pipe = make()
        trained(pipe)
        save_user_adapter(denoiser_of(pipe), folder / name, {"encoder": "tiny"})
    pipe = tiny_sd()
    trained(pipe, sequence=True)
    save_user_adapter(pipe.unet, folder / "sequence", {"encoder": "tiny"})
    pipe = tiny_sd()
    add_lora(pipe.unet, family_of(pipe), LoraSettings(rank=2), seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, pipe.unet.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 2)
    save_lora(pipe, pipe.unet, folder / "sd")
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def personal(world, family) -> PersonalizedPipeline:
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return load_user_adapter(pipe, world / family)


@pytest.fixture(scope="module")
def base(family):
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided(pipe, guidance: float, prompts: int) -> dict:
    """Classifier-free guidance; FLUX, which has a guidance of its own, does it with a negative prompt only."""
    if "Flux" not in type(pipe).__name__:
        return {"guidance_scale": guidance}
    return {"true_cfg_scale": guidance, "negative_prompt": ["blue"] * prompts if guidance > 1 else None}


# --- one user, and nobody ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_nobody_and_no_scale_are_the_pipeline_without_adapter(personal, base, guidance):
    options = QUICK | guided(base, guidance, 3) | {"num_images_per_prompt": 2}
    without = base(PROMPTS, generator=seeded(*range(6)), **options)
    assert same(personal(PROMPTS, generator=seeded(*range(6)), **options), without)
    assert same(personal(PROMPTS, user=[None] * 3, generator=seeded(*range(6)), **options), without)
    assert same(personal(PROMPTS, user=ME, scale=0, generator=seeded(*range(6)), **options), without)
    assert not same(personal(PROMPTS, user=ME, generator=seeded(*range(6)), **options), without)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_users_pictures_are_those_of_stock_diffusers(world, family, personal, base, guidance):
    """load_ip_adapter, set_ip_adapter_scale and what its call takes; diffusers cannot load that of SD3, only draw."""
    options = QUICK | guided(base, guidance, 2)
    if family == "sd3":
        stock, scale, users = personal.pipe, 1.0, ME.conditioning(guidance > 1)
        users = {name: values[0] for name, values in users.items()}
    else:
        stock, scale, users = FAMILIES[family](), 0.7, ME.conditioning(guidance > 1 and family != "flux")
        stock.set_progress_bar_config(disable=True)
        stock.load_ip_adapter(
            str(world / family), subfolder="", weight_name="user_adapter.safetensors", **NO_PICTURES[family]
        )
        stock.set_ip_adapter_scale(scale)
    if family == "flux":
        users |= {"negative_ip_adapter_image_embeds": [torch.zeros(1, 1, WIDTH)]}
    expected = stock(PROMPTS[:2], generator=seeded(0, 1), **options, **users)
    assert same(personal(PROMPTS[:2], user=ME, scale=scale, generator=seeded(0, 1), **options), expected)


NO_PICTURES = dict.fromkeys(("sd", "sdxl"), {"image_encoder_folder": None})
NO_PICTURES |= {"flux": {"image_encoder_pretrained_model_name_or_path": None}}
OWN = {"sd": 7.5, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5}


def test_the_default_guidance_is_the_pipelines_own(family, personal):
    own = personal("a cat", user=ME, generator=seeded(0), **QUICK)
    assert same(personal("a cat", user=ME, generator=seeded(0), guidance_scale=OWN[family], **QUICK), own)


def test_half_of_a_guided_call_is_nobodys(family, personal):
    """At guidance 3 the prediction is n + 3 (u - n): with the user in both halves it would be another."""
    seen = []

    def look(module, args, given):
        users = (given.get("added_cond_kwargs") or {}).get("image_embeds")
        users = given["joint_attention_kwargs"]["ip_adapter_image_embeds"] if users is None else users
        seen.append(users[0] if isinstance(users, list) else users)

    hook = denoiser_of(personal.pipe).register_forward_pre_hook(look, with_kwargs=True)
    try:
        personal(PROMPTS[:2], user=ME, **QUICK | guided(personal.pipe, 3.0, 2))
    finally:
        hook.remove()
    seen = (
        [torch.cat([seen[i + 1], seen[i]]) for i in (0, 2)] if family == "flux" else seen
    )  # there, one after the other
    assert len(seen) == 2
    for users in seen:
        assert users.shape == (4, 1, WIDTH) and not users[:2].any()
        assert torch.equal(users[2:], ME.states.expand(2, 1, -1))


def test_what_the_caller_gave_is_left_as_it_was(personal):
    given = {}
    if "joint_attention_kwargs" in inspect.signature(personal.pipe.__call__).parameters:
        personal("a cat", user=ME, joint_attention_kwargs=given, **QUICK)
    assert given == {}


def test_a_model_that_knows_its_guidance_runs_no_second_half(world):
    """Such as LCM: guidance_scale is an input of the UNet, however large."""
    pipes = [tiny_sd(), tiny_sd()]
    for pipe in pipes:
        pipe.register_modules(unet=seeded_unet())
    personal = load_user_adapter(pipes[0], world / "sd")
    options = QUICK | {"guidance_scale": 4.0}
    without = pipes[1](PROMPTS, generator=seeded(0, 1, 2), **options)
    assert same(personal(PROMPTS, generator=seeded(0, 1, 2), **options), without)
    assert not same(personal(PROMPTS, user=ME, generator=seeded(0, 1, 2), **options), without)


def seeded_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unet(cross_attention_dim=TEXT, time_cond_proj_dim=8)


# --- several users ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_several_users_in_one_call_get_what_each_gets_alone(personal, each, guidance):
    prompts, users = [*PROMPTS, "a bird"], [ME, None, YOU, ME]
    negative, seeds = ["bad", "dark", "blue", "red"], range(4 * each)
    options = QUICK | guided(personal.pipe, guidance, 4) | {"num_images_per_prompt": each}
    options.pop("negative_prompt", None)
    drawn = personal(prompts, user=users, negative_prompt=negative, generator=seeded(*seeds), **options).images
    assert drawn.shape == (4 * each, IMAGE_SIZE, IMAGE_SIZE, 3)
    for i, user in enumerate(users):
        own = slice(i * each, (i + 1) * each)
        alone = personal(prompts[i], user=user, negative_prompt=negative[i], generator=seeded(*seeds[own]), **options)
        np.testing.assert_allclose(drawn[own], alone.images, atol=1e-5)
        other = personal(prompts[i], user=embedding(9), generator=seeded(*seeds[own]), **options)
        assert abs(drawn[own] - other.images).max() > 1e-3


@pytest.mark.parametrize("kind", ["pil", "pt", "np", "latent"])
def test_every_kind_of_output_comes_back_in_order(personal, kind):
    options = {"num_inference_steps": 1, "output_type": kind, **SIZE}
    users = [ME, YOU, ME]
    drawn = personal(PROMPTS, user=users, generator=seeded(0, 1, 2), **options).images
    tuples = personal(PROMPTS, user=users, generator=seeded(0, 1, 2), return_dict=False, **options)
    assert isinstance(tuples, tuple) and len(drawn) == 3
    near = 1 if kind == "pil" else 1e-4
    for i, user in enumerate(users):
        alone = personal(PROMPTS[i], user=user, generator=seeded(i), **options).images
        assert type(alone) is type(drawn)
        for one in (drawn[i], tuples[0][i]):
            np.testing.assert_allclose(np.asarray(one) / 1.0, np.asarray(alone[0]) / 1.0, atol=near)


def test_latents_and_embedded_prompts_go_with_their_users(family, personal, base):
    """The pooled ones, too."""
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    if family == "flux":
        encoded, names = base.encode_prompt(PROMPTS, PROMPTS), [names[0], names[2]]
    else:
        prompts = [PROMPTS] * (3 if family == "sd3" else 1)
        encoded = base.encode_prompt(*prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    embeds = dict(zip(names, encoded, strict=False))
    shape = (3, 16, 16) if family == "flux" else (3, 4, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn = personal(user=[YOU, ME, YOU], latents=latents, **embeds, **QUICK).images
    for i, user in enumerate([YOU, ME, YOU]):
        alone = personal(user=user, latents=latents[i : i + 1], **{k: v[i : i + 1] for k, v in embeds.items()}, **QUICK)
        np.testing.assert_allclose(drawn[i], alone.images[0], atol=1e-5)


def test_one_generator_is_enough_for_one_user(personal):
    one = personal(PROMPTS, user=[ME, ME, ME], generator=torch.Generator().manual_seed(0), **QUICK)
    assert same(one, personal(PROMPTS, user=ME, generator=torch.Generator().manual_seed(0), **QUICK))


# --- how it is left ---------------------------------------------------------------------------------------------------


def scales(personal) -> list:
    denoiser = denoiser_of(personal.pipe)
    return [p.scale for p in FORMATS[type(denoiser).__name__].processors(denoiser).values()]


def test_the_scale_that_was_set_comes_back(personal):
    set_user_scale(denoiser_of(personal.pipe), 0.3)
    try:
        personal("a cat", user=ME, scale=0.9, **QUICK)
        assert scales(personal) and all(scale == [0.3] for scale in scales(personal))
        with pytest.raises(ValueError, match="callback"):
            personal("a cat", user=ME, scale=0.9, callback_on_step_end_tensor_inputs=["callback"], **QUICK)
        assert all(scale == [0.3] for scale in scales(personal))
    finally:
        set_user_scale(denoiser_of(personal.pipe), 1.0)


def test_lora_before_the_adapter_or_after(world):
    pipes = [tiny_sd(), tiny_sd()]
    pipes[0].load_lora_weights(str(world / "sd"))
    first = load_user_adapter(pipes[0], world / "sd")
    second = load_user_adapter(pipes[1], world / "sd")
    pipes[1].load_lora_weights(str(world / "sd"))
    drawn = [one("a cat", user=ME, generator=seeded(0), **QUICK) for one in (first, second)]
    assert same(*drawn)
    lora = tiny_sd()
    lora.load_lora_weights(str(world / "sd"))
    without = lora("a cat", generator=seeded(0), **QUICK)
    assert same(first("a cat", generator=seeded(0), **QUICK), without) and not same(drawn[0], without)


def test_half_precision(world):
    """Loaded into a bf16 pipeline the adapter is bf16, and nobody is its base; one that trains in fp32 beside it draws
    under autocast."""
    base, pipe, training = (tiny_sd().to(torch.bfloat16) for _ in range(3))
    personal = load_user_adapter(pipe, world / "sd")
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    nobody, me = (sample(personal.bound(user), PROMPTS, [1, 2, 3], **options) for user in (None, ME))
    without = sample(base, PROMPTS, [1, 2, 3], **options)
    assert all(np.array_equal(a, b) for a, b in zip(nobody, without, strict=True))
    trained(training)
    masters = PersonalizedPipeline(training, {"width": WIDTH, "sequence": False})
    drawn = sample(masters.bound(ME), PROMPTS, [1, 2, 3], **options)
    pixels = [np.asarray([np.asarray(image, dtype=float) for image in images]) for images in (drawn, me, without)]
    assert abs(pixels[0] - pixels[1]).mean() < 0.2 * abs(pixels[2] - pixels[1]).mean()


def test_sequences_of_any_length(world):
    personal = load_user_adapter(tiny_sd(), world / "sequence" / "user_adapter.safetensors")
    long, short, one = embedding(3, 5), embedding(4, 2), embedding(5, 1)
    drawn = personal([PROMPTS[0]] * 4, user=[long, short, one, None], generator=seeded(0, 0, 0, 0), **QUICK).images
    for image, user in zip(drawn, [long, short, one, None], strict=True):
        alone = personal(PROMPTS[0], user=user, generator=seeded(0), **QUICK).images[0]
        np.testing.assert_allclose(image, alone, atol=1e-5)
    assert np.array_equal(drawn[3], tiny_sd()(PROMPTS[0], generator=seeded(0), **QUICK).images[0])
    assert min(abs(drawn[i] - drawn[j]).max() for i in range(4) for j in range(i)) > 1e-4


# --- sample -----------------------------------------------------------------------------------------------------------


def test_sample_draws_a_users_pictures_with_paired_seeds(personal, base):
    """In any batches; and the pipeline is left as it was found."""
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, **SIZE}
    scheduler, mode = personal.pipe.scheduler, denoiser_of(personal.pipe).training
    mine = sample(personal.bound(ME, 0.8), PROMPTS, [5, 6, 7], batch_size=2, **options)
    assert personal.pipe.scheduler is scheduler and denoiser_of(personal.pipe).training == mode
    for image, prompt, seed in zip(mine, PROMPTS, (5, 6, 7), strict=True):
        alone = personal(prompt, user=ME, scale=0.8, generator=seeded(seed), **options).images[0]
        assert abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
    nobody = sample(personal.bound(None), PROMPTS, [5, 6, 7], **options)
    without = sample(base, PROMPTS, [5, 6, 7], **options)
    assert all(np.array_equal(a, b) for a, b in zip(nobody, without, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(mine, without, strict=True))


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "another width": ({"user": embedding(0, width=6)}, r"\(1 x 6, .*does not fit the adapter, which takes .* width 8"),
    "another encoder": (
        {"user": embedding(0, encoder="x")},
        "does not fit .*tuned with the encoder tiny: make",
    ),
    "a sequence": ({"user": embedding(0, 3)}, r"\(3 x 8, .*does not fit the adapter, which takes one vector"),
    "one of several": ({"user": [ME, embedding(0, width=6)]}, "width 8"),
    "too few users": ({"user": [ME]}, "1 users for 2 prompts: give one user, or one for each prompt"),
    "no scale": ({"user": ME, "scale": math.nan}, "scale of a user adapter must be a finite number, got nan"),
    "endless scale": ({"user": ME, "scale": -math.inf}, "must be a finite number, got -inf"),
    "one generator": ({"user": [ME, YOU], "generator": torch.Generator()}, "one generator for several users"),
    "few negatives": ({"user": [ME, YOU], "negative_prompt": ["x"]}, "negative_prompt has 1 parts, .* to be 2"),
    "many generators": ({"user": [ME, YOU], "generator": seeded(1, 2, 3)}, "generator has 3 parts, .* to be 2"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(world, case):
    personal, (given, message) = load_user_adapter(tiny_sd(), world / "sd"), MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        personal(PROMPTS[:2], **given, **QUICK)
    with pytest.raises(ValueError, match="give a prompt, a list of prompts, or prompt_embeds"):
        personal(user=ME)
    if isinstance(given["user"], type(ME)) and "scale" not in given:
        with pytest.raises(ValueError, match=message):
            personal.bound(given["user"])


def test_adapters_that_do_not_fit_or_are_not_there(world, tmp_path):
    with pytest.raises(ValueError, match="for a model of other sizes"):
        load_user_adapter(tiny_sd(), world / "sdxl")
    with pytest.raises(FileNotFoundError, match="nothing/user_adapter.safetensors|no such user adapter"):
        load_user_adapter(tiny_sd(), tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no user adapter at some/one: no file or folder here, nor"):
        load_user_adapter(tiny_sd(), "some/one")
    personal = load_user_adapter(tiny_sd(), world / "sd")
    personal.pipe.unload_ip_adapter()
    with pytest.raises(ValueError, match="no user adapter any more: load it again"):
        personal("a cat", user=ME)


def test_every_format_has_its_arguments():
    assert set(FORMATS) == set(ARGUMENTS)
