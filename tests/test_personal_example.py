"""The README's four pairs, with what ships: pairs, an encoder, a taste, pictures."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """Of the README's section, as a shell would read them."""
    section = (ROOT / "README.md").read_text().split("## Your taste, from four pairs")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1).replace("\\\n", " ")
    assigned, *lines = block.strip().splitlines()
    name, value = assigned.split("#")[0].strip().split("=")
    return [shlex.split(line.replace(f"${name}", value)) for line in lines]


def test_the_readmes_commands_make_pictures_of_a_taste(tmp_path):
    """As they stand, but with two steps and in another folder."""
    embed, sample = commands()
    assert embed[:3] == ["diffpref", "user", "embed"] and sample[:2] == ["diffpref", "sample"]
    sample[sample.index("--steps") + 1] = "2"
    moved = {"me.safetensors": str(tmp_path / "me.safetensors"), "mine": str(tmp_path / "mine")}
    for words in (embed, sample):
        words = [moved.get(word, word) for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "diffpref.cli", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-2000:]
    pictures = sorted((tmp_path / "mine" / "images").iterdir())
    assert len(pictures) == 12 and pictures[0].name == "castle-0-mine.png"
    assert np.asarray(Image.open(pictures[0])).std() > 1
