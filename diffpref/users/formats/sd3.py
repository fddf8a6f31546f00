"""Stable Diffusion 3: attention to the user beside every attention of the transformer.

diffusers has an IP-adapter for SD3, and it cannot hold ours: its processor attends over the picture's own keys and the
user's at once, and adds that beside the joint attention. With user values of zero it still adds the picture's
self-attention a second time. Neither would an adapter start as the identity, nor would a user of zeros get the base
model. So the processor here attends over the user alone, as in a UNet, and only diffpref loads the file. The stock
pipeline then draws with it: pipe(…, ip_adapter_image_embeds=users), [2N,1,U] with guidance, null users first.
"""

from typing import Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffpref.users.formats.contract import UserFormat, base_weight

PROCESSOR = ".processor"


class UserAttention(JointAttnProcessor2_0, nn.Module):
    """The stock joint attention, and attention to user tokens whose result is added to that of the picture's."""

    def __init__(self, size: int, token: int):
        nn.Module.__init__(self)
        self.scale = [1.0]
        self.to_k_ip = nn.ModuleList([nn.Linear(token, size, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(token, size, bias=False)])

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        """Names and order as the transformer passes them; the user's tokens [N,L,T] are ip_hidden_states."""
        whole = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        if ip_hidden_states is None or self.scale[0] == 0:
            return whole
        picture, *text = whole if isinstance(whole, tuple) else (whole,)
        picture = picture + self.scale[0] * self.attend(attn, hidden_states, ip_hidden_states)
        return (picture, *text) if text else picture

    def attend(self, attn: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Attn(Q, u·W_k', u·W_v') [N,P,D] of the picture's P places, with the layer's own queries and norms."""
        query, key, value = attn.to_q(hidden), self.to_k_ip[0](tokens), self.to_v_ip[0](tokens)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        norm_key = getattr(attn, "norm_added_k", None) or attn.norm_k
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if norm_key is None else norm_key(key)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class UserTokens(MultiIPAdapterImageProjection):
    """Users [N,1,U] or [N,1,L,U] -> tokens [N,L',T], and no embedding of time, as the transformer calls it."""

    def forward(self, users: Tensor, timestep: Tensor | None = None) -> tuple[Tensor, None]:  # pyright: ignore
        return super().forward([users])[0].flatten(1, 2), None


class SD3Format(UserFormat):
    """One vector (four tokens), or L vectors (a token each). Layers count 0, 1, 2, …"""

    stock = False

    def layers(self, denoiser: Any) -> dict[str, Any]:
        """All: the second attention of some blocks of SD3.5 is told of users anyway."""
        names = enumerate(denoiser.attn_processors)
        return {str(i): denoiser.get_submodule(name.removesuffix(PROCESSOR)) for i, name in names}

    def token(self, denoiser: Any) -> int:
        return denoiser.inner_dim

    def keys(self, denoiser: Any, layer: Any) -> Tensor:
        """The layer's map for text, or for the picture where it sees no text."""
        return base_weight(getattr(layer, "add_k_proj", None) or layer.to_k)

    def processor(self, size: int, token: int) -> nn.Module:
        return UserAttention(size, token)

    def attach(self, denoiser: Any, projection: nn.Module) -> None:
        denoiser.image_proj = UserTokens([projection])

    def projection(self, denoiser: Any) -> nn.Module:
        return denoiser.image_proj.image_projection_layers[0]
