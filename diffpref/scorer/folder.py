"""A scorer's folder: open_clip's own layout and ours. No pickle.

    open_clip_config.json          {"model_cfg", "preprocess_cfg"}: open_clip loads the folder by "local-dir:{folder}"
    open_clip_model.safetensors    the towers
    head.safetensors               the head
    scorer.json                    what the head is, how pictures and prompts are prepared, and the facts

A folder with neither scorer.json nor head.safetensors is a plain CLIP of open_clip.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffpref.scorer.heads import HEADS
from diffpref.scorer.heads.contract import Head
from diffpref.scorer.heads.cosine import Cosine
from diffpref.scorer.tokens import SimpleTokenizer
from diffpref.scorer.towers import Towers
from diffpref.scorer.weights import IMPOSSIBLE, Tensors, fill, read_tensors, refuse_no_numbers, said

FORMAT = 1
CONFIG, TOWERS, HEAD, FACTS = "open_clip_config.json", "open_clip_model.safetensors", "head.safetensors", "scorer.json"


@dataclass(frozen=True)
class Parts:
    """What a scorer is made of; `facts` are keyword arguments of PreferenceScorer."""

    towers: Towers
    head: Head
    facts: dict[str, Any] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no scorer's folder: it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object)")
    return content


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Parts:
    """A scorer's folder, or a plain CLIP's. Raises FileNotFoundError or ValueError, naming the file and the fault."""
    ours = any((folder / file).is_file() for file in (FACTS, HEAD))
    facts = read_facts(folder / FACTS) if ours else None
    towers = load_towers(folder, facts or {"pixels": "open_clip", "tokens": "open_clip"}, dtype)
    if facts is None:
        scale = towers.model.logit_scale.detach().mean().item()
        return Parts(towers, Cosine(towers.width, scale), {"name": folder.name, "description": "a CLIP of open_clip"})
    head = load_head(folder, facts, towers.width)
    return Parts(towers, head, {key: facts[key] for key in KNOWN if key in facts})


# keyword arguments of PreferenceScorer -> what they must be, and whether a value is that
KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: isinstance(value, str)),
    "description": ("a text", lambda value: isinstance(value, str)),
    "temperature": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    "needs_prompt": ("true or false", lambda value: isinstance(value, bool)),
    "users": ("a list of names, or null", lambda value: value is None or is_names(value)),
    "trained_on": ("a text", lambda value: isinstance(value, str)),
    "measured": ("an object", lambda value: isinstance(value, dict)),
}


def is_names(value: Any) -> bool:
    """Whether it is a list of texts and numbers."""
    return isinstance(value, list) and all(isinstance(one, str | int | float) for one in value)


def read_facts(path: Path) -> dict[str, Any]:
    """scorer.json. Raises as `read_json`, and ValueError for another format and for values that are none of theirs."""
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} has format {facts.get('format')}; this version reads {FORMAT}")
    for key, (kind, fits) in KNOWN.items():
        if key in facts and not fits(facts[key]):
            raise ValueError(f"{path}: {key} is {facts[key]!r}; it must be {kind}")
    return facts


def load_towers(folder: Path, facts: dict[str, Any], dtype: torch.dtype) -> Towers:
    """The towers of a folder."""
    config = read_json(folder / CONFIG)
    try:
        model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg")
        towers = Towers(
            model_cfg, preprocess_cfg, pixels=facts["pixels"], tokens=facts["tokens"], folder=folder, dtype=dtype
        )
    except KeyError as error:
        raise ValueError(f"{folder}: {CONFIG} or {FACTS} has no or an unknown {error}") from error
    except IMPOSSIBLE as error:
        raise ValueError(f"{folder / CONFIG} cannot be used: {said(error)}") from error
    fill(towers.model, read_tensors(folder / TOWERS), str(folder / TOWERS))
    return towers


def load_head(folder: Path, facts: dict[str, Any], width: int) -> Head:
    """The head of a folder. Raises ValueError for one that this version does not have or that is of another width."""
    name, settings = facts.get("head"), facts.get("settings")
    if not isinstance(name, str) or name not in HEADS or not isinstance(settings, dict):
        raise ValueError(f"{folder / FACTS}: head {name!r} not known, or without settings; known: {', '.join(HEADS)}")
    if settings.get("width") != width:
        raise ValueError(f"{folder / FACTS}: the head is {settings.get('width')} wide, the towers' embeddings {width}")
    try:
        head = HEADS[name](**settings)
    except IMPOSSIBLE as error:
        raise ValueError(f"{folder / FACTS}: settings of the head {name} not known ({said(error)})") from error
    fill(head, read_tensors(folder / HEAD), str(folder / HEAD))
    return head


def head_name(head: Head) -> str:
    """The name in HEADS. Raises ValueError for a head that has none."""
    for name, kind in HEADS.items():
        if type(head) is kind:
            return name
    raise ValueError(f"{type(head).__name__} is not among HEADS, so no folder can name it")


def save_folder(folder: Path, parts: Parts, dtype: torch.dtype | None = None) -> None:
    """Write a scorer's folder; its files are there whole or not at all. With `dtype` the towers are stored in it.

    Raises ValueError for weights that are NaN or infinite, before anything is written.
    """
    towers, facts = parts.towers, {"format": FORMAT} | parts.facts
    facts |= {"head": head_name(parts.head), "settings": parts.head.settings}
    facts |= {"pixels": towers.pixels, "tokens": towers.tokens}
    config = {"model_cfg": towers.model_cfg, "preprocess_cfg": towers.preprocess_cfg}
    texts = {CONFIG: json.dumps(config, indent=1), FACTS: json.dumps(facts, indent=1, ensure_ascii=False)}
    weights = {TOWERS: stored(towers.model, TOWERS, dtype), HEAD: stored(parts.head, HEAD)}
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(towers.tokenizer, SimpleTokenizer):
        towers.tokenizer.save_pretrained(folder)
    write_whole(folder, weights, texts)


def write_whole(folder: Path, weights: dict[str, Tensors], texts: dict[str, str]) -> None:
    """Every file beside its place first, then all into their places: a full disk or Ctrl-C leaves the old ones."""
    parts = {name: folder / f"{name}.part" for name in (*weights, *texts)}
    try:
        for name, tensors in weights.items():
            save_file(tensors, parts[name])
        for name, text in texts.items():
            parts[name].write_text(text, encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def stored(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensors:
    """The weights of a module as they are stored. Raises ValueError for what is NaN or infinite, perhaps in `dtype`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    if dtype is not None:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    refuse_no_numbers(tensors, name)
    return tensors
