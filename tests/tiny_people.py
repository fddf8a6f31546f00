"""People who like red and people who like blue, their choices in files, and short runs that train encoders on them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_users import tiny_encoder

from diffpref.cache.team import Team
from diffpref.data import load_preferences
from diffpref.users.choices import Choices, open_choices
from diffpref.users.encoder import UserEncoder
from diffpref.users.meta.config import EpisodeConfig, load_encoder_config
from diffpref.users.meta.episodes import EpisodeStream

PEOPLE, EACH, PROMPTS = 32, 9, 12
BROKEN, NAMELESS = 4, 7  # rows
FEATURES = Features(
    {"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature(), "user_id": Value("string")}
)


def tinted(red: bool, seed: int) -> bytes:
    """A PNG file of patches that are more or less red, or blue."""
    random = np.random.default_rng(seed)
    pixels = random.integers(40, 120, (4, 4, 3))
    pixels[..., 0 if red else 2] += random.integers(60, 130)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def rows_of_people() -> dict[str, list]:
    """Half of the people like red, the others blue; of each prompt there are two pictures of each colour."""
    random = np.random.default_rng(0)
    shown = [[[tinted(red, 1000 * p + 10 * k + red) for k in (0, 1)] for red in (False, True)] for p in range(PROMPTS)]
    made: dict[str, list] = {name: [] for name in FEATURES}
    for person in range(PEOPLE):
        for prompt in random.permutation(PROMPTS)[:EACH]:
            liked = person % 2
            pair = [shown[prompt][colour][random.integers(2)] for colour in (liked, 1 - liked)]
            for name, value in zip(FEATURES, (f"thing {prompt}", *pair, f"person {person}"), strict=True):
                made[name].append({"bytes": value, "path": None} if isinstance(value, bytes) else value)
    return made


def make_people(folder: Path) -> Path:
    """A tiny scorer, an encoder of its towers, and choices: pairs.parquet, and some.parquet of the first three people,
    with a broken picture and a row of nobody."""
    tiny_encoder(folder)
    made = rows_of_people()
    Dataset.from_dict(made, features=FEATURES).to_parquet(folder / "pairs.parquet")
    some = {name: list(values[: 3 * EACH]) for name, values in made.items()}
    some["chosen"][BROKEN] = {"bytes": b"no picture", "path": None}
    some["user_id"][NAMELESS] = None
    Dataset.from_dict(some, features=FEATURES).to_parquet(folder / "some.parquet")
    return folder


def arguments(world: Path, name: str, **sections: Any) -> list[str]:
    """A short run; sections are laid over its configuration."""
    config = {
        "name": name,
        "output_dir": str(world / "runs"),
        "data": {"path": str(world / "pairs.parquet"), "num_workers": 0},
        "cache": {"folder": str(world / "cache")},
        "encoder": {"towers": str(world / "scorer"), "levels": 1, "rank": 4},
        "train": {"max_train_steps": 6, "train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1},
        "episodes": {"support": [0, 6], "query": 4, "held_out": 0.3},
    }
    for key, section in sections.items():
        config[key] = config.get(key, {}) | section if isinstance(section, dict) else section
    (world / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(world / f"{name}.yaml")]


def choices_of(world: Path, file: str = "pairs.parquet") -> Choices:
    """What the encoder's eyes see of a file."""
    config = load_encoder_config(arguments(world, "choices", data={"path": str(world / file)}))
    towers = UserEncoder.from_pretrained(world / "user_encoder").scorer().towers
    return open_choices(load_preferences(config.data), config, towers, Team())


def stream(choices: Choices, persons: list[str], *, batches: int = 6, **options: Any) -> EpisodeStream:
    config = EpisodeConfig(support=options.pop("support", (0, 3)), query=options.pop("query", 3))
    given = {"seed": 0, "size": 5} | options
    return EpisodeStream(choices, persons, config, batches=range(batches), **given)
