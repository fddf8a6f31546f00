"""What the benchmarks run on: the bundled small world, and encoders as large as Stable Diffusion 1.5's with random
weights, which cost the same time and memory as trained ones and need no download."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffpref.emoji_world.architecture import assemble, make_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
EMOJI = REPOSITORY / "diffpref" / "emoji_world" / "data"
ANIMALS, PLACES = ("cat", "dog", "heron", "carp"), ("on a roof", "in the rain", "by a lake", "under a lamp")


@dataclass(frozen=True)
class World:
    """A base, preferences, and how much of them is measured.

    Args:
        name: Of the world.
        what: In words.
        pairs: In the set.
        batch_size: Pairs in a batch.
        builds: How often the caches are built.
        warm: Batches before the clock starts, more than workers prefetch where batches are cheap.
        batches: Batches timed in a round without a cache.
        cached: Batches timed in a round with one.
        steps: Training steps timed in a round.
        side: Of the pictures, in pixels; of the large world only.
        channels: Of the VAE's levels; of the large world only.
        text: Width and layers of the text encoder; of the large world only.
    """

    name: str
    what: str
    pairs: int
    batch_size: int
    builds: int
    warm: int
    batches: int
    cached: int
    steps: int
    side: int = 0
    channels: tuple[int, ...] = ()
    text: tuple[int, int] = (0, 0)


LARGE = "VAE of Stable Diffusion 1.5 and CLIP-L's text encoder, random weights, fp32; a tiny denoiser"
FULL = (
    World("emoji", "the bundled emoji world", 2048, 16, builds=3, warm=10, batches=40, cached=80, steps=8),
    World(
        "large",
        LARGE,
        12,
        1,
        1,
        warm=1,
        batches=2,
        cached=20,
        steps=3,
        side=512,
        channels=(128, 256, 512, 512),
        text=(768, 12),
    ),
)
QUICK = (World("large", "the large world's classes, made small", 4, 1, 1, 1, 1, 1, 1, 64, (32, 32), (64, 2)),)


def make(world: World, folder: Path) -> tuple[Path, Path]:
    """(pipeline, preferences) of a world; those that are not bundled are written to the folder."""
    if world.name == "emoji":
        return EMOJI / "pipeline", EMOJI / "preferences" / "pairs.parquet"
    pipeline, pairs = folder / f"{world.name}-pipeline", folder / f"{world.name}.parquet"
    if not pairs.exists():
        save_pipeline(world, pipeline)
        save_pairs(world, pairs)
    return pipeline, pairs


def prompts(count: int) -> list[str]:
    """So many different prompts."""
    return [f"photo {i} of a {ANIMALS[i % 4]} {PLACES[i // 4 % 4]}" for i in range(count)]


def save_pipeline(world: World, folder: Path) -> None:
    """A stock pipeline out of configurations, random weights."""
    width, layers = world.text
    levels = len(world.channels)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(prompts(world.pairs), 77)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        pad_token_id=tokenizer.pad_token_id,
        **ends,
    )
    vae = AutoencoderKL(
        block_out_channels=world.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        sample_size=world.side,
    )
    unet = UNet2DConditionModel(
        sample_size=world.side // 2 ** (levels - 1),
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
    )
    assemble(vae, CLIPTextModel(text), tokenizer, unet).save_pretrained(folder)


def save_pairs(world: World, path: Path) -> None:
    """Photograph-like pictures as JPEG, a quarter wider than they are trained at."""
    sides = {side: [photo(world.side, 2 * i + n) for i in range(world.pairs)] for n, side in enumerate(SIDES)}
    features = Features({"prompt": Value("string")} | {side: ImageFeature(decode=False) for side in SIDES})
    Dataset.from_dict({"prompt": prompts(world.pairs), **sides}, features=features).to_parquet(path)


SIDES = ("chosen", "rejected")


def photo(side: int, seed: int) -> dict:
    """Smooth noise, of its own for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side * 5 // 4, side * 9 // 8), Image.Resampling.BICUBIC).save(
        file, "jpeg", quality=90
    )
    return {"bytes": file.getvalue(), "path": None}
