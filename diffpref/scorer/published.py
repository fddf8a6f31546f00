"""Public checkpoints by name, exact to their originals, and everything else a scorer is loaded from.

    hpsv2, hpsv2.1        Wu et al., 2023 (arXiv 2306.09341): cosine of a tuned CLIP ViT-H/14; letterboxed pictures
    pickscore             Kirstain et al., 2023 (arXiv 2305.01569): 100 · cosine, as logits; centre crops
    clip:ARCHITECTURE/TAG any CLIP that open_clip names, "clip:ViT-B-32/laion2b_s34b_b79k"; its own scale · cosine
    laion-aesthetic       LAION's predictor v2, of the picture alone: 1 to 10, over OpenAI's CLIP ViT-L/14
    laion-aesthetic-v1    its forerunner: one linear layer
    bundled               the small scorer of the emoji world that comes with the package

Exact: the same numbers as the original code, on upright pictures. Two differences are meant. A picture that its EXIF
data says to turn is turned. And a prompt with a special token written out is read as text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from diffpref.scorer.folder import Parts, load_folder

HUGE, LARGE = "ViT-H-14", "clip:ViT-L-14/openai"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is to be had, and what the user said of it.

    repo, file: its place on the hub.  path: where it lies here.  architecture: open_clip's name or description of its
    towers.  towers: where the towers of a head come from.  dtype: in what the towers compute.
    """

    name: str
    repo: str
    file: str
    path: Path | None = None
    architecture: str | dict[str, Any] | None = None
    towers: str | None = None
    dtype: torch.dtype = torch.float32

    def get(self) -> Path:
        """The file, from here or the hub. Raises FileNotFoundError, with the mend."""
        if self.path is not None:
            return self.path
        with_mend = f"download {self.file} of {self.repo} and pass file=PATH"
        if not self.repo:
            raise FileNotFoundError(f"{self.name} is not on the hub: {with_mend}")
        return from_hub(partial(hf_hub_download, self.repo, self.file), f"{self.name}: {with_mend}")


def from_hub(download: Callable[[], str], mend: str) -> Path:
    """A file or folder of the hub. Raises FileNotFoundError where it cannot be had, with the mend."""
    try:
        return Path(download())
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{mend} (neither in the hub's cache nor reachable: {str(error).splitlines()[0]})"
        ) from error


def config_of(architecture: str | dict[str, Any]) -> dict[str, Any]:
    """open_clip's description of an architecture. Raises ValueError for a name it does not have."""
    if isinstance(architecture, dict):
        return architecture
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip has no architecture {architecture}; open_clip.list_models() has their names")
    return config


def load_parts(
    name: str,
    *,
    file: str | PathLike[str] | None = None,
    architecture: str | dict[str, Any] | None = None,
    towers: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """What a name, folder, file or hub id stands for; the arguments are those of PreferenceScorer.from_pretrained."""
    return load_folder(Path(name), dtype)
