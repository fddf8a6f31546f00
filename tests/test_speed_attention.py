"""Which kernel computes attention: of one model, forward and backward, and nothing else of the process."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from user_cases import CASES, Case, lora

from diffpref.speed.attention import attentions, choose_attention, dispatches
from diffpref.users.adapter import train_user_adapter

FLASH = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
PLAIN = {"_safe_softmax", "_softmax_backward_data"}


@pytest.fixture(scope="module", params=["sd", "sd3", "flux"])
def case(request) -> Case:
    made = Case(*CASES[request.param])
    lora(made)
    return made


def fresh(case: Case) -> Case:
    """The same case around a denoiser of its own."""
    other = copy.copy(case)
    other.denoiser = copy.deepcopy(case.denoiser)
    return other


def gradients(case: Case, users: Tensor | None = None) -> list[Tensor]:
    """The prediction, and the gradient of its square for all that trains."""
    prediction = case.predict(users)
    weights = [p for p in case.denoiser.parameters() if p.requires_grad]
    return [prediction.detach(), *torch.autograd.grad(prediction.square().mean(), weights)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Kernels(TorchDispatchMode):
    """Notes the kernels of attention that are called; torch's plain one is seen by its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name or "softmax" in name:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def kernels(case: Case, around, users: Tensor | None = None) -> set[str]:
    """The kernels that a forward and a backward pass call, where the plain one is the rule."""
    with sdpa_kernel(SDPBackend.MATH), around(), Kernels() as kernels:
        gradients(case, users)
    return kernels.seen


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_torchs_choice_changes_no_bit(case: Case, name: str) -> None:
    other = fresh(case)
    with choose_attention(other.denoiser, name, "cpu")():
        found = gradients(other)
    assert same(found, gradients(case))


def test_a_kernel_is_taken_forward_and_backward(case: Case) -> None:
    other = fresh(case)
    around = choose_attention(other.denoiser, "flash", "cpu")
    assert kernels(other, around) == FLASH
    assert kernels(other, choose_attention(other.denoiser, "sdpa", "cpu")) == PLAIN  # what the kernels above replaced


def test_a_kernel_changes_only_rounding(case: Case) -> None:
    other = fresh(case)
    with choose_attention(other.denoiser, "flash", "cpu")():
        flash = gradients(other)
    with sdpa_kernel(SDPBackend.MATH):
        math = gradients(case)
    for a, b in zip(flash, math, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_passes_that_are_run_again_take_the_kernel_too(case: Case) -> None:
    other = fresh(case)
    other.denoiser.train().enable_gradient_checkpointing()
    assert kernels(other, choose_attention(other.denoiser, "flash", "cpu")) == FLASH


def test_layers_that_see_a_user_take_the_kernel_too(case: Case) -> None:
    other = fresh(case).add()
    train_user_adapter(other.denoiser)
    assert kernels(other, choose_attention(other.denoiser, "flash", "cpu"), case.users) == FLASH


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_nothing_else_of_the_process_changes(case: Case, name: str) -> None:
    table, order, before = _AttentionBackendRegistry._active_backend, state(), gradients(case)
    other = fresh(case)
    with choose_attention(other.denoiser, name, "cpu")():
        gradients(other)
    with pytest.raises(KeyError), choose_attention(other.denoiser, name, "cpu")():
        raise KeyError
    assert _AttentionBackendRegistry._active_backend is table and state() == order
    assert same(gradients(case), before)
    assert all(layer.processor._attention_backend is None for layer in attentions(case.denoiser) if dispatches(layer))


def state() -> list:
    return _cur_sdpa_kernel_backends(with_priority=True)


def test_layers_that_ask_the_table_are_told_each(case: Case) -> None:
    """A model that someone else has switched the whole process for still computes as it was told."""
    other, before = fresh(case), _AttentionBackendRegistry._active_backend
    around = choose_attention(other.denoiser, "flash", "cpu")
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.XFORMERS)  # fails on a CPU
    try:
        assert kernels(other, around) == FLASH
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what cannot be had without a GPU")
@pytest.mark.parametrize("name", ["cudnn", "xformers"])
def test_what_cannot_run_is_refused_before_anything_changes(case: Case, name: str) -> None:
    other = fresh(case)
    before = {layer: (layer.processor, vars(layer.processor).copy()) for layer in attentions(other.denoiser)}
    with pytest.raises(ValueError, match=rf"model.attention: {name} cannot run here \(.* on cpu: .*\); .*take auto"):
        choose_attention(other.denoiser, name, "cpu")
    assert before == {layer: (layer.processor, vars(layer.processor)) for layer in attentions(other.denoiser)}


def test_xformers_names_layers_it_cannot_take() -> None:
    case = Case(*CASES["sd"]).add()
    with pytest.raises(ValueError, match="xformers has no counterpart of IPAdapterAttnProcessor2_0.* take auto"):
        choose_attention(case.denoiser, "xformers", "cpu")


def test_layers_with_attention_of_their_own_are_named() -> None:
    case = Case(*CASES["sd"])
    case.denoiser.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="flash cannot be had, AttnProcessor does not leave attention to torch"):
        choose_attention(case.denoiser, "flash", "cpu")


def test_a_shape_the_probe_did_not_foresee_is_named() -> None:
    case = Case(*CASES["sd"])
    around, q = choose_attention(case.denoiser, "flash", "cpu"), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="model.attention: flash cannot run here .No available kernel.*take auto"):
        with around():  # torch's kernel for CPUs takes no dropout
            torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
