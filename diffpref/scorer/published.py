"""Public checkpoints by name, exact to their originals, and whatever else a scorer is loaded from.

    bundled               the small scorer of the emoji world that comes with the package
    hpsv2, hpsv2.1        Wu et al., 2023 (arXiv 2306.09341): the cosine of a tuned CLIP ViT-H/14; letterboxed pictures
    pickscore             Kirstain et al., 2023 (arXiv 2305.01569): 100 · cosine, a logit; centre crops
    laion-aesthetic       LAION's predictor v2: 1 to 10, of the picture alone, over OpenAI's CLIP ViT-L/14
    laion-aesthetic-v1    its forerunner, one linear layer
    clip:ARCHITECTURE/TAG any CLIP of open_clip, such as clip:ViT-B-32/laion2b_s34b_b79k: its scale · cosine

Exact: the same numbers as the original code in fp32, but for two things that are meant. A picture which its EXIF data
says to turn is turned. And a special token written out in a prompt is text. The originals of `pickscore` prepared
pictures with PIL and dropped transparency (transformers 4); today's processor rounds differently and puts it on white.
hpsv2 under torchvision before 0.17 does not antialias.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from transformers import CLIPConfig

from diffpref.scorer.convert import convert_config, convert_weights
from diffpref.scorer.folder import CONFIG, FACTS, Parts, load_folder, read_json
from diffpref.scorer.heads.affine import Affine
from diffpref.scorer.heads.cosine import Cosine
from diffpref.scorer.towers import Towers
from diffpref.scorer.weights import Tensors, damage_named, fill, read_tensors, refuse_no_numbers

Architecture = str | dict[str, Any]

CLIP = "clip:"
OPENAI = "clip:ViT-L-14/openai"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Asked:
    """What the user asked for: the arguments of PreferenceScorer.from_pretrained."""

    name: str
    file: Path | None
    architecture: Architecture | None
    towers: str | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint.

    facts: Keyword arguments of PreferenceScorer.
    load: How it is read.
    repo, file: Its place on the hub; no repo if it has none there.
    takes: Which of `architecture` and `towers` it can be given.
    known: File names by which it is recognised, beside `file`.
    """

    facts: dict[str, Any]
    load: Callable[["Checkpoint", Asked], Parts]
    repo: str = ""
    file: str = ""
    takes: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def get(self, asked: Asked) -> Path:
        """Its file, from here or the hub. Raises FileNotFoundError, with the mend."""
        if asked.file is not None:
            return asked.file
        if not self.repo:
            raise FileNotFoundError(f"{asked.name} is not on the hub: download {self.file} and pass file=PATH")
        mend = f"{asked.name}: download {self.file} of {self.repo} where there is a network, and pass file=PATH"
        return from_hub(partial(hf_hub_download, self.repo, self.file), mend)


def from_hub(download: Callable[[], str], mend: str) -> Path:
    """A file or folder of the hub. Raises FileNotFoundError where it cannot be had, with the mend."""
    try:
        return Path(download())
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{mend}; it is neither in the hub's cache nor to be had now ({reason})") from error


def config_of(architecture: Architecture) -> dict[str, Any]:
    """open_clip's description of an architecture. Raises ValueError for a name it does not have."""
    config = architecture if isinstance(architecture, dict) else open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}; open_clip.list_models() has the names")
    return config


# --- towers with a cosine ---------------------------------------------------------------------------------------------


def load_hps(checkpoint: Checkpoint, asked: Asked) -> Parts:
    """{"state_dict": …} of an open_clip model. https://github.com/tgxs002/HPSv2, hpsv2/img_score.py"""
    path = checkpoint.get(asked)
    tensors = read_tensors(path, "state_dict")
    towers = Towers(config_of(asked.architecture or "ViT-H-14"), pixels="letterbox", dtype=asked.dtype)
    fill(towers.model, tensors, str(path))
    return Parts(towers, Cosine(towers.width, logit_scale=0.0))


def load_pickscore(checkpoint: Checkpoint, asked: Asked) -> Parts:
    """A transformers CLIPModel: its folder, or its model.safetensors. https://github.com/yuvalkirstain/PickScore"""
    path = checkpoint.get(asked)
    path = path / checkpoint.file if path.is_dir() else path
    tensors, beside = convert_weights(read_tensors(path)), path.parent / "config.json"
    described = convert_config(CLIPConfig(**read_json(beside))) if beside.is_file() else config_of("ViT-H-14")
    architecture = config_of(asked.architecture) if asked.architecture else described
    towers = Towers(architecture, pixels="processor", tokens="processor", dtype=asked.dtype)
    fill(towers.model, tensors, str(path))
    return Parts(towers, Cosine(towers.width, towers.model.logit_scale.item()))


