"""Draw a plan's shards, one pipeline in memory at a time. What is there already is not drawn again."""

import gc
import inspect
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Value
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffpref.adapters import HUB_ID, lora_file
from diffpref.cache.team import Team
from diffpref.config import ModelConfig
from diffpref.families import load_pipeline
from diffpref.sample import sample
from diffpref.synpic.files import sweep, written_whole
from diffpref.synpic.personal import check_personal, for_user
from diffpref.synpic.plan import Picture, Plan, Shard, Source, open_folder
from diffpref.users.personalized import Bound

ROW_GROUP = 8  # pictures that are read together
FEATURES = Features(
    {
        "prompt": Value("string"),
        "image": ImageFeature(),
        "pipeline": Value("string"),
        "seed": Value("int64"),
        "key": Value("string"),
    }
)


def draw(plan: Plan, folder: Path, *, batch_size: int, device: torch.device, team: Team | None = None) -> int:
    """Draw what of this process's share of the shards is missing; returns how many pictures that were.

    A picture depends on its pipeline, prompt and seed; but for float rounding, not on batch_size and device. A process
    that is killed loses the shard it is at.

    Raises ValueError for pipelines that cannot be had, numbers that are none, and a folder of other pictures.
    """
    team = team or Team()
    for source in plan.sources:
        check_source(source)
    open_folder(folder, plan)
    mine = team.share(plan.shards())
    missing = [shard for shard in mine if not is_whole(folder / shard.name, len(shard.pictures))]
    total, todo = (sum(len(shard.pictures) for shard in some) for some in (mine, missing))
    bar = tqdm(total=total, initial=total - todo, desc="drawing", unit="image", disable=not (todo and team.main))
    with bar:
        for source, shards in groupby(missing, key=lambda shard: shard.source):
            draw_source(source, list(shards), folder, batch_size, device, bar)
            gc.collect()  # before the next pipeline is loaded: modules and hooks refer to each other in circles
    return todo


def draw_source(
    source: Source, shards: Sequence[Shard], folder: Path, batch_size: int, device: torch.device, bar: tqdm
) -> None:
    """The shards of one pipeline, which is forgotten at the end."""
    pipe = open_pipeline(source, device)
    options, pipe = pipeline_options(source, pipe), for_user(pipe, source)
    for shard in shards:
        bar.set_postfix_str(source.name)
        sweep(folder / shard.name)
        images: list[Image.Image] = []
        for start in range(0, len(shard.pictures), batch_size):
            images += draw_batch(pipe, source, shard.pictures[start : start + batch_size], options)
            bar.update(len(images) - start)
        write_shard(folder / shard.name, shard, images)


def draw_batch(
    pipe: DiffusionPipeline | Bound, source: Source, some: Sequence[Picture], options: dict
) -> list[Image.Image]:
    """A few pictures at once. Raises ValueError, naming the pipeline, for numbers that are none."""
    try:
        return sample(pipe, [p.prompt for p in some], [p.seed for p in some], batch_size=len(some), **options)
    except FloatingPointError as error:
        raise ValueError(f"pipeline {source.name}: {error}") from error


# --- pipelines ------------------------------------------------------------------------------------------------------


def check_source(source: Source) -> None:
    """Look for a pipeline, its LoRA and its user before anything is drawn. Raises ValueError where they are not."""
    for path in filter(None, (source.path, source.lora)):
        if not Path(path).exists() and not HUB_ID.fullmatch(path):
            raise ValueError(f"pipeline {source.name}: there is nothing at {path}, and a hub id it is not")
    try:
        config = DiffusionPipeline.load_config(source.path)
        if source.lora is not None:
            getattr(diffusers, config["_class_name"]).lora_state_dict(lora_file(source.lora), use_safetensors=True)
        check_personal(source, config)
    except (OSError, ValueError, AttributeError) as error:  # the last: a class that is unknown, or takes no LoRA
        raise ValueError(f"pipeline {source.name}: {error}") from error


def open_pipeline(source: Source, device: torch.device) -> DiffusionPipeline:
    """The pipeline with its LoRA, on the device. Raises ValueError, naming it, where that cannot be had."""
    try:
        pipe = load_pipeline(ModelConfig(source.path, variant=source.variant, dtype=source.dtype))
        if source.lora is not None:
            pipe.load_lora_weights(lora_file(source.lora), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"pipeline {source.name}: {error}") from error
    return pipe.to(device)


def pipeline_options(source: Source, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of `sample`; what the source leaves open is the default of the pipeline's own call."""
    own = inspect.signature(pipe.__call__).parameters
    asked = {"num_inference_steps": source.steps, "guidance_scale": source.guidance}
    defaults = {key: own[key].default if value is None else value for key, value in asked.items()}
    return defaults | {"height": source.height, "width": source.width}


# --- shards ---------------------------------------------------------------------------------------------------------


def is_whole(path: Path, pictures: int) -> bool:
    """Whether a shard is there with all its rows, as far as its footer says. Files are written whole; a damaged disk
    may say otherwise."""
    try:
        return pq.read_metadata(path).num_rows == pictures
    except (OSError, pa.ArrowInvalid):
        return False


def write_shard(path: Path, shard: Shard, images: Sequence[Image.Image]) -> None:
    """One file, of PNG pictures."""
    rows = [
        {
            "prompt": picture.prompt,
            "image": {"bytes": to_png(image), "path": None},
            "pipeline": shard.source.name,
            "seed": picture.seed,
            "key": picture.key,
        }
        for picture, image in zip(shard.pictures, images, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
    with written_whole(path) as beside:
        pq.write_table(table, beside, compression="zstd", row_group_size=ROW_GROUP)


def to_png(image: Image.Image) -> bytes:
    """A picture's file, without loss."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
