"""Whom the experiment of personalised tuning asks, about what: the users no one trained on; their few pairs, of the
concepts that preferences are trained on; and the pictures that are judged, of the other concepts."""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from diffpref.emoji_world.artwork import caption, load_artwork, split_concepts
from diffpref.emoji_world.choices import shipped_pool
from diffpref.emoji_world.held_out import HELD_OUT
from diffpref.emoji_world.preferences import Pool, drawings, pair_row
from diffpref.emoji_world.users import TRAIN, User, population
from diffpref.emoji_world.votes import seen

COUNTS = (1, 2, 4, 8, 16)  # pairs of a new user
MOST = max(COUNTS)
SEED = 6000  # of the choices that new users make
SIDES = ("chosen", "rejected")


def new_users(count: int | None = None) -> list[User]:
    """Users whose preferences no training saw; the first so many."""
    return list(population()[TRAIN:][:count])


def prompts(count: int | None = None) -> list[str]:
    """Of the concepts that no preference was trained on; the first so many."""
    return [caption(concept) for concept in split_concepts(load_artwork().concepts)[1][:count]]


# --- a user's few pairs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One choice: the prompt, PNG files of both pictures, and what users see in them, [2,K], the chosen one first."""

    prompt: str
    chosen: bytes
    rejected: bytes
    seen: np.ndarray

    def images(self) -> tuple[Image.Image, Image.Image]:
        """Both pictures."""
        return opened(self.chosen), opened(self.rejected)


def opened(png: bytes) -> Image.Image:
    """A PNG file as an RGB picture."""
    return Image.open(io.BytesIO(png)).convert("RGB")


@cache
def shipped() -> tuple[Pool, dict[bytes, np.ndarray]]:
    """The pictures that new users are asked about, and what is seen in each."""
    pool = shipped_pool()
    return pool, dict(zip(pool.png, pool.seen, strict=True))


def support_sets(user: User, sets: int, each: int = MOST) -> list[list[Said]]:
    """Sets of this user's choices, with the world's noise. No two choices, of one set or of two, are between the same
    pictures. The first n of a set are the support of n pairs, so supports are nested; more sets change none of the
    first ones."""
    (pool, look), rng = shipped(), np.random.default_rng((SEED, user.user_id))
    found: dict[frozenset, Said] = {}
    while len(found) < sets * each:
        row = pair_row(pool, user, len(found), rng)
        files = [row[side]["bytes"] for side in SIDES]
        said = Said(row["prompt"], *files, np.stack([look[png] for png in files]))
        found.setdefault(frozenset(files), said)
    every = list(found.values())
    return [every[s : s + each] for s in range(0, sets * each, each)]


# --- held-out concepts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """M pictures of held-out concepts: PNG files M, prompts M, drawn [M] where they are artwork, seen [M,K];
    comparisons that were made between them, pairs [P,2]."""

    files: list[bytes]
    prompts: np.ndarray
    drawn: np.ndarray
    seen: np.ndarray
    pairs: np.ndarray


@cache
def held_out(path: Path = HELD_OUT) -> Pictures:
    """The pictures of a file of choices, and its different comparisons."""
    rows = pq.read_table(path, columns=["prompt", *SIDES]).to_pylist()
    place: dict[tuple[str, bytes], int] = {}
    pairs = [[place.setdefault((row["prompt"], row[side]["bytes"]), len(place)) for side in SIDES] for row in rows]
    art, files = load_artwork(), [png for _, png in place]
    artwork = {image.tobytes() for image in drawings(art, split_concepts(art.concepts)[1])[1]}
    drawn = np.array([opened(png).tobytes() in artwork for png in files])
    asked = np.unique(np.sort(pairs, axis=1), axis=0)
    return Pictures(files, np.array([prompt for prompt, _ in place]), drawn, seen(files), asked)
