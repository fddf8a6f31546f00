"""Tiny random scorers out of open_clip's real classes: 32-pixel pictures, 16 tokens, embeddings of width 24."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from diffpref.scorer.heads import HEADS
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.towers import Towers

WIDTH, SIZE, CONTEXT = 24, 32, 16
TINY = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def tiny_towers(seed: int = 0, model_cfg: dict[str, Any] = TINY, **options: Any) -> Towers:
    """Random towers whose embeddings differ from picture to picture and from prompt to prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        towers = Towers(model_cfg, **options)
        for name, parameter in towers.model.named_parameters():
            if "embedding" in name or "conv1" in name:
                parameter.data.mul_(20)  # as open_clip draws them, they are drowned by what all inputs share
    return towers.eval().requires_grad_(False)


def tiny_scorer(
    folder: Path | None = None,
    head: str = "cosine",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    **facts: Any,
) -> PreferenceScorer:
    """A random scorer; `settings` are the head's, `facts` the keyword arguments of PreferenceScorer. Written to
    `folder`, if there is one."""
    towers = tiny_towers(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = HEADS[head](width=WIDTH, **(settings or {})).eval().requires_grad_(False)
    scorer = PreferenceScorer(towers, made, **{"name": "tiny", **facts})
    if folder is not None:
        scorer.save_pretrained(folder)
    return scorer


def pictures(number: int, seed: int = 0, size: tuple[int, int] = (40, 32)) -> list[Image.Image]:
    """Random smooth pictures, all different."""
    random = np.random.default_rng(seed)
    coarse = [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(number)]
    return [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c in coarse]


def write_open_clip(folder: Path, model_cfg: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A random CLIP, written to a folder in open_clip's own layout."""
    towers = tiny_towers(seed, model_cfg=model_cfg)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file(towers.model.state_dict(), folder / "open_clip_model.safetensors")
    return towers.model


def tiny_hf_clip(folder: Path, hidden_act: str = "gelu", **vision) -> CLIPModel:
    """A random CLIPModel of transformers, saved to a folder."""
    shared = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "hidden_act": hidden_act}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=shared | {"num_attention_heads": 2, "max_position_embeddings": CONTEXT},
            vision_config=shared | {"num_attention_heads": 4, "image_size": SIZE, "patch_size": 8} | vision,
            projection_dim=WIDTH,
        )
    )
    for name, parameter in model.named_parameters():
        parameter.data.mul_(20 if "embedding" in name else 3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return model.eval()
