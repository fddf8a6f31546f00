"""Heads and items for the tests of heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.scorer.heads import HEADS, Head, HeadConfig, make_head

D, N = 16, 12
CONFIGS = {
    **{name: HeadConfig(name=name) for name in HEADS if name != "aspects"},
    "aspects": HeadConfig(name="aspects", names=["taste", "faith"]),
    "pal a": HeadConfig(name="pal", kind="a"),
    "prompt maps": HeadConfig(name="micro", prompt_rank=2),
    "gpm with prompts": HeadConfig(name="gpm", prompt_scales=True),
    "learned weights": HeadConfig(name="aspects", names=["taste", "faith"], learned_weights=True),
}
UNTRAINED = [name for name in CONFIGS if name != "affine"]  # which begins at 0


def made(name: str, users: int = 3, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    return make_head(CONFIGS[name], D, users)


def items(seed: int = 0, count: int = N, prompts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of pictures and prompts [N,D], and users [N], one of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, D, generator=generator), dim=-1) for n in (count, prompts))
    user = torch.arange(prompts) % 4 - 1
    each = -(-count // prompts)
    return image, text.repeat_interleave(each, 0)[:count], user.repeat_interleave(each)[:count]
