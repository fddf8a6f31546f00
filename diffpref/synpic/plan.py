"""What is to be drawn: pipelines × prompts × seeds, cut into shards that any process can make by itself.

settings.json in the folder of the pictures says what they are made of, so that no others get among them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffpref.config.identity import flatten
from diffpref.synpic.files import written_whole
from diffpref.users.files import ADAPTER, ENCODER, LORA

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # it becomes part of file names
SETTINGS = "settings.json"
PERSONAL = ("user", "user_adapter", "user_scale", "consensus")


@dataclass(frozen=True)
class Source:
    """A pipeline, under the name that its pictures bear.

    path: folder or hub id.  lora: folder, file or hub id of a LoRA on it.  steps, guidance, height and width (pixels):
    None for the pipeline's own.  variant: of its weights' files, such as fp16.  user_adapter: file, run's folder or hub
    id of an adapter that reads users; nobody's pictures without user, the file of one.  user_scale: how much they
    count.  consensus: of how many pictures the one is kept that the user likes best.
    """

    name: str
    path: str
    lora: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    user: str | None = None
    user_adapter: str | None = None
    user_scale: float | None = None
    consensus: int | None = None

    @property
    def scale(self) -> float:
        """How much the user counts."""
        return 1.0 if self.user_scale is None else self.user_scale

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its pictures depend on: files by their contents, wherever they lie, hub ids by their name."""
        made_of = {
            "pipeline": content(self.path, "**/*.safetensors", "**/*.json"),
            "lora": self.lora and lora_content(self.lora),
        }
        own = ("name", "path", "lora", *PERSONAL)
        made_of |= {key: value for key, value in asdict(self).items() if key not in own}
        return made_of | (self.personal if self.user_adapter is not None else {})  # without one, keys are as ever

    @property
    def personal(self) -> dict[str, Any]:
        """The same of whose pictures they are."""
        return {
            "user": self.user and content(self.user),
            "user_adapter": content(str(self.user_adapter), ADAPTER, *([f"{ENCODER}/*"] if self.consensus else [])),
            "user_scale": self.scale,
            "consensus": self.consensus,
        }


@dataclass(frozen=True)
class Picture:
    """One to draw. key: names it for good, by all that it depends on."""

    prompt: str
    seed: int
    key: str


@dataclass(frozen=True)
class Shard:
    """Pictures of one pipeline, kept in one file."""

    source: Source
    number: int
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.source.name}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """All that is to be drawn: one picture of each pipeline for each prompt and seed."""

    sources: tuple[Source, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    shard_size: int = 64

    def shards(self) -> list[Shard]:
        """Pipeline after pipeline, and prompt after prompt within each, with its seeds beside one another."""
        wanted = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        cuts = [wanted[start : start + self.shard_size] for start in range(0, len(wanted), self.shard_size)]
        return [
            Shard(source, number, tuple(picture(source, *one) for one in cut))
            for source in self.sources
            for number, cut in enumerate(cuts)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What the pictures in the folder depend on."""
        words = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {
            "prompts": {"count": len(self.prompts), "sha256": words},
            "seeds": list(self.seeds),
            "shard_size": self.shard_size,
            "pipelines": {source.name: source.settings for source in self.sources},
        }


def picture(source: Source, prompt: str, seed: int) -> Picture:
    """A picture to draw, with its key."""
    made_of = json.dumps([source.name, source.settings, prompt, seed], sort_keys=True)
    return Picture(prompt, seed, hashlib.sha256(made_of.encode()).hexdigest()[:24])


# --- files by their contents ----------------------------------------------------------------------------------------


def content(path: str, *patterns: str) -> str:
    """sha256 over the files of a folder that match, or of one file; the text itself where neither is there: a hub id.

    Raises ValueError for a folder that has no file of the first pattern, which is that of weights.
    """
    place = Path(path)
    if not place.exists():
        return path
    if place.is_dir() and not any(place.glob(patterns[0])):
        raise ValueError(f"{path} holds no weights in safetensors files")
    files = {file for pattern in patterns for file in place.glob(pattern)} if place.is_dir() else {place}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(place)} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def lora_content(path: str) -> str:
    """The same of a LoRA: of a run's folder the adapter alone, not its checkpoints."""
    return content(path, LORA if (Path(path) / LORA).is_file() else "*.safetensors")


# --- the folder -----------------------------------------------------------------------------------------------------


def open_folder(folder: Path, plan: Plan) -> None:
    """Make the folder, or go on with it; pipelines that are new to it are added.

    Raises ValueError, naming the keys that differ, where its pictures are made of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, new = folder / SETTINGS, plan.settings
    if not record.exists() and any(folder.glob("*.parquet")):
        raise ValueError(f"{folder} holds parquet files and no {SETTINGS}; give another --out")
    old = json.loads(record.read_text()) if record.exists() else new
    if keys := differing(old, new):
        raise ValueError(
            f"{folder} holds pictures made with other settings ({', '.join(keys)}, see {record});"
            " give another --out, or the settings of these"
        )
    merged = new | {"pipelines": old["pipelines"] | new["pipelines"]}
    if not record.exists() or merged != old:
        with written_whole(record) as beside:
            beside.write_text(json.dumps(merged, indent=2) + "\n")


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ; of pipelines, those that both have."""
    both = set(old["pipelines"]) & set(new["pipelines"])
    flat = [flatten(one | {"pipelines": {name: one["pipelines"][name] for name in both}}) for one in (old, new)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


# --- what a command line says ---------------------------------------------------------------------------------------


def read_prompts(given: Iterable[str]) -> tuple[str, ...]:
    """Prompts as they are, and those of text files, one a line; each once, in order.

    Raises FileNotFoundError for a .txt that is not there, ValueError where there is no prompt.
    """
    prompts = [prompt for text in given for prompt in (lines(Path(text)) if is_file(text) else [text])]
    kept = tuple(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not kept:
        raise ValueError("--prompts: there is no prompt among them")
    return kept


def is_file(text: str) -> bool:
    """Whether this is a file of prompts and not a prompt."""
    return Path(text).suffix == ".txt" or (len(text) < 256 and Path(text).is_file())


def lines(path: Path) -> list[str]:
    """Of a text file; U+2028 and the like end none. Raises FileNotFoundError or ValueError."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"--prompts: there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {path} is no text in UTF-8 ({error})") from error


def read_seeds(given: Sequence[str]) -> tuple[int, ...]:
    """["4"] -> 0, 1, 2, 3; ["3", "8", "11-13"] -> 3, 8, 11, 12, 13. Raises ValueError for anything else."""
    if len(given) == 1 and given[0].isdigit():
        given = [f"0-{int(given[0]) - 1}"] if int(given[0]) else []
    seeds = [seed for text in given for seed in seed_range(text)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("--seeds: give their number, or different seeds such as 3 8 11-13")
    return tuple(seeds)


def seed_range(text: str) -> range:
    """ "3" or "11-13" -> the seeds. Raises ValueError."""
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
        raise ValueError(f"--seeds: {text!r} is neither a seed nor a range of seeds such as 11-13")
    return range(int(first), int(last or first) + 1)
