"""Preferences in, batches out: nothing distorted, pairs treated alike, the stream independent of how it is split."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffpref.config import DataConfig
from diffpref.data import PreferencePairs, TrainingStream, collate, load_preferences
from diffpref.data.pairs import crop_square, to_rgb


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_pairs(path, count: int = 5, **columns):
    rows = {"prompt": [f"prompt {i}" for i in range(count)]}
    rows |= {
        side: [picture(40, 32, i + 100 * (side == "chosen")) for i in range(count)] for side in ("chosen", "rejected")
    }
    features = {"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()}
    features |= {name: Value("float32") for name in columns}
    Dataset.from_dict(rows | columns, features=Features(features)).to_parquet(path)
    return path


def dataset(tmp_path, resolution=16, **settings) -> PreferencePairs:
    config = DataConfig(path=str(write_pairs(tmp_path / "pairs.parquet")), **settings)
    return PreferencePairs(load_preferences(config), config, resolution, seed=0)


def test_parquet_jsonl_and_folder_give_the_same_rows(tmp_path):
    parquet = load_preferences(DataConfig(path=str(write_pairs(tmp_path / "pairs.parquet"))))
    lines = []
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, row in enumerate(parquet):
        names = {side: f"{side}-{i}.png" for side in ("chosen", "rejected")}
        for side, name in names.items():
            row[side].save(folder / name)
        lines.append({"prompt": row["prompt"], **names})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metadata = [
        {"prompt": x["prompt"], "chosen_file_name": x["chosen"], "rejected_file_name": x["rejected"]} for x in lines
    ]
    for path in (folder / "pairs.jsonl", folder):
        if path.is_dir():
            (folder / "pairs.jsonl").unlink()
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
        rows = load_preferences(DataConfig(path=str(path)))
        assert rows["prompt"][:] == parquet["prompt"][:]
        assert all(np.array_equal(a["chosen"], b["chosen"]) for a, b in zip(rows, parquet, strict=True))


def test_columns_the_trainer_does_not_need_are_not_read(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", truth_utility=[0.0] * 5, weight=[1.0, 2.0, 1.0, 1.0, 1.0])
    assert load_preferences(DataConfig(path=str(path))).column_names == ["prompt", "chosen", "rejected", "weight"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.parquet", FileNotFoundError, "data.path: no data set at"),
        ("nowhere/at/all", FileNotFoundError, "not a file or folder here"),
        ("pairs.csv", ValueError, "suffix no reader takes; known: folders, .parquet, .jsonl, .json"),
    ],
)
def test_missing_data_is_named(tmp_path, path, error, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt\n")
    with pytest.raises(error, match=message):
        load_preferences(DataConfig(path=path))


def test_missing_columns_are_named(tmp_path):
    Dataset.from_dict({"prompt": ["a"], "image_w": ["b"]}).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(
        ValueError, match=r"lacks the column\(s\) \['chosen', 'rejected'\]; it has \['prompt', 'image_w'\]"
    ):
        load_preferences(DataConfig(path=str(tmp_path / "pairs.parquet")))


def test_max_pairs(tmp_path):
    path = str(write_pairs(tmp_path / "pairs.parquet"))
    assert len(load_preferences(DataConfig(path=path, max_pairs=3))) == 3


@pytest.mark.parametrize("size", [(40, 32), (31, 77), (16, 16), (100, 33)])
def test_crop_keeps_the_aspect_and_tells_its_corner(size):
    """The crop equals a plain resize of the whole picture, cut at the corner that is reported."""
    image = picture(*size)
    cropped, (top, left) = crop_square(image, 16, (1.0, 1.0))
    scale = 16 / min(size)
    whole = image.resize([max(16, round(s * scale)) for s in size], Image.Resampling.LANCZOS)
    assert cropped.size == (16, 16) and (left + 16, top + 16) == whole.size
    assert np.array_equal(cropped, np.array(whole)[top : top + 16, left : left + 16])


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0], ramp >> 8)
    with pytest.raises(ValueError, match="mode F has no known range"):
        to_rgb(Image.new("F", (4, 4)))


def test_a_broken_row_is_named(tmp_path):
    pairs = dataset(tmp_path)
    pairs.rows = [{"prompt": None, "chosen": picture(8, 8), "rejected": picture(8, 8)}]
    with pytest.raises(ValueError, match="data.path: row 0 of .*pairs.parquet: the prompt is None, not text"):
        pairs[0, 0]


def test_negative_weights_are_refused(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", weight=[1.0, -2.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="weights that are missing, negative or not finite"):
        load_preferences(DataConfig(path=str(path)))


def test_transparency_goes_on_white_and_grey_becomes_rgb():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_a_pair_shares_crop_and_flip(tmp_path):
    """With the same picture on both sides, both must stay the same under random crops and flips, and not always the
    same."""
    pairs = dataset(tmp_path, center_crop=False, random_flip=True)
    pairs.rows = [{"prompt": "p", "chosen": picture(40, 32), "rejected": picture(40, 32)}]
    seen = set()
    for key in range(12):
        chosen, rejected = pairs[0, key]["images"]
        assert torch.equal(chosen, rejected)
        seen.add(chosen.sum().item())
    assert len(seen) > 6


def test_caption_dropout_has_its_share_and_is_the_pairs(tmp_path):
    pairs = dataset(tmp_path, caption_dropout=0.3)
    dropped = sum(pairs[0, key]["prompt"] == "" for key in range(300))
    assert 60 < dropped < 120


def test_batch_structure(tmp_path):
    pairs = dataset(tmp_path)
    batch = collate([pairs[i, 10 + i] for i in range(3)])
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert batch.prompts == ["prompt 0", "prompt 1", "prompt 2"] * 2 and batch.keys == [10, 11, 12]
    assert batch.structure.group.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.structure.pairs.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert batch.original_size.tolist() == [[32, 40]] * 6 and batch.crop_top_left.tolist() == [[0, 2]] * 6
    torch.testing.assert_close(batch.images[1], pairs[1, 11]["images"][0])


def positions(**changes) -> list[list[tuple[int, int]]]:
    settings = dict(rows=10, seed=0, batch_size=4, accumulation=1, steps=range(0, 6), rank=0, world=1) | changes
    return list(TrainingStream(**settings))


def test_every_row_comes_once_an_epoch_and_the_order_changes():
    flat = [item for batch in positions(steps=range(0, 5)) for item in batch]
    first, second = ([row for row, p in flat if p // 10 == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_resumed_stream_is_the_tail():
    assert positions(steps=range(4, 6)) == positions()[4:]


def test_a_step_holds_the_same_pairs_however_it_is_split():
    whole = [sorted(batch) for batch in positions(steps=range(0, 3))]
    accumulated = positions(batch_size=1, accumulation=4, steps=range(0, 3))
    assert [sorted(sum(accumulated[i : i + 4], [])) for i in (0, 4, 8)] == whole
    ranks = [positions(batch_size=2, steps=range(0, 3), rank=r, world=2) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == whole


def test_collated_batch_survives_replace(tmp_path):
    """Batches are frozen: changing one means making another."""
    batch = collate([dataset(tmp_path)[0, 0]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.prompts = []
