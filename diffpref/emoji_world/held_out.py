"""What a judge of the world is measured with: choices of unseen users among pictures of concepts that no preference was
trained on.

    python -m diffpref.emoji_world.held_out --pipeline diffpref/emoji_world/data/pipeline \
        --out diffpref/emoji_world/data/preferences/held_out.parquet

`population_probability` is the answer for one who knows the world but not the user: how probable a choice is when the
user is drawn anew from the population that users.py describes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Value
from tqdm import tqdm

from diffpref.emoji_world.preferences import PAIRS, Pool, make_pool, pair_row, write
from diffpref.emoji_world.users import TRAIN, User, choice_probability, make_population, population, utility

HELD_OUT = Path(__file__).parent / "data" / "preferences" / "held_out.parquet"
DRAWN = 4096  # users by which the population is stood for
SEED = 20_000  # of the first picture: beyond those of the other preferences and of the evaluations


def population_probability(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Attributes of two pictures [N,K] -> E_user[P(first chosen)], [N]: what nobody can predict better without knowing
    the user. Over as many users as the world could have had, none of whom is in it."""
    users = make_population(seed=1, train=DRAWN, unseen=0)
    return np.mean([choice_probability(u, utility(u, first), utility(u, second)) for u in users], axis=0)


def rows(pool: Pool, users: list[User], each: int, seed: int) -> list[dict]:
    """`each` choices of every user, in random order, with the population's answer."""
    rng = np.random.default_rng((seed, 3))
    who = rng.permutation(len(users) * each) % len(users)
    made = [pair_row(pool, users[u], i, rng) for i, u in enumerate(tqdm(who, "choices", unit="choice"))]
    look = {png: seen for png, seen in zip(pool.png, pool.seen, strict=True)}
    first, second = (np.stack([look[row[side]["bytes"]] for row in made]) for side in ("chosen", "rejected"))
    answers = population_probability(first, second)
    return [row | {"truth_population": p} for row, p in zip(made, answers.tolist(), strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline to sample from")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--pool", type=Path, default=Path("runs/emoji-held-out"), help="where sampled pictures wait")
    parser.add_argument("--images", type=int, default=768, help="pictures to sample")
    parser.add_argument("--pairs-per-user", type=int, default=36)
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.25], help="shards take these in turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pool, unseen = make_pool(args, held_out=True), list(population()[TRAIN:])
    made = rows(pool, unseen, args.pairs_per_user, args.seed)
    write(made, PAIRS | {"truth_population": Value("float32")}, args.out)
    answers = np.array([row["truth_population"] for row in made])
    print(f"{len(made)} choices of {len(unseen)} users in {args.out}, {args.out.stat().st_size / 1e6:.2f} MB")
    print(f"one who knows the population is right in {np.maximum(answers, 1 - answers).mean():.3f} of them on average")


if __name__ == "__main__":
    main()
