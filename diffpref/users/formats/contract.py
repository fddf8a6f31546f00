"""How a denoiser holds a user adapter: attention to user tokens beside the attention it has.

    Z' = Attn(Q, K, V) + scale · Attn(Q, u·W_k', u·W_v')        (IP-Adapter, arXiv 2308.06721, eq. 5)

The tokens u come of a projection of the user: linear maps without offsets, then a LayerNorm without one. A user of
zeros so has tokens of zeros, keys and values of zeros, and gets exactly the base model, whatever was trained; that
holds as long as every bias in the file is zero, and so none of them trains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]  # {"image_proj": …, "ip_adapter": …}: the names of the published files
TOKENS = 4  # that stock diffusers makes of one vector
KINDS, ENDS = ("to_k_ip", "to_v_ip"), ("weight", "bias")


def vector_projection(width: int, token: int, g: torch.Generator) -> dict[str, Tensor]:
    """One vector [U] -> 4 tokens [4,T] of about unit size, were it not for the LayerNorm: a user is a unit vector."""
    weight = torch.randn(TOKENS * token, width, generator=g) / width**0.5
    norm = {"norm.weight": torch.ones(token), "norm.bias": torch.zeros(token)}
    return {"proj.weight": weight, "proj.bias": torch.zeros(TOKENS * token)} | norm


def sequence_projection(width: int, token: int, g: torch.Generator) -> dict[str, Tensor]:
    """L vectors [L,U] -> L tokens [L,T]: of each, gelu between two linear maps, and a LayerNorm."""
    first = torch.randn(width, width, generator=g) / width**0.5
    second = torch.randn(token, width, generator=g) / width**0.5
    maps = {"proj.0.weight": first, "proj.0.bias": torch.zeros(width)}
    maps |= {"proj.2.weight": second, "proj.2.bias": torch.zeros(token)}
    return maps | {"proj.3.weight": torch.ones(token), "proj.3.bias": torch.zeros(token)}


PROJECTIONS: dict[bool, Callable[[int, int, torch.Generator], dict[str, Tensor]]] = {
    False: vector_projection,
    True: sequence_projection,
}
NAMES: dict[type[nn.Module], dict[str, str]] = {  # a projection's modules -> their names in the file
    ImageProjection: {"image_embeds": "proj", "norm": "norm"},
    IPAdapterFullImageProjection: {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"},
}


def make_projection(state: dict[str, Tensor]) -> nn.Module:
    """The stock module that a file's "image_proj" stands for, with its weights."""
    if "proj.weight" in state:
        weight = state["proj.weight"]
        module: nn.Module = ImageProjection(weight.shape[1], len(weight) // TOKENS, TOKENS)
    else:
        module = IPAdapterFullImageProjection(state["proj.0.weight"].shape[1], len(state["proj.2.weight"]))
    named = {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in NAMES[type(module)].items() for end in ENDS}
    module.load_state_dict({ours: state[theirs] for ours, theirs in named.items()})
    return module


class UserFormat(ABC):
    """sequences: whether a user may be L vectors.  offsets: whether the file's keys and values have biases (zeros).
    stock: whether diffusers loads the file by itself."""

    sequences: bool = True
    offsets: bool = False
    stock: bool = True

    @abstractmethod
    def layers(self, denoiser: Any) -> dict[str, Any]:
        """The attention modules that see the user, by their number in the file."""

    @abstractmethod
    def token(self, denoiser: Any) -> int:
        """T, width of a user token."""

    @abstractmethod
    def keys(self, denoiser: Any, layer: Any) -> Tensor:
        """W_k' [D,T] to begin with: what the layer makes of its text tokens."""

    @abstractmethod
    def processor(self, size: int, token: int) -> nn.Module:
        """An attention processor of D = `size` channels, with to_k_ip, to_v_ip and scale in lists of one."""

    @abstractmethod
    def attach(self, denoiser: Any, projection: nn.Module) -> None:
        """Put the projection where the denoiser looks for it."""

    @abstractmethod
    def projection(self, denoiser: Any) -> nn.Module:
        """What makes tokens of users, in a denoiser that has an adapter."""

    def shapes(self, denoiser: nn.Module, width: int, sequence: bool) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of an adapter's state."""
        attention: dict[str, tuple[int, ...]] = {}
        for number, layer in self.layers(denoiser).items():
            size, token = len(base_weight(layer.to_k)), self.token(denoiser)
            attention |= {f"{number}.{kind}.weight": (size, token) for kind in KINDS}
            attention |= {f"{number}.{kind}.bias": (size,) for kind in KINDS if self.offsets}
        projection = PROJECTIONS[sequence](width, self.token(denoiser), torch.Generator())
        return {"image_proj": {key: tuple(value.shape) for key, value in projection.items()}, "ip_adapter": attention}

    def start(self, denoiser: nn.Module, width: int, sequence: bool, g: torch.Generator) -> State:
        """The state in which an adapter changes nothing: W_v' = 0."""
        shapes = self.shapes(denoiser, width, sequence)["ip_adapter"]
        attention = {key: torch.zeros(shape) for key, shape in shapes.items()}
        for number, layer in self.layers(denoiser).items():
            attention[f"{number}.to_k_ip.weight"] = self.keys(denoiser, layer).detach().float().cpu().clone()
        return {"image_proj": PROJECTIONS[sequence](width, self.token(denoiser), g), "ip_adapter": attention}

    def install(self, denoiser: nn.Module, state: State, dtype: torch.dtype) -> None:
        """Give the denoiser an adapter with this state, in place of the one it may have. Nothing else of it changes:
        the loaders of diffusers cast all to one dtype, and with it the fp32 masters of a LoRA that trains beside."""
        first, attention = next(denoiser.parameters()), state["ip_adapter"]
        place, base = {"device": first.device, "dtype": dtype}, first.dtype
        with torch.random.fork_rng(devices=[]):  # modules draw weights before they are given theirs
            for number, layer in self.layers(denoiser).items():
                processor = self.processor(*attention[f"{number}.to_k_ip.weight"].shape)
                ends = ENDS if self.offsets else ENDS[:1]
                named = {f"{kind}.0.{end}": f"{number}.{kind}.{end}" for kind in KINDS for end in ends}
                processor.load_state_dict({ours: attention[theirs] for ours, theirs in named.items()})
                layer.set_processor(processor.to(**place))
            self.attach(denoiser, make_projection(state["image_proj"]).to(**place))
        if dtype != base:
            self.join(denoiser, base)

    def join(self, denoiser: nn.Module, base: torch.dtype) -> None:
        """Let masters of one dtype work in a base of another one also where no autocast is on, as peft's do."""
        for processor in self.processors(denoiser).values():
            for kind in KINDS:
                getattr(processor, kind)[0].register_forward_hook(partial(give, dtype=base))
        self.projection(denoiser).register_forward_pre_hook(take)

    def processors(self, denoiser: nn.Module) -> dict[str, Any]:
        """The processors that hold an adapter, by the number of their layer; none where there is no adapter."""
        found = {number: layer.processor for number, layer in self.layers(denoiser).items()}
        return {number: processor for number, processor in found.items() if hasattr(processor, "to_k_ip")}

    def modules(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The adapter's modules that have parameters, by their names in the file."""
        found: dict[str, nn.Module] = {}
        for number, processor in self.processors(denoiser).items():
            found |= {f"ip_adapter.{number}.{kind}": getattr(processor, kind)[0] for kind in KINDS}
        if found:
            projection = self.projection(denoiser)
            named = NAMES[type(projection)]
            found |= {f"image_proj.{theirs}": projection.get_submodule(ours) for ours, theirs in named.items()}
        return found

    def parameters(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the file."""
        found = self.modules(denoiser).items()
        return {f"{name}.{end}": p for name, module in found for end, p in module.named_parameters()}


def give(module: nn.Module, given: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    """What a module makes, in another dtype."""
    return output.to(dtype)


def take(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a module is given, in its own dtype."""
    return tuple(x.to(next(module.parameters()).dtype) for x in given)


def base_weight(layer: Any) -> Tensor:
    """A linear map's own weight, also where a LoRA is around it."""
    return getattr(layer, "base_layer", layer).weight


def attach_for_stock(denoiser: Any, projection: nn.Module) -> None:
    """As the loaders of diffusers attach it to UNets and FLUX."""
    denoiser.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    denoiser.config.encoder_hid_dim_type = "ip_image_proj"
