"""Policy and reference predictions of one denoiser."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from diffpref.batch import Encoded, Noised
from diffpref.families import Family

Reference = Callable[[], AbstractContextManager[nn.Module]]  # a context in which the yielded module is the reference


def adapter_off(denoiser: nn.Module) -> Reference:
    """The policy itself with its adapter off: no second copy in memory. Right while the base weights are frozen."""

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        denoiser.disable_adapters()
        try:
            yield denoiser
        finally:  # also after an exception: a policy left without its adapter would go on training nothing
            denoiser.enable_adapters()

    return reference


def frozen_copy(denoiser: nn.Module) -> Reference:
    """A copy of the weights as they are now, in the policy's own precision."""
    frozen = copy.deepcopy(denoiser).requires_grad_(False)

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        yield frozen

    return reference


REFERENCES: dict[str, Callable[[nn.Module], Reference]] = {"adapter_off": adapter_off, "frozen_copy": frozen_copy}


def denoise(family: Family, denoiser: nn.Module, noised: Noised, encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """Prediction [N,C,h,w] with every input in the denoiser's own precision."""
    conditioning = {key: value.to(dtype) for key, value in encoded.conditioning.items()}
    return family.denoise(denoiser, noised.x_t.to(dtype), noised.t, conditioning)


def predict(
    family: Family, policy: nn.Module, reference: Reference | None, noised: Noised, encoded: Encoded, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(policy prediction with graph, reference prediction without, or None), both by the same path.

    The reference goes first, while no activations are held.
    """
    base = None
    if reference is not None:
        with torch.no_grad(), reference() as model:
            base = denoise(family, model, noised, encoded, dtype)
    return denoise(family, policy, noised, encoded, dtype), base
