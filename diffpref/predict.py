"""Policy and reference predictions of one denoiser."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpref.batch import USERS, Conditioning
from diffpref.families import Family
from diffpref.speed.toggle import lora_off, trained_lora
from diffpref.users.adapter import has_user_adapter, user_adapter_off

Reference = Callable[[], AbstractContextManager[nn.Module]]  # a context in which the yielded module is the reference


def adapter_off(denoiser: nn.Module) -> Reference:
    """The policy itself with its adapters off, a LoRA and one of users: no second copy in memory. Right while the base
    weights are frozen. It knows no users, whoever it is asked for. Both must be there when this is called."""
    layers = trained_lora(denoiser)
    users_off = user_adapter_off if has_user_adapter(denoiser) else nullcontext

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        with lora_off(layers), users_off(denoiser):
            yield denoiser

    return reference


def frozen_copy(denoiser: nn.Module) -> Reference:
    """A copy of the weights as they are now, in the policy's own precision."""
    frozen = copy.deepcopy(denoiser).requires_grad_(False)

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        yield frozen

    return reference


def others(reference: Reference | None, denoiser: nn.Module) -> list[nn.Module]:
    """The reference, where it is a model of its own."""
    if reference is None:
        return []
    with reference() as model:
        return [] if model is denoiser else [model]


REFERENCES: dict[str, Callable[[nn.Module], Reference]] = {"adapter_off": adapter_off, "frozen_copy": frozen_copy}


@dataclass(frozen=True)
class Models:
    """Policy and reference, called alike: (x_t [N,C,h,w], t [N], conditioning) -> prediction [N,C,h,w].

    family: Of the pipeline.  denoiser: The policy, as the engine prepared it.  base: The reference; None where nothing
    asks for one.  dtype: Of the denoiser's inputs.  autocast: The engine's context.  users: Makes users of what is
    known of them; None where nobody is asked.  layout: Of x_t in memory.
    """

    family: Family
    denoiser: nn.Module
    base: Reference | None
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]
    users: nn.Module | None = None
    layout: torch.memory_format = torch.preserve_format

    def policy(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """With graph, unless the caller forbids one."""
        with self.autocast():
            return self.denoise(self.denoiser, x_t, t, conditioning)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Without graph."""
        assert self.base is not None, "nothing in this run was said to ask for a reference"
        with self.base() as model, self.autocast():
            return self.denoise(model, x_t, t, conditioning)

    def denoise(self, model: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Every input in the denoiser's own precision."""
        known = {k.removeprefix(USERS): v for k, v in conditioning.items() if k.startswith(USERS)}
        c = {k: v for k, v in conditioning.items() if not k.startswith(USERS)}
        if self.users is not None:
            c["user"] = self.users(known)
        c = {key: value.to(self.dtype) for key, value in c.items()}
        return self.family.denoise(model, x_t.to(self.dtype, memory_format=self.layout), t, c)
