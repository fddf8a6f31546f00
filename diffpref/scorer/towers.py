"""The two towers of a CLIP, what prepares their input, and nothing that judges."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from diffpref.scorer.pixels import PIXELS
from diffpref.scorer.tokens import SimpleTokenizer, count, make_tokenizer
from diffpref.scorer.weights import IMPOSSIBLE, said


def build(model_cfg: dict[str, Any]) -> nn.Module:
    """open_clip's model of an architecture, with random weights. Raises ValueError for what is none.

    open_clip.create_model does the same, but logs a warning for random weights and knows only names and folders.
    """
    config = deepcopy(model_cfg)
    for part in ("text_cfg", "vision_cfg"):
        if not isinstance(config.get(part), dict):
            raise ValueError(f"no open_clip architecture: {part} is {config.get(part)!r}, no object")
    if "multimodal_cfg" in config:
        raise ValueError("CoCa models are not supported: their towers end in captions")
    for tower, name in (("text_cfg", "hf_model"), ("vision_cfg", "timm_model")):
        if f"{name}_name" in config[tower]:
            config[tower][f"{name}_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    try:
        return (CustomTextCLIP if custom else CLIP)(**config)
    except IMPOSSIBLE as error:
        raise ValueError(f"no open_clip architecture: {said(error)}") from error


class Towers(nn.Module):
    """An open_clip model with its preprocessing and tokenizer.

    Args:
        model_cfg: open_clip's description of the architecture (`open_clip.get_model_config(name)`).
        preprocess_cfg: open_clip's description of the preprocessing; what it leaves out is open_clip's default.
        pixels: How a picture is prepared, a name in PIXELS.
        tokens: How a prompt is cleaned, a name in CLEAN.
        folder: Where a tokenizer of transformers lies.
        dtype: The towers compute in it (autocast); weights, embeddings and scores are fp32.
    """

    def __init__(
        self,
        model_cfg: dict[str, Any],
        preprocess_cfg: dict[str, Any] | None = None,
        *,
        pixels: str = "white",
        tokens: str = "open_clip",
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model_cfg, self.pixels, self.tokens, self.dtype = deepcopy(model_cfg), pixels, tokens, dtype
        self.model = build(model_cfg)
        shown = merge_preprocess_dict(PreprocessCfg(), preprocess_cfg or {}) | {"size": self.model.visual.image_size}
        self.preprocess_cfg = asdict(PreprocessCfg(**shown))
        self.preprocess = PIXELS[pixels](PreprocessCfg(**shown))
        self.tokenizer = make_tokenizer(model_cfg["text_cfg"], tokens, folder)
        self.check_vocabulary()
        self.told = False

    def check_vocabulary(self) -> None:
        """Raise ValueError for a text tower with fewer tokens than open_clip's tokenizer has."""
        known = self.model_cfg["text_cfg"].get("vocab_size", 49408)
        if isinstance(self.tokenizer, SimpleTokenizer) and self.tokenizer.vocab_size > known:
            there = self.tokenizer.vocab_size
            raise ValueError(f"the tokenizer has {there} tokens, the text tower {known}: they do not belong together")

    @property
    def width(self) -> int:
        """D, the width of the embeddings."""
        return self.model_cfg["embed_dim"]

    def facts(self) -> tuple:
        """What embeddings depend on beside weights."""
        return (self.model_cfg, self.preprocess_cfg, self.pixels, self.tokens, str(self.dtype))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Tokens [N,L]. Prompts that are too long are cut before their end token; the first time, a warning says so."""
        room = self.tokenizer.context_length
        if not self.told and (long := sum(count(self.tokenizer, prompt) > room for prompt in prompts)):
            self.told = True
            warnings.warn(
                f"{long} of {len(prompts)} prompts are longer than the {room} tokens that this scorer reads, and are"
                " cut; later ones are cut without a word",
                stacklevel=2,
            )
        return self.tokenizer(prompts)

    def images(self, pixels: Tensor) -> Tensor:
        """Prepared pictures [N,3,S,S] -> unit vectors [N,D], fp32, with their graph."""
        with self.autocast():
            return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Tokens [N,L] -> unit vectors [N,D], fp32, with their graph."""
        with self.autocast():
            return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    def autocast(self) -> AbstractContextManager:
        """Computes in the towers' dtype; with fp32 as the caller's autocast says, if there is one."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
