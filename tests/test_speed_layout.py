"""Channels-last layout of UNets."""

import copy

import pytest
import torch
from torch import nn
from user_cases import CASES, Case, lora

from diffpref.speed.layout import channels_last


def numbers(case: Case, layout: torch.memory_format = torch.contiguous_format) -> list[torch.Tensor]:
    """The prediction, and the gradient of its square for the LoRA."""
    case.x_t = case.x_t.contiguous(memory_format=layout)
    prediction = case.predict()
    weights = [p for p in case.denoiser.parameters() if p.requires_grad]
    return [prediction.detach(), *torch.autograd.grad(prediction.square().mean(), weights)]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_layout_changes_only_rounding(name: str) -> None:
    case = Case(*CASES[name])
    lora(case, target_modules=["to_q", "conv1"])  # a convolution's LoRA is two convolutions
    with torch.no_grad():
        for weight in (p for p in case.denoiser.parameters() if p.requires_grad):
            weight.normal_(generator=torch.Generator().manual_seed(0))  # also the half that starts as zeros
    other = copy.copy(case)
    other.denoiser = copy.deepcopy(case.denoiser)
    weights = dict(other.denoiser.named_parameters())
    layout = channels_last(other.denoiser)
    assert all(p is weights[name] for name, p in other.denoiser.named_parameters())  # an optimiser may hold them
    found, expected = numbers(other, layout), numbers(case)
    assert found[0].stride(1) == 1 and expected[0].stride(1) != 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_all_convolutions_have_it() -> None:
    case = Case(*CASES["sd"])
    lora(case, target_modules=["conv1"])
    channels_last(case.denoiser)
    convolutions = [module.weight for module in case.denoiser.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 20
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert any(not weight.is_contiguous() for weight in convolutions)  # so that the line above says something


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_are_refused(name: str) -> None:
    denoiser = Case(*CASES[name]).denoiser
    with pytest.raises(ValueError, match=f"train.channels_last: {type(denoiser).__name__} .*set it to false"):
        channels_last(denoiser)
