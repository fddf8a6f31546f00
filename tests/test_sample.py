"""Pictures depend on prompt, seed and weights; on nothing else."""

import copy

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_sd, tiny_sd3, tiny_sdxl

from diffpref.sample import decoding_outside_autocast, sample

PIPELINES = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd("v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3-without-t5": lambda: tiny_sd3(t5=False),
}
STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}
PROMPTS, SEEDS = ["red cat", "dog", "", "red cat", "tree, flat"], [5, 6, 7, 8, 5]


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_picture_does_not_depend_on_its_batch_and_order_is_kept(pipe):
    together = pixels(sample(pipe, PROMPTS, SEEDS, batch_size=5, **STEPS))
    assert together.shape == (5, 32, 32, 3)
    assert abs(pixels(sample(pipe, PROMPTS, SEEDS, batch_size=2, **STEPS)) - together).max() <= 1
    alone = pixels(sample(pipe, PROMPTS[3:4], SEEDS[3:4], **STEPS))
    assert abs(alone - together[3:4]).max() <= 1
    backwards = pixels(sample(pipe, PROMPTS[::-1], SEEDS[::-1], batch_size=3, **STEPS))
    assert abs(backwards[::-1] - together).max() <= 1


def test_prompt_and_seed_matter(pipe):
    same, reseeded, reworded = pixels(sample(pipe, ["red cat", "red cat", "blue dog"], [5, 6, 5], **STEPS))
    assert abs(same - reseeded).max() > 10
    assert abs(same - reworded).max() >= 1


def test_it_makes_what_the_stock_call_makes(pipe):
    ours = pixels(sample(pipe, ["red cat"], [5], **STEPS))
    stock = pipe("red cat", generator=torch.Generator().manual_seed(5), **STEPS).images
    assert abs(ours - pixels(stock)).max() <= 1


def test_the_pipeline_is_left_as_it_was_found():
    pipe = tiny_sd3()
    pipe.transformer.train()
    pipe.transformer.pos_embed.eval()
    pipe.set_progress_bar_config(leave=False)
    scheduler, timesteps = pipe.scheduler, pipe.scheduler.timesteps.clone()
    before = [m.training for m in pipe.transformer.modules()]
    sample(pipe, ["cat"], [1], **STEPS)
    with pytest.raises(ValueError, match="divisible"):
        sample(pipe, ["cat"], [1], height=13, width=32, **STEPS)
    assert [m.training for m in pipe.transformer.modules()] == before
    assert pipe.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert pipe._progress_bar_config == {"leave": False}


def test_training_mode_does_not_show_in_the_picture():
    pipe = tiny_sd()
    expected = pixels(sample(pipe, ["cat"], [1], **STEPS))
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    pipe.unet.train()
    assert (pixels(sample(pipe, ["cat"], [1], **STEPS)) == expected).all()


def test_fp32_masters_beside_bf16_parts():
    pipe = tiny_sd()
    expected = pixels(sample(pipe, ["cat"], [1], **STEPS))
    mixed = tiny_sd().to(torch.bfloat16)
    mixed.unet.load_state_dict(copy.deepcopy(pipe.unet).state_dict())
    mixed.unet.float()
    made = pixels(sample(mixed, ["cat"], [1], **STEPS))
    assert abs(made - expected).mean() < 8


def test_size_and_progress(capsys):
    (image,) = sample(tiny_sd(), ["cat"], [1], height=16, width=24, progress="validation", **STEPS)
    assert image.size == (24, 16)
    assert "validation" in capsys.readouterr().err


def test_nothing_asked_nothing_made():
    assert sample(tiny_sd(), [], [], **STEPS) == []


def test_clear_errors():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample(pipe, ["a", "b"], [1], **STEPS)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        sample(pipe, ["a"], [1], batch_size=0, **STEPS)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="learning rate"):
        sample(pipe, ["a"], [1], **STEPS)


def test_a_vae_that_overflows_in_fp16_is_decoded_in_its_pipelines_precision():
    """SDXL's pipeline turns such a VAE to fp32 before it decodes; autocast must not undo that."""
    pipe = tiny_sdxl()
    pipe.vae.half()
    with torch.autocast("cpu", dtype=torch.float16), decoding_outside_autocast(pipe):
        pipe.vae.float()
        inside = pipe.vae.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float16), return_dict=False)[0]
    assert inside.dtype == torch.float32 and "decode" not in vars(pipe.vae)