def load_clip(asked: Asked) -> Parts:
    """A CLIP of open_clip, by name and tag, or by name and file."""
    name, _, tag = asked.name.removeprefix(CLIP).partition("/")
    config, trained = dict(config_of(asked.architecture or name)), open_clip.get_pretrained_cfg(name, tag)
    if not asked.file and not trained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none, pass file=PATH"
        raise ValueError(f"{asked.name}: open_clip has no weights {tag!r} of {name}, but {tags}")
    if trained:  # the weights' activation, whatever the name's
        config["quick_gelu"] = trained.get("quick_gelu", False)
    mend = f"{asked.name}: download the weights where there is a network, and pass file=PATH"
    path = asked.file or from_hub(partial(open_clip.download_pretrained, trained), mend)
    towers = Towers(config, trained, pixels="open_clip", dtype=asked.dtype)
    with damage_named(path):  # open_clip reads many layouts; pickles through weights_only
        open_clip.load_checkpoint(towers.model, str(path))
    refuse_no_numbers(towers.model.state_dict(), str(path))
    facts = {"name": asked.name, "description": f"open_clip's {name}, {tag or path.name}"}
    return Parts(towers, Cosine(towers.width, towers.model.logit_scale.mean().item()), facts)


# --- heads of the picture alone ---------------------------------------------------------------------------------------


def load_laion_v2(checkpoint: Checkpoint, asked: Asked) -> Parts:
    """Five layers without activations, `layers.{i}.weight`: one affine map.
    https://github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py"""
    path = checkpoint.get(asked)
    return over_clip(asked, path, collapse(read_tensors(path), path))


def load_laion_v1(checkpoint: Checkpoint, asked: Asked) -> Parts:
    """A linear layer. https://github.com/LAION-AI/aesthetic-predictor"""
    path = checkpoint.get(asked)
    return over_clip(asked, path, read_tensors(path))


def collapse(layers: Tensors, path: Path) -> Tensors:
    """Linear layers in a row as one, in fp64: weight [1,D] and bias [1]. Raises ValueError for other layers."""
    numbers = sorted(int(found[1]) for name in layers if (found := re.fullmatch(r"layers\.(\d+)\.weight", name)))
    if not numbers or set(layers) != {f"layers.{i}.{part}" for i in numbers for part in ("weight", "bias")}:
        raise ValueError(f"{path} is no aesthetic predictor: it has other names than layers.0.weight, layers.0.bias, …")
    weights, biases = ([layers[f"layers.{i}.{part}"].double() for i in numbers] for part in ("weight", "bias"))
    with damage_named(path):  # layers that do not fit each other
        weight, bias = weights[0], biases[0]
        for next_weight, next_bias in zip(weights[1:], biases[1:], strict=True):
            # A₂(A₁x + b₁) + b₂ = (A₂A₁)x + (A₂b₁ + b₂)
            weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return {"weight": weight.float(), "bias": bias.float()}


def over_clip(asked: Asked, path: Path, linear: Tensors) -> Parts:
    """One linear layer, weight [1,D] and bias [1], over the embeddings of a CLIP."""
    towers = load_parts(asked.towers or OPENAI, dtype=asked.dtype).towers
    head = Affine(towers.width)
    where = f"{path}, over the embeddings of {asked.towers or OPENAI},"
    fill(head, {name: value.squeeze(0) for name, value in linear.items()}, where)
    return Parts(towers, head)


# --- names ------------------------------------------------------------------------------------------------------------


def load_bundled(checkpoint: Checkpoint, asked: Asked) -> Parts:
    """The folder in the package; known by its place only."""
    return load_folder(Path(str(files("diffpref").joinpath(*BUNDLED))), asked.dtype)


BUNDLED = ("emoji_world", "data", "scorer")
HPS = {"temperature": 0.01}  # trained with CLIP's scale of 100 before the cosine, published without
ALONE = {"needs_prompt": False}

