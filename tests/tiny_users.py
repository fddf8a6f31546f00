"""A tiny encoder of users over tiny towers, and choices of a person in the forms that people have them in."""

import json
from pathlib import Path

import torch
from PIL import Image
from tiny_scorers import pictures, tiny_scorer

from diffpref.scorer.features import towers_fingerprint
from diffpref.users.encoder import UserEncoder
from diffpref.users.eyes import Eyes
from diffpref.users.few_shot import Pair

RANK = 7  # so that users are 8 wide
PROMPTS = ["a cat", "a dog, flat", "red", "a bird"]


def tiny_encoder(folder: Path, seed: int = 0) -> UserEncoder:
    """A random encoder, also written to folder/user_encoder; its scorer is in folder/scorer."""
    scorer = tiny_scorer(folder / "scorer")
    eyes = Eyes(scorer.towers, 1).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = UserEncoder(
            eyes.width, scorer.towers.width, RANK, str(folder / "scorer"), 1, towers_fingerprint(eyes)
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
