"""Users, an encoder of them over tiny towers, adapters that read them, and choices as people have them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import IMAGE_SIZE
from tiny_scorers import pictures, tiny_scorer

from diffpref.scorer.features import towers_fingerprint
from diffpref.users.adapter import add_user_adapter, user_parameters
from diffpref.users.embedding import UserEmbedding
from diffpref.users.encoder import UserEncoder
from diffpref.users.eyes import Eyes
from diffpref.users.few_shot import Pair
from diffpref.users.personalized import denoiser_of

WIDTH = 8  # of a user
PROMPTS = ["a cat", "a dog, flat", "red", "a bird"]
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}  # FLUX would draw 512 pixels, whatever its transformer is
QUICK = {"num_inference_steps": 2, "output_type": "np", **SIZE}


def embedding(number: int, length: int = 1, width: int = 8, **facts) -> UserEmbedding:
    """A random user of unit vectors."""
    states = torch.randn(length, width, generator=torch.Generator().manual_seed(number))
    return UserEmbedding(torch.nn.functional.normalize(states, dim=1), **{"encoder": "tiny", "pairs": 4} | facts)


ME, YOU = embedding(1), embedding(2)


def trained(pipe, sequence: bool = False) -> None:
    """Give a pipeline an adapter that changes something."""
    denoiser, random = denoiser_of(pipe), torch.Generator().manual_seed(0)
    add_user_adapter(denoiser, WIDTH, sequence=sequence)
    with torch.no_grad():
        for name, parameter in user_parameters(denoiser).items():
            if "to_v_ip" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random))


def seeded(*seeds: int) -> list[torch.Generator]:
    """One for each picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def same(first, second) -> bool:
    """Whether two outputs hold the same pixels."""
    return np.array_equal(first.images, second.images)


def tiny_encoder(folder: Path, seed: int = 0) -> UserEncoder:
    """A random encoder, also written to folder/user_encoder; its scorer is in folder/scorer."""
    scorer = tiny_scorer(folder / "scorer")
    eyes = Eyes(scorer.towers, 1).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = UserEncoder(
            eyes.width, scorer.towers.width, WIDTH - 1, str(folder / "scorer"), 1, towers_fingerprint(eyes)
        )
        encoder.match.weight.data.normal_()
        encoder.look.weight.data.mul_(3)
    encoder.save_pretrained(folder / "user_encoder")
    return UserEncoder.from_pretrained(folder / "user_encoder")


def some_pairs(number: int = 4, seed: int = 0) -> list[Pair]:
    """Choices between random pictures."""
    drawn = pictures(2 * number, seed)
    return [Pair(PROMPTS[i % 4], drawn[2 * i], drawn[2 * i + 1]) for i in range(number)]


def write_folder(folder: Path, pairs: list[Pair], **columns: list) -> Path:
    """Picture files with a metadata.jsonl; `columns` are more of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, pair in enumerate(pairs):
        names = {"chosen": f"{i}-liked.png", "rejected": f"{i}-other.png"}
        for side, name in names.items():
            picture: Image.Image = getattr(pair, side)
            picture.save(folder / name)
        row = {"prompt": pair.prompt, **{f"{side}_file_name": name for side, name in names.items()}}
        lines.append(json.dumps(row | {name: values[i] for name, values in columns.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
