"""How a denoiser holds a user adapter: attention to user tokens beside the attention it has.

    Z' = Attn(Q, K, V) + scale · Attn(Q, u·W_k', u·W_v')        (IP-Adapter, arXiv 2308.06721, eq. 5)

The tokens u come of a projection of the user: linear maps without offsets, then a LayerNorm without one. A user of
zeros so has tokens of zeros, keys and values of zeros, and gets exactly the base model, whatever was trained; that
holds as long as every bias in the file is zero, and so none of them trains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]  # {"image_proj": …, "ip_adapter": …}: the names of the published files
TOKENS = 4  # that stock diffusers makes of one vector


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


class UserFormat(ABC):
    """sequences: whether a user may be L vectors.  offsets: whether the file's keys and values have biases (zeros).
    stock: whether diffusers loads the file by itself."""

    sequences: bool = True
    offsets: bool = False
    stock: bool = True

    @abstractmethod
    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The attention modules that see the user, by their number in the file."""

    @abstractmethod
    def token(self, denoiser: nn.Module) -> int:
        """T, width of a user token."""

    @abstractmethod
    def keys(self, denoiser: nn.Module, layer: nn.Module) -> Tensor:
        """W_k' [D,T] to begin with: what the layer makes of its text tokens."""

    @abstractmethod
    def install(self, denoiser: nn.Module, state: State, dtype: torch.dtype) -> None:
        """Give the denoiser an adapter with this state, in place of the one it may have."""

    @abstractmethod
    def projection(self, denoiser: nn.Module) -> nn.Module:
        """What makes tokens of users, in a denoiser that has an adapter."""

    def start(self, denoiser: nn.Module, width: int, sequence: bool, g: torch.Generator) -> State:
        """The state in which an adapter changes nothing: W_v' = 0."""
        attention: dict[str, Tensor] = {}
        for number, layer in self.layers(denoiser).items():
            weight = self.keys(denoiser, layer).detach().float().cpu()
            attention[f"{number}.to_k_ip.weight"] = weight.clone()
            attention[f"{number}.to_v_ip.weight"] = torch.zeros_like(weight)
            if self.offsets:
                attention |= {f"{number}.to_{kind}_ip.bias": torch.zeros(len(weight)) for kind in "kv"}
        return {"image_proj": PROJECTIONS[sequence](width, self.token(denoiser), g), "ip_adapter": attention}

    def processors(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The processors that hold an adapter, by the number of their layer; none where there is no adapter."""
        found = {number: layer.processor for number, layer in self.layers(denoiser).items()}
        return {number: processor for number, processor in found.items() if hasattr(processor, "to_k_ip")}

    def parameters(self, denoiser: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the file, "image_proj.…" and "ip_adapter.…"."""
        found: dict[str, nn.Parameter] = {}
        for number, processor in self.processors(denoiser).items():
            for kind in ("to_k_ip", "to_v_ip"):
                for name, parameter in getattr(processor, kind)[0].named_parameters():
                    found[f"ip_adapter.{number}.{kind}.{name}"] = parameter
        projection = self.projection(denoiser)
        for module, named in NAMES[type(projection)].items():
            for name, parameter in projection.get_submodule(module).named_parameters():
                found[f"image_proj.{named}.{name}"] = parameter
        return found


def base_weight(layer: nn.Module) -> Tensor:
    """A linear map's own weight, also where a LoRA is around it."""
    return getattr(layer, "base_layer", layer).weight


class StockFormat(UserFormat):
    """A format that diffusers installs itself. Its own loader would also cast the whole denoiser to one dtype, and
    with it the fp32 masters of a LoRA that trains beside the adapter; so the two halves are called here instead."""

    def install(self, denoiser: nn.Module, state: State, dtype: torch.dtype) -> None:
        place = {"device": next(denoiser.parameters()).device, "dtype": dtype}
        with torch.random.fork_rng(devices=[]):  # modules draw weights before they are given theirs
            denoiser.encoder_hid_proj = None  # its own attention processors, if it has any, are not the denoiser's
            processors = denoiser._convert_ip_adapter_attn_to_diffusers([state], low_cpu_mem_usage=False)
            projection = denoiser._convert_ip_adapter_image_proj_to_diffusers(
                state["image_proj"], low_cpu_mem_usage=False
            )
        for processor in processors.values():
            if isinstance(processor, nn.Module):
                processor.to(**place)
        denoiser.set_attn_processor(processors)
        denoiser.encoder_hid_proj = MultiIPAdapterImageProjection([projection]).to(**place)
        denoiser.config.encoder_hid_dim_type = "ip_image_proj"

    def projection(self, denoiser: nn.Module) -> nn.Module:
        return denoiser.encoder_hid_proj.image_projection_layers[0]
