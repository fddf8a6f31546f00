"""Scorers by name: an installed plug-in is found; what is missing is named."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_scorers import pictures, tiny_scorer

from diffpref.scorer import load_scorer
from diffpref.scorer.plugins import PACKAGES, plugins

CODE = """
import numpy, torch
from diffpref.scorer import Scorer

class Brightness(Scorer):
    name, needs_prompt = "brightness", False
    def __init__(self, gain=1.0, device=None):
        self.gain = gain
    def prepare(self, picture):
        return numpy.asarray(picture).mean()
    def judge(self, prepared, prompts):
        return self.gain * torch.tensor(prepared, dtype=torch.float32)

def nothing(**options):
    return "a string"
"""


def install(folder: Path, name: str, **points: str) -> None:
    """A distribution as pip leaves it: a module, and metadata with entry points."""
    (folder / f"{name}.py").write_text(CODE)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[diffpref.scorers]", *lines, ""]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("bright_scorer", None)


def test_an_installed_plug_in_is_a_scorer(folder):
    install(folder, "bright_scorer", brightness="bright_scorer:Brightness")
    scorer = load_scorer("brightness", gain=2.0)
    means = scorer.score(images=pictures(2)) / 2
    assert means.tolist() == pytest.approx([np.asarray(p).mean() for p in pictures(2)], rel=1e-6)
    assert scorer.rank(images=pictures(2)) in ([0, 1], [1, 0]) and "brightness" in plugins()


def test_a_plug_in_that_makes_no_scorer(folder):
    install(folder, "bright_scorer", nothing="bright_scorer:nothing")
    with pytest.raises(ValueError, match=r"the plug-in nothing \(bright_scorer:nothing\) makes a str, no Scorer"):
        load_scorer("nothing")


def test_two_plug_ins_of_one_name(folder):
    install(folder, "bright_scorer", brightness="bright_scorer:Brightness")
    install(folder, "dark_scorer", brightness="dark_scorer:Brightness")
    with pytest.raises(ValueError, match="two plug-ins have the name brightness: .*:Brightness and .*; uninstall"):
        load_scorer("brightness")


@pytest.mark.parametrize(
    ("name", "needed"), [("imagereward", "image-reward"), ("hpsv3", "hpsv3"), ("vqascore", "t2v-metrics")]
)
def test_a_scorer_of_another_package_says_which(name, needed):
    assert name in PACKAGES
    with pytest.raises(ImportError, match=f"the scorer {name} needs the package {needed}; importing failed: No module"):
        load_scorer(name)


def test_other_names_are_folders_and_checkpoints(tmp_path):
    tiny_scorer(tmp_path)
    assert load_scorer(str(tmp_path), device="cpu").name == "tiny"


def test_an_unknown_name_is_told_the_known_ones(folder):
    install(folder, "bright_scorer", brightness="bright_scorer:Brightness")
    names = r"\(bundled, .*clip:ARCHITECTURE/TAG, imagereward, hpsv3, vqascore, .*brightness\)"
    with pytest.raises(ValueError, match=f"'oracle' is no scorer's name {names}, no folder here and no hub id$"):
        load_scorer("oracle")
    with pytest.raises(ValueError, match="the name of a scorer is empty"):
        load_scorer("")
