"""transformers' CLIPModel -> open_clip's CLIP: the same towers under other names. PickScore is published so."""

import re
from typing import Any

import torch
from transformers import CLIPConfig

from diffpref.scorer.weights import Tensors

# In order: the first part of a name, then the parts within a block.
RENAMED = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # sic
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2.\1"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
TRANSPOSED = ("visual.proj", "text_projection")


def renamed(name: str) -> str:
    """open_clip's name of a tensor; of the three parts of an attention's in_proj it ends in .q, .k or .v."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def convert_weights(tensors: Tensors) -> Tensors:
    """The tensors of a CLIPModel as those of open_clip's CLIP. Unknown names stay, to be refused by `fill`."""
    new = {renamed(name): value for name, value in tensors.items() if not name.endswith(".position_ids")}
    for name in [name for name in new if name.endswith(".q")]:
        parts = [new.pop(f"{name[:-2]}.{part}", torch.empty(0)) for part in "qkv"]  # open_clip keeps the three in one
        new[name[:-2]] = torch.cat(parts)
    return new | {name: new[name].T.contiguous() for name in TRANSPOSED if name in new}


def convert_config(config: CLIPConfig) -> dict[str, Any]:
    """The configuration of a CLIPModel as open_clip's model_cfg. Raises ValueError for one that open_clip cannot be."""
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(f"the CLIPModel has the activations {sorted(acts)}; open_clip has gelu or quick_gelu for both")
    pictures = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    heads = {"head_width": vision.hidden_size // vision.num_attention_heads}
    prompts = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": pictures | heads | shape(vision),
        "text_cfg": prompts | {"heads": text.num_attention_heads} | shape(text),
    }


def shape(part: Any) -> dict[str, Any]:
    """Width, depth, the perceptrons' ratio and the norms' epsilon of a tower."""
    ratio = part.intermediate_size / part.hidden_size
    norm = {} if part.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": part.layer_norm_eps}}
    return {"width": part.hidden_size, "layers": part.num_hidden_layers, "mlp_ratio": ratio} | norm
