"""LoRA switched off by a flag, and LoRA that computes in the base's precision."""

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import tiny_sd
from tiny_runs import make_world, run
from torch import Tensor

from diffpref.adapters import add_lora, lora_state_dict
from diffpref.config import LoopConfig, LoraSettings
from diffpref.families import family_of
from diffpref.optimizers import make_optimizer
from diffpref.speed.casting import CastLinear, casting_once, compute_in_input_dtype
from diffpref.speed.toggle import lora_off, trained_lora


def unet(**settings) -> UNet2DConditionModel:
    """A tiny UNet with a LoRA that does something."""
    pipe = tiny_sd()
    add_lora(pipe.unet, family_of(pipe), LoraSettings(rank=4, **settings), 0)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return pipe.unet


def half_unet() -> UNet2DConditionModel:
    """The same on a bf16 base; its own weights are fp32, as they are in training."""
    model = unet().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return model


def inputs(model: UNet2DConditionModel, n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    width = model.config["cross_attention_dim"]
    x, text = torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 5, width, generator=g)
    return x.to(dtype), torch.arange(n) * 300, text.to(dtype)


def test_the_flag_is_what_diffusers_does():
    model = unet()
    on = model(*inputs(model)).sample
    with lora_off(trained_lora(model)):
        flagged = model(*inputs(model)).sample
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    model.disable_adapters()
    public = model(*inputs(model)).sample
    model.enable_adapters()
    assert torch.equal(flagged, public) and not torch.equal(flagged, on)
    assert torch.equal(model(*inputs(model)).sample, on)


def test_a_frozen_lora_stays_on():
    model = unet()
    on = model(*inputs(model)).sample
    model.requires_grad_(False)
    with lora_off(trained_lora(model)):
        assert torch.equal(model(*inputs(model)).sample, on)


def test_on_again_after_an_exception():
    model = unet()
    on = model(*inputs(model)).sample
    with pytest.raises(RuntimeError, match="inside"), lora_off(trained_lora(model)):
        raise RuntimeError("inside")
    assert torch.equal(model(*inputs(model)).sample, on)


def gradients(model: UNet2DConditionModel, dtype: torch.dtype, passes: int = 1) -> dict[str, Tensor]:
    """Of a sum of squares, accumulated over passes."""
    for _ in range(passes):
        model(*inputs(model, dtype=dtype)).sample.float().square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    x, y = (torch.cat([g[name].double().flatten() for name in sorted(g)]) for g in (a, b))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def test_in_fp32_nothing_changes():
    model = unet()
    before, grads = model(*inputs(model)).sample, gradients(model, torch.float32)
    compute_in_input_dtype(model)
    assert torch.equal(model(*inputs(model)).sample, before)
    now = gradients(model, torch.float32)
    assert all(torch.equal(now[name], grads[name]) for name in grads)


def test_in_bf16_it_differs_by_rounding_and_gradients_are_fp32():
    model = half_unet()
    exact = copy.deepcopy(model).float()
    names = lora_state_dict(model).keys()
    plain, plain_grads = model(*inputs(model, dtype=torch.bfloat16)).sample, gradients(model, torch.bfloat16)
    compute_in_input_dtype(model)
    assert lora_state_dict(model).keys() == names, "files have the same names"
    cast = model(*inputs(model, dtype=torch.bfloat16)).sample
    assert cast.dtype == torch.bfloat16
    right = exact(*inputs(model)).sample
    assert (cast.float() - right).norm() < 2 * (plain.float() - right).norm()
    grads = gradients(model, torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert cosine(grads, gradients(exact, torch.float32)) > 0.99 and cosine(grads, plain_grads) > 0.99


def test_passes_of_one_step_share_a_cast_and_sum_in_fp32():
    model = half_unet()
    layers = compute_in_input_dtype(model)
    once = gradients(model, torch.bfloat16)
    with casting_once(layers):
        twice = gradients(model, torch.bfloat16, passes=2)
        assert all(list(layer.kept) == [(torch.bfloat16, True)] for layer in layers), "one cast for both passes"
        with torch.no_grad():
            model(*inputs(model, dtype=torch.bfloat16))
        assert not layers[0].kept[torch.bfloat16, False].requires_grad
    assert all(torch.equal(twice[name], 2 * once[name]) for name in once)
    assert all(layer.kept is None for layer in layers)


def test_what_an_optimiser_changed_is_computed_with():
    """A fused one changes weights without their version; so does what loads checkpoints."""
    model = half_unet()
    layers = compute_in_input_dtype(model)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], LoopConfig(learning_rate=0.1))
    drawn = []
    for _ in range(3):
        with casting_once(layers):
            drawn.append(model(*inputs(model, dtype=torch.bfloat16)).sample)
            drawn[-1].float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_half_precision_run_learns(tmp_path, family):
    world = make_world(tmp_path, (family,))
    model = {"pretrained_model_name_or_path": str(world / family), "dtype": "bfloat16"}
    _, lines, _ = run(world, "half", family, model=model, sample={"prompts": []})
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and len(set(losses)) == len(losses)


def test_dora_is_left_alone():
    model = unet(use_dora=True)
    compute_in_input_dtype(model)
    assert not any(isinstance(m, CastLinear) for m in model.modules())
