"""As many choices between two pictures as wanted, of the users one may train on, among the pictures that are there.

    python -m diffpref.emoji_world.choices --out runs/choices.parquet --pairs 24000

pairs.parquet is what a study of some size would have. A scorer that is to know the whole population needs more: this
asks the same 200 users about the same pictures again, with the same noise.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffpref.emoji_world.artwork import load_artwork, split_concepts
from diffpref.emoji_world.preferences import PAIRS, Pool, drawings, pair_row, write
from diffpref.emoji_world.users import TRAIN, population
from diffpref.emoji_world.votes import pictures, seen


def shipped_pool() -> Pool:
    """Every picture of the preference files, with what users look at."""
    art = load_artwork()
    drawn = {image.tobytes() for image in drawings(art, split_concepts(art.concepts)[0])[1]}
    found = [(prompt, png) for prompt, images in pictures().items() for png in images]
    is_drawn = [Image.open(io.BytesIO(png)).convert("RGB").tobytes() in drawn for _, png in found]
    files = [png for _, png in found]
    return Pool([prompt for prompt, _ in found], np.array(is_drawn), files, seen(files))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--pairs", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    pool, users, rng = shipped_pool(), population()[:TRAIN], np.random.default_rng((args.seed, 4))
    who = rng.permutation(args.pairs) % len(users)
    rows = [pair_row(pool, users[u], i, rng) for i, u in enumerate(tqdm(who, "choices", unit="choice"))]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(rows, PAIRS, args.out)
    print(f"{len(rows)} choices of {len(users)} users in {args.out}, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
