"""What ships: artwork, pipeline and prompts; and the commands that made them, at tiny size."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffpref.emoji_world.artwork import held_out_pairs, load_artwork, split_concepts
from diffpref.emoji_world.build import PACKAGES, STYLES, load_concepts, render

ROOT = Path(__file__).parents[1]
DATA = ROOT / "diffpref" / "emoji_world" / "data"

STOCK = """
import sys, warnings
warnings.simplefilter("error")
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe("red apple, flat", num_inference_steps=12, guidance_scale=2.0).images[0].save(sys.argv[2])
assert not [name for name in sys.modules if name.startswith("diffpref")]
"""


# --- what ships -----------------------------------------------------------------------------------------------------


def test_artwork_has_every_core_concept_in_every_style_with_its_licence():
    from datasets import Dataset

    rows = Dataset.from_parquet(str(DATA / "artwork.parquet"))
    assert len(rows) == len(load_concepts()) * len(STYLES) == 545
    by_style = {p.style: (p.license, p.author, f"{p.package}@{p.version}") for p in PACKAGES}
    for row in rows.remove_columns("image"):
        assert (row["license"], row["author"], row["source"]) == by_style[row["style"]]
    assert {row["license"] for row in rows.remove_columns("image")} == {"MIT", "Apache-2.0"}


def test_splits_are_disjoint_and_of_their_sizes():
    art = load_artwork()
    train, held = split_concepts(art.concepts)
    assert not set(train) & set(held) and len(held) == 36 and len(train) == 73
    pairs = held_out_pairs(art.concepts)
    assert len(pairs) == 44 == len({concept for concept, _ in pairs}) == int((~art.seen).sum())
    assert {style for _, style in pairs} == set(STYLES)


def test_evaluation_prompts_are_the_held_out_concepts():
    assert (DATA / "evaluation_prompts.txt").read_text().split("\n")[:-1] == split_concepts(load_artwork().concepts)[1]


def test_preferences_never_show_an_evaluation_concept():
    from datasets import load_dataset

    held = set(split_concepts(load_artwork().concepts)[1])
    for name in ("pairs", "lists", "unseen_users"):
        rows = load_dataset("parquet", data_files=str(DATA / "preferences" / f"{name}.parquet"), split="train")
        assert len(rows) > 700 and not held & set(rows["prompt"])
        assert "group_id" in rows.column_names and "user_id" in rows.column_names


def test_shipped_files_are_small_and_safe():
    def megabytes(folder):
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6

    assert megabytes(DATA / "pipeline") + (DATA / "classifier.safetensors").stat().st_size / 1e6 <= 30
    assert megabytes(DATA / "preferences") <= 20
    weights = [p for p in (DATA / "pipeline").rglob("*") if p.suffix in {".safetensors", ".bin", ".pt", ".ckpt"}]
    assert len(weights) == 3 and {p.suffix for p in weights} == {".safetensors"}
    for path in weights:
        tensors = load_file(path)
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
        assert all(torch.isfinite(t).all() for t in tensors.values())


def test_stock_diffusers_loads_and_draws(tmp_path):
    """Without this package and without a word about precision: a red apple on white."""
    out = tmp_path / "apple.png"
    subprocess.run([sys.executable, "-c", STOCK, DATA / "pipeline", out], check=True, cwd=tmp_path)
    pixels = np.asarray(Image.open(out), dtype=float)
    assert pixels.shape == (32, 32, 3) and pixels[:2, :2].min() > 200
    middle = pixels[12:24, 10:22].mean((0, 1))
    assert middle[0] > 150 and middle[0] > 2 * middle[2]


# --- build ----------------------------------------------------------------------------------------------------------


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def icon_set(chars: dict[str, str], **icons: str) -> dict[str, bytes]:
    bodies = {
        "icons": {name.replace("_", "-"): {"body": body} for name, body in icons.items()},
        "width": 8,
        "height": 8,
    }
    bodies["aliases"] = {"scarlet-apple": {"parent": "red-apple"}}
    return {"package/icons.json": json.dumps(bodies).encode(), "package/chars.json": json.dumps(chars).encode()}


CONCEPTS = [
    {"name": "red apple", "group": "food", "codepoint": "1F34E"},
    {"name": "scarlet apple", "group": "food", "codepoint": "1F34F"},
    {"name": "absent", "group": "none", "codepoint": "1F350"},
]
LEFT_HALF = '<rect width="4" height="8" fill="{}"/>'


def pictures(package, path) -> dict[str, np.ndarray]:
    rows = list(render(package, path, CONCEPTS, 16))
    return {row["concept"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows}


@pytest.mark.parametrize("chars", [{"1f34e": "red-apple"}, {}], ids=["by code point", "by name"])
def test_svg_artwork_is_drawn_on_white_and_found_by_code_point_name_or_alias(tmp_path, chars):
    flat = next(p for p in PACKAGES if p.style == "flat")
    found = pictures(flat, archive(tmp_path / "a.tgz", icon_set(chars, red_apple=LEFT_HALF.format("#ff0000"))))
    assert set(found) == {"red apple", "scarlet apple"}
    assert found["red apple"][8, 2].tolist() == [255, 0, 0] and found["red apple"][8, 13].tolist() == [255, 255, 255]


def test_current_color_is_black(tmp_path):
    line_art = next(p for p in PACKAGES if p.style == "line art")
    path = archive(tmp_path / "a.tgz", icon_set({}, red_apple=LEFT_HALF.format("currentColor")))
    assert pictures(line_art, path)["red apple"][8, 2].tolist() == [0, 0, 0]


def test_webp_artwork_is_flattened_on_white(tmp_path):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 255, 0)).save(file, "WEBP", lossless=True)
    found = pictures(PACKAGES[0], archive(tmp_path / "a.tgz", {"package/assets/1f34e.webp": file.getvalue()}))
    assert list(found) == ["red apple"] and found["red apple"].min() == 255


# --- pretraining ----------------------------------------------------------------------------------------------------


def pretraining(out: Path, stderr=subprocess.DEVNULL) -> subprocess.Popen:
    sizes = ["--architecture.vae_channels", "[8,8]", "--architecture.unet_channels", "[16,16]"]
    sizes += [
        "--architecture.latent_channels",
        "4",
        "--architecture.text_width",
        "16",
        "--architecture.text_layers",
        "1",
    ]
    short = [
        "--autoencoder.steps",
        "4",
        "--autoencoder.batch_size",
        "4",
        "--warm_start_steps",
        "3",
        "--checkpoint_every",
        "20",
    ]
    short += ["--denoiser.steps", "120", "--denoiser.batch_size", "4"]
    line = [sys.executable, "diffpref/emoji_world/pretrain.py", "--out", str(out), *sizes, *short]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def test_pretraining_goes_on_where_it_was_killed_and_makes_a_stock_pipeline(tmp_path):
    """A run killed after a checkpoint and given again goes on from there and ends where one that was left alone ends.

    Within the spread of two equal runs, that is: the CPU's matrix products depend on how memory happens to be aligned.
    """
    assert pretraining(tmp_path / "whole").wait() == 0
    killed = pretraining(tmp_path / "again")
    while killed.poll() is None and not (tmp_path / "again" / "checkpoint-denoiser" / "step").exists():
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "again" / "pipeline").exists()
    step = int((tmp_path / "again" / "checkpoint-denoiser" / "step").read_text())
    resumed = pretraining(tmp_path / "again", stderr=subprocess.PIPE)
    progress = resumed.communicate()[1]
    assert resumed.returncode == 0 and f"| {step}/120" in progress and "| 0/120" not in progress
    files = [Path(f) / "diffusion_pytorch_model.safetensors" for f in ("unet", "vae")] + [
        Path("text_encoder/model.safetensors")
    ]
    for file in files:
        once, again = (load_file(tmp_path / run / "pipeline" / file) for run in ("whole", "again"))
        assert once.keys() == again.keys()
        assert max((once[k].float() - again[k].float()).abs().max() for k in once) < 0.02
    out = tmp_path / "picture.png"
    subprocess.run([sys.executable, "-c", STOCK, tmp_path / "whole" / "pipeline", out], check=True)
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