CHECKPOINTS: dict[str, Checkpoint] = {
    "bundled": Checkpoint({}, load_bundled),
    "hpsv2": Checkpoint(
        HPS | {"description": "HPS v2: human preferences, the cosine of a tuned CLIP ViT-H/14"},
        load_hps,
        repo="xswu/HPSv2",
        file="HPS_v2_compressed.pt",
        takes=("architecture",),
        known=("HPS_v2.pt",),
    ),
    "hpsv2.1": Checkpoint(
        HPS | {"description": "HPS v2.1: human preferences, the cosine of a tuned CLIP ViT-H/14"},
        load_hps,
        repo="xswu/HPSv2",
        file="HPS_v2.1_compressed.pt",
        takes=("architecture",),
    ),
    "pickscore": Checkpoint(
        {"description": "PickScore v1: human preferences of Pick-a-Pic, a tuned CLIP ViT-H/14"},
        load_pickscore,
        repo="yuvalkirstain/PickScore_v1",
        file="model.safetensors",
        takes=("architecture",),
    ),
    "laion-aesthetic": Checkpoint(
        ALONE | {"description": "LAION's aesthetic predictor v2, 1 to 10, of the picture alone"},
        load_laion_v2,
        repo="trl-lib/ddpo-aesthetic-predictor",
        file="aesthetic-model.pth",
        takes=("towers",),
        known=("sac+logos+ava1-l14-linearMSE.pth",),
    ),
    "laion-aesthetic-v1": Checkpoint(
        ALONE | {"description": "LAION's aesthetic predictor v1, 0 to 10, of the picture alone"},
        load_laion_v1,
        file="https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        takes=("towers",),
        known=("sa_0_4_vit_l_14_linear.pth",),
    ),
}
NAMES = (*CHECKPOINTS, f"{CLIP}ARCHITECTURE/TAG")


class UnknownName(ValueError):
    """What is no checkpoint's name and no place where one could be."""


def load_parts(
    name: str,
    *,
    file: str | PathLike[str] | None = None,
    architecture: Architecture | None = None,
    towers: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """What a name, folder, file or hub id stands for; the arguments are those of PreferenceScorer.from_pretrained."""
    if not name.strip():
        raise ValueError("the name of a scorer is empty; needed is a checkpoint's name, a folder, a file or a hub id")
    if Path(name).is_file() and file is None:
        name, file = name_of(Path(name)), name
    asked = Asked(name, Path(file) if file else None, architecture, str(towers) if towers else None, dtype)
    if name.startswith(CLIP):
        refuse_others(asked, ("file", "architecture"))
        return load_clip(asked)
    if name in CHECKPOINTS:
        checkpoint = CHECKPOINTS[name]
        refuse_others(asked, ("file", *checkpoint.takes) if checkpoint.file else ())
        parts = checkpoint.load(checkpoint, asked)
        return Parts(parts.towers, parts.head, parts.facts or {"name": name} | checkpoint.facts)
    refuse_others(asked, ())
    return load_folder(folder_of(name), dtype)


def refuse_others(asked: Asked, taken: tuple[str, ...]) -> None:
    """Raise ValueError for an argument that would be passed over."""
    for argument in ("file", "architecture", "towers"):
        if getattr(asked, argument) is not None and argument not in taken:
            raise ValueError(f"{asked.name} takes no {argument}" + (f", only {' and '.join(taken)}" if taken else ""))


def name_of(path: Path) -> str:
    """The checkpoint that a file is, by its name. Raises ValueError for a file of another name."""
    for name, checkpoint in CHECKPOINTS.items():
        if path.name in (*checkpoint.known, checkpoint.file) and path.suffix in PICKLES:
            return name
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; only public checkpoints are taken from such"
            f' files. If it is one, say which: from_pretrained("hpsv2.1", file="{path}")'
        )
    raise ValueError(f'{path} is a file: give its folder, or say what it is: from_pretrained("pickscore", file=…)')


def folder_of(name: str) -> Path:
    """A folder here or on the hub. Raises UnknownName for what can be neither, FileNotFoundError for none."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG, FACTS)):
            raise FileNotFoundError(f"{path} is no scorer's folder: it has no {CONFIG}")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownName(
            f"{name!r} is no checkpoint's name ({', '.join(NAMES)}), no folder here and no hub id; scorers of packages"
            f" and plug-ins are loaded by load_scorer({name!r})"
        )
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    mend = f"{name} is no folder here; as a hub id: download it where there is a network, and pass its folder"
    return from_hub(partial(snapshot_download, name, allow_patterns=wanted), mend)
