"""Scorers by name: this package's, those of packages that are installed beside it, and those of others' plug-ins.

A plug-in is an entry point of the group "diffpref.scorers": its name is the scorer's, its object makes one, with the
keyword arguments that `load_scorer` is given. In a plug-in's pyproject.toml:

    [project.entry-points."diffpref.scorers"]
    brightness = "my_package:Brightness"
"""

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffpref.scorer.contract import Scorer
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.published import NAMES, UnknownName

GROUP = "diffpref.scorers"


def load_scorer(name: str, **options: Any) -> Scorer:
    """Any scorer by its name, folder, file or hub id. `options` go to what makes it, such as device.

    Raises ValueError for an unknown name and for a plug-in that makes no Scorer, ImportError for a missing package.
    """
    if name in PACKAGES:
        return PACKAGES[name](**options)
    if name in (found := plugins()):
        scorer = found[name].load()(**options)
        if not isinstance(scorer, Scorer):
            raise ValueError(f"the plug-in {name} ({found[name].value}) makes a {type(scorer).__name__}, no Scorer")
        return scorer
    try:
        return PreferenceScorer.from_pretrained(name, **options)
    except UnknownName as error:
        names = ", ".join([*NAMES, *PACKAGES, *found])
        raise ValueError(f"{str(name)!r} is no scorer's name ({names}), no folder here and no hub id") from error


def plugins() -> dict[str, EntryPoint]:
    """The plug-ins that are installed. Raises ValueError for two of one name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(f"two plug-ins have the name {point.name}: {other.value} and {point.value}; uninstall one")
    return found


def package(module: str, distribution: str, scorer: str) -> Any:
    """A package that is needed for one scorer only. Raises ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"the scorer {scorer} needs the package {distribution}; importing failed: {error}") from error


def graphics_card(device: str | None) -> str:
    """The device that was asked for, or a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class Packaged(Scorer):
    """A scorer of another package, which prepares pictures itself."""

    def prepare(self, picture: Image.Image) -> Image.Image:
        """The picture."""
        return picture


class ImageReward(Packaged):
    """ImageReward (arXiv 2304.05977), about −2 to 2; it reads 35 tokens of a prompt. Prompt first, one at a time."""

    name = "imagereward"

    def __init__(self, device: str | None = None, checkpoint: str = "ImageReward-v1.0") -> None:
        made = package("ImageReward", "image-reward", self.name)
        self.model = made.load(checkpoint, device=graphics_card(device))

    def judge(self, prepared: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [N]."""
        with torch.inference_mode():
            pairs = zip(prepared, prompts, strict=True)
            return torch.tensor([float(self.model.score(prompt=prompt, image=image)) for image, prompt in pairs])


class HPSv3(Packaged):
    """HPSv3 (arXiv 2508.03789), the mean μ of its score, about −1 to 12."""

    name = "hpsv3"

    def __init__(self, device: str | None = None, checkpoint: str | None = None) -> None:
        made = package("hpsv3", "hpsv3", self.name)
        self.model = made.HPSv3RewardInferencer(checkpoint_path=checkpoint, device=graphics_card(device))

    def judge(self, prepared: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [N]."""
        with torch.inference_mode():  # keywords: the release takes pictures first, the repository prompts
            return self.model.reward(image_paths=prepared, prompts=prompts)[:, 0].float().cpu()


class VQAScore(Packaged):
    """VQAScore (arXiv 2404.01291): the probability of "Yes" when asked whether the picture shows the prompt."""

    name = "vqascore"

    def __init__(self, device: str | None = None, checkpoint: str = "clip-flant5-xl") -> None:
        made = package("t2v_metrics", "t2v-metrics", self.name)
        self.model = made.VQAScore(model=checkpoint, device=graphics_card(device))

    def judge(self, prepared: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [N]."""
        # It takes files only, and scores every picture with every prompt: one of each at a time.
        with TemporaryDirectory() as folder, torch.inference_mode():
            return torch.cat([self.one(Path(folder), *pair) for pair in zip(prepared, prompts, strict=True)])

    def one(self, folder: Path, picture: Image.Image, prompt: str) -> Tensor:
        """The score [1] of one picture."""
        picture.save(path := folder / "picture.png")
        return self.model(images=[str(path)], texts=[prompt]).float().cpu().flatten()


PACKAGES: dict[str, Callable[..., Scorer]] = {"imagereward": ImageReward, "hpsv3": HPSv3, "vqascore": VQAScore}
