"""Drawn pictures as PNG files."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpref.synpic.draw import write_shard
from diffpref.synpic.images import file_name, write_images
from diffpref.synpic.plan import Plan, Source


def drawn(folder: Path, prompts: tuple[str, ...]) -> list:
    """The shards of a plan, with a picture of its own colour for each."""
    shards = Plan((Source("base", "pipeline"),), prompts, (3, 4), 3).shards()
    for shard in shards:
        colours = [(10 * shard.number, 40 * i, 7) for i in range(len(shard.pictures))]
        write_shard(folder / shard.name, shard, [Image.new("RGB", (4, 6), colour) for colour in colours])
    return shards


def test_every_picture_is_a_file(tmp_path: Path) -> None:
    shards = drawn(tmp_path, ("red apple", "a castle"))
    where = write_images(shards, tmp_path)
    assert sorted(path.name for path in where.iterdir()) == [
        "a-castle-3-base.png", "a-castle-4-base.png", "red-apple-3-base.png", "red-apple-4-base.png",
    ]  # fmt: skip
    for row in [row for shard in shards for row in pq.read_table(tmp_path / shard.name).to_pylist()]:
        file = where / f"{row['prompt'].replace(' ', '-')}-{row['seed']}-base.png"
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))))


@pytest.mark.parametrize("prompts", [("Red apple", "red apple"), ("red/apple", "red apple"), ("x" * 90, "x" * 91)])
def test_prompts_that_would_share_a_name_do_not(prompts: tuple[str, str], tmp_path: Path) -> None:
    assert len(list(write_images(drawn(tmp_path, prompts), tmp_path).iterdir())) == 4


def test_names_are_safe() -> None:
    assert file_name("../../etc: <passwd>", "0123456789") == "etc-passwd-01234567"
    assert file_name("雪だるま", "0123456789") == "雪だるま-01234567"


def test_what_is_there_is_left(tmp_path: Path) -> None:
    shards = drawn(tmp_path, ("red apple",))
    file = write_images(shards, tmp_path) / "red-apple-3-base.png"
    file.write_bytes(b"mine")
    write_images(shards, tmp_path)
    assert file.read_bytes() == b"mine"
