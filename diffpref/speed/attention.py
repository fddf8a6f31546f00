"""Which kernel computes the denoiser's attention: of this model only, and only where it was tried first.

Every attention of a step must go through the chosen kernel, forward and backward: with gradient checkpointing the
forward pass is run again inside the backward one. So the choice is a context that stands around both, and outside of it
nothing of torch's or diffusers' settings has changed. `set_attention_backend` of diffusers is not used: it does nothing
on UNets and SD3, whose layers call torch by themselves, and it switches every other model of the process as well.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffpref.users.adapter import has_user_adapter
from diffpref.users.formats.contract import TOKENS

Around = Callable[[], AbstractContextManager]  # a context for forward and backward passes
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [N,H,L,D] -> [N,H,L,D]

HOPPER = 9  # major number of its compute capability
QUERIES, KEYS = 64, (64, 77)  # the probe's: a picture's places look at themselves, and at a prompt of CLIP's length
PREFERENCE = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
NO_KERNEL = ("No available kernel", "No viable backend")  # torch's words on a GPU and on a CPU
MENDS = {
    "cudnn": "it wants a CUDA device and a denoiser that computes in bf16 or fp16 (model.dtype, train.mixed_precision);"
    " or take auto, which prefers cuDNN where it runs",
    "flash": "on a CUDA device it wants a denoiser that computes in bf16 or fp16 (model.dtype, train.mixed_precision);"
    " or take auto",
    "xformers": "it wants a CUDA device and pip install 'diffpref[xformers]'; or take auto",
}


@dataclass(frozen=True)
class Place:
    """Where attention is computed. autocast: the context of the denoiser's forward pass."""

    device: torch.device
    dtype: torch.dtype
    autocast: Around


def choose_attention(
    denoiser: nn.Module,
    name: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    autocast: Around = nullcontext,
) -> Around:
    """Prepare a denoiser for a kernel; its steps must then run, forward and backward, in the context that is returned.

    Args:
        denoiser: With its adapters.
        name: auto (torch's choice; on Hopper cuDNN first, where it runs), sdpa, cudnn, flash, xformers.
        device: Where it computes.
        dtype: Of its inputs; its weights' if not given.
        autocast: The context of its forward pass.

    Raises ValueError for a kernel that cannot run here, before anything has changed.
    """
    place = Place(torch.device(device), dtype or next(denoiser.parameters()).dtype, autocast)
    return CHOICES[name](denoiser, place)


# --- the choices ------------------------------------------------------------------------------------------------------


def automatic(denoiser: nn.Module, place: Place) -> Around:
    """torch's choice, except on Hopper, where it takes cuDNN last in some versions."""
    hopper = place.device.type == "cuda" and torch.cuda.get_device_capability(place.device)[0] == HOPPER
    if not hopper or refusal(denoiser, place, partial(attend_by, [SDPBackend.CUDNN_ATTENTION])):
        return nullcontext
    return partial(sdpa_kernel, PREFERENCE, set_priority=True)


def torchs_own(denoiser: nn.Module, place: Place) -> Around:
    """torch's choice, whatever diffusers was told for the rest of the process."""
    check_calls_torch(denoiser, "sdpa")
    pin(denoiser, AttentionBackendName.NATIVE)
    return nullcontext


def only(name: str, kernel: SDPBackend, denoiser: nn.Module, place: Place) -> Around:
    """One of torch's kernels, and no other. Raises ValueError where it cannot be had."""
    check_calls_torch(denoiser, name)
    refuse(name, refusal(denoiser, place, partial(attend_by, [kernel])))
    pin(denoiser, AttentionBackendName.NATIVE)

    @contextmanager
    def around() -> Iterator[None]:
        with sdpa_kernel([kernel]):
            try:
                yield
            except RuntimeError as error:  # a shape that the probe did not foresee; torch does not say who asked
                if str(error).startswith(NO_KERNEL):
                    refuse(name, in_short(error))
                raise

    return around


