"""Drawn pictures as files that people can look at, beside the shards that tools read."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from diffpref.synpic.files import written_whole
from diffpref.synpic.plan import Shard

LONGEST = 60  # characters of a prompt in a file's name


def write_images(shards: Sequence[Shard], folder: Path) -> Path:
    """A PNG file for each picture of these shards, into folder/images: prompt, seed and pipeline are its name. Files
    that are there are left: the folder holds the pictures of one plan. Returns where they are."""
    to = folder / "images"
    to.mkdir(exist_ok=True)
    for shard in shards:
        for row in pq.read_table(folder / shard.name).to_pylist():
            path = to / f"{file_name(row['prompt'], row['key'])}-{row['seed']}-{row['pipeline']}.png"
            if not path.exists():
                with written_whole(path) as beside:
                    beside.write_bytes(row["image"]["bytes"])
    return to


def file_name(prompt: str, key: str) -> str:
    """A prompt as part of a name on any system. What it loses tells prompts apart, so its key stands for that."""
    plain = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    whole = len(plain) <= LONGEST and re.fullmatch(r"[a-z0-9 ]+", prompt)
    return plain if whole else f"{plain[:LONGEST].rstrip('-')}-{key[:8]}"