def xformers(denoiser: nn.Module, place: Place) -> Around:
    """xformers' kernels, by diffusers' own processors. Raises ValueError where they cannot be had."""
    legacy = [layer for layer in attentions(denoiser) if not dispatches(layer)]
    for layer in legacy:
        if type(layer.processor) not in XFORMERS:
            kind = type(layer.processor).__name__
            raise ValueError(
                f"model.attention: xformers has no counterpart of {kind} (the layers of a user adapter, for one);"
                " take auto"
            )
    refuse("xformers", refusal(denoiser, place, attend_by_xformers))
    pin(denoiser, AttentionBackendName.XFORMERS)
    for layer in legacy:
        layer.set_processor(XFORMERS[type(layer.processor)]())
    return nullcontext


CHOICES: dict[str, Callable[[nn.Module, Place], Around]] = {
    "auto": automatic,
    "sdpa": torchs_own,
    "cudnn": partial(only, "cudnn", SDPBackend.CUDNN_ATTENTION),
    "flash": partial(only, "flash", SDPBackend.FLASH_ATTENTION),
    "xformers": xformers,
}
XFORMERS = {AttnProcessor2_0: XFormersAttnProcessor, JointAttnProcessor2_0: XFormersJointAttnProcessor}


# --- the layers -------------------------------------------------------------------------------------------------------


def attentions(denoiser: nn.Module) -> list:
    """The attention layers."""
    return [module for module in denoiser.modules() if hasattr(module, "processor") and hasattr(module, "heads")]


def dispatches(layer: Attention) -> bool:
    """Whether a layer asks diffusers' table of backends who computes; the others call torch by themselves."""
    return hasattr(layer.processor, "_attention_backend")


def check_calls_torch(denoiser: nn.Module, name: str) -> None:
    """Raise ValueError for layers that compute attention in their own way: no setting of torch's reaches them."""
    for layer in attentions(denoiser):
        own = type(layer.processor)
        if not dispatches(layer) and not any(kind.__name__.endswith("2_0") for kind in own.__mro__):
            raise ValueError(
                f"model.attention: {name} cannot be had, {own.__name__} does not leave attention to torch; take auto"
            )


def pin(denoiser: nn.Module, backend: AttentionBackendName) -> None:
    """Tell each layer that would ask diffusers' table, which is the whole process's, whom to take."""
    for layer in attentions(denoiser):
        if dispatches(layer):
            layer.processor._attention_backend = backend


def head_sizes(denoiser: nn.Module) -> list[int]:
    """Numbers D of a head, each once."""
    return sorted({layer.inner_dim // layer.heads for layer in attentions(denoiser)})


# --- the probe --------------------------------------------------------------------------------------------------------


def refuse(name: str, reason: str | None) -> None:
    """Raise ValueError if there is a reason."""
    if reason:
        raise ValueError(f"model.attention: {name} cannot run here ({reason}); {MENDS[name]}")


def refusal(denoiser: nn.Module, place: Place, kernel: Kernel) -> str | None:
    """Why a kernel cannot compute this denoiser's attention, forward or backward; None if it can."""
    keys = (*KEYS, TOKENS) if has_user_adapter(denoiser) else KEYS
    for size, length in ((size, length) for size in head_sizes(denoiser) for length in keys):
        reason = failure(place, kernel, size, length)
        if reason:
            return f"{length} keys, heads of {size}, {place.dtype} on {place.device.type}: {reason}"
    return None


def failure(place: Place, kernel: Kernel, size: int, length: int) -> str | None:
    """Why a kernel fails on a layer of two heads; None if it does not. torch gives its reasons as warnings."""
    q, k, v = (
        torch.ones(1, n, 2, size, device=place.device, dtype=place.dtype).transpose(1, 2).requires_grad_()
        for n in (QUERIES, length, length)
    )
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            with place.autocast():
                result = kernel(q, k, v)
            gradients = torch.autograd.grad(result.float().sum(), (q, k, v))
        except (RuntimeError, ValueError, ImportError) as error:
            said = [error, *(remark.message for remark in remarks)]
            return "; ".join(in_short(words) for words in said)
    finite = all(bool(x.isfinite().all()) for x in (result, *gradients))
    return None if finite else "its results are no numbers"


def in_short(words: object) -> str:
    """The first line of what torch says."""
    return str(words).strip().split("\n")[0].split(" (Triggered")[0].rstrip(".: ")


def attend_by(kernels: list[SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By one of these kernels of torch's."""
    with sdpa_kernel(kernels):
        return scaled_dot_product_attention(q, k, v)


def attend_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the kernel that xformers finds."""
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ImportError("xformers is not installed") from error
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
