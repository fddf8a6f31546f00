"""The preference set: what the simulated users chose among pictures of the pipeline and of the artwork.

    python -m diffpref.emoji_world.preferences --pipeline diffpref/emoji_world/data/pipeline \
        --out diffpref/emoji_world/data/preferences

A choice among k pictures is a draw from one user's Plackett-Luce model (for two pictures: Bradley-Terry, see users.py),

    sort by U(x) / temperature + Gumbel noise, or, for a share 2 * flip of the choices, at random.

Sampling is what takes long; its pictures go to a pool of shards, and a run that was killed goes on from there.
"""

import argparse
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from diffpref.config import ModelConfig
from diffpref.emoji_world.artwork import Artwork, caption, load_artwork, split_concepts
from diffpref.emoji_world.users import User, attributes, choice_probability, majority, population, utility
from diffpref.families import load_pipeline
from diffpref.sample import sample

SHARD = 128  # pictures
LIST = 4  # pictures in a ranking
SOURCES = {"samples": 0.6, "artwork": 0.2, "mixed": 0.2}  # shares of the choices by what is chosen among


# --- the pool: pictures to choose among ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """M pictures: what they show, whether they are drawings, PNG bytes, and the attributes [M,K] users look at."""

    concepts: list[str]
    drawn: np.ndarray
    png: list[bytes]
    seen: np.ndarray


def fingerprint(pipeline: Path) -> str:
    """Of the denoiser's weights."""
    return hashlib.sha256((pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]


def open_pool(folder: Path, settings: dict) -> None:
    """Make the folder or go on with it. Raises ValueError when its pictures were made with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    record, text = folder / "settings.json", json.dumps(settings, indent=2)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"the pictures in {folder} were made with other settings ({record}); give another --pool")
    record.write_text(text)


def sample_shards(args: argparse.Namespace, concepts: list[str]) -> Iterator[list[Image.Image]]:
    """Shards of SHARD pictures, kept on disk; picture i shows concept i (mod their number) with seed `seed + i`."""
    made_with = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed, "concepts": concepts}
    open_pool(args.pool, {"pipeline": fingerprint(args.pipeline), **made_with})
    pipe = None
    for shard in tqdm(range(-(-args.images // SHARD)), "sampling", unit="shard"):
        path = args.pool / f"shard-{shard:04d}.npy"
        if not path.exists():
            pipe = pipe or load_pipeline(ModelConfig(str(args.pipeline))).to(args.device)
            indices = range(shard * SHARD, (shard + 1) * SHARD)
            images = sample(
                pipe,
                [caption(concepts[i % len(concepts)]) for i in indices],
                [args.seed + i for i in indices],
                num_inference_steps=args.steps,
                guidance_scale=args.guidance[shard % len(args.guidance)],
                batch_size=args.batch_size,
            )
            np.save(path.with_suffix(".writing.npy"), np.stack([np.asarray(i) for i in images]))
            path.with_suffix(".writing.npy").rename(path)  # a killed run leaves no half shard
        yield [Image.fromarray(pixels) for pixels in np.load(path)]


def to_png(image: Image.Image) -> bytes:
    """A picture as a small PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def drawings(art: Artwork, concepts: list[str]) -> tuple[list[str], list[Image.Image]]:
    """The drawings of these concepts, without the pairs that are kept from the pipeline."""
    picked = [i for i in art.training.tolist() if art.concepts[art.concept[i]] in concepts]
    pixels = art.images[picked].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [art.caption(i, styled=False) for i in picked], [Image.fromarray(p) for p in pixels]


def make_pool(args: argparse.Namespace, held_out: bool = False) -> Pool:
    """Sampled pictures and drawings of the preference-training concepts, or of those held out from all preferences."""
    art = load_artwork()
    concepts = split_concepts(art.concepts)[held_out]
    if args.images < LIST * len(concepts):
        raise ValueError(f"--images must be at least {LIST * len(concepts)}: {LIST} for each of the concepts")
    pictures = [i for shard in sample_shards(args, concepts) for i in shard][: args.images]
    sampled = [concepts[i % len(concepts)] for i in range(len(pictures))]
    named, drawn = drawings(art, concepts)
    images = pictures + drawn
    is_drawn = np.arange(len(images)) >= len(pictures)
    return Pool(sampled + named, is_drawn, [to_png(i) for i in images], attributes(images))


# --- choices ---------------------------------------------------------------------------------------------------------


def candidates(pool: Pool, k: int, rng: np.random.Generator) -> tuple[list[int], str]:
    """k different pictures of one concept, and where they come from; "mixed" holds at least one of each."""
    concept = pool.concepts[rng.integers(len(pool.concepts))]
    of = np.array([c == concept for c in pool.concepts])
    sampled, drawn = np.flatnonzero(of & ~pool.drawn), np.flatnonzero(of & pool.drawn)
    source = rng.choice(list(SOURCES), p=list(SOURCES.values()))
    count = {"samples": 0, "artwork": min(k, len(drawn)), "mixed": rng.integers(1, k)}[source]
    picked = [*rng.choice(drawn, min(count, len(drawn)), replace=False)]
    picked += [*rng.choice(sampled, k - len(picked), replace=False)]
    return rng.permutation(picked).tolist(), str(source)


def rank(user: User, utilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Utilities [k] -> the pictures' order [k] as this user puts them once, best first (Plackett-Luce, with slips)."""
    if rng.random() < 2 * user.flip:  # half of the random orders of two are right
        return rng.permutation(len(utilities))
    return np.argsort(-(utilities / user.temperature + rng.gumbel(size=len(utilities))))


def pair_row(pool: Pool, user: User, group: int, rng: np.random.Generator) -> dict:
    """One choice between two pictures."""
    picked, source = candidates(pool, 2, rng)
    own, common = utility(user, pool.seen[picked]), utility(majority(), pool.seen[picked])
    best, worst = rank(user, own, rng)
    return {
        "prompt": caption(pool.concepts[picked[0]]),
        "chosen": {"bytes": pool.png[picked[best]], "path": None},
        "rejected": {"bytes": pool.png[picked[worst]], "path": None},
        "user_id": user.user_id,
        "group_id": group,
        "source": source,
        "truth_chosen": own[best],
        "truth_rejected": own[worst],
        "truth_probability": choice_probability(user, own[best], own[worst]),
        "truth_majority_chosen": common[best],
        "truth_majority_rejected": common[worst],
    }


def list_row(pool: Pool, user: User, group: int, rng: np.random.Generator) -> dict:
    """One ranking of LIST pictures; rank 1 is the best."""
    picked, source = candidates(pool, LIST, rng)
    own, common = utility(user, pool.seen[picked]), utility(majority(), pool.seen[picked])
    return {
        "prompt": caption(pool.concepts[picked[0]]),
        "images": [{"bytes": pool.png[i], "path": None} for i in picked],
        "ranks": (np.argsort(rank(user, own, rng)) + 1).tolist(),
        "user_id": user.user_id,
        "group_id": group,
        "source": source,
        "truth_scores": own.tolist(),
        "truth_majority_scores": common.tolist(),
    }


COMMON = {"prompt": Value("string"), "user_id": Value("int32"), "group_id": Value("int32"), "source": Value("string")}
TRUTHS = ("truth_chosen", "truth_rejected", "truth_probability", "truth_majority_chosen", "truth_majority_rejected")
PAIRS = {"chosen": ImageFeature(), "rejected": ImageFeature(), **COMMON, **{name: Value("float32") for name in TRUTHS}}
SCORES = {name: List(Value("float32")) for name in ("truth_scores", "truth_majority_scores")}
LISTS = {"images": List(ImageFeature()), "ranks": List(Value("int32")), **COMMON, **SCORES}


def write(rows: list[dict], features: dict, path: Path) -> Dataset:
    """Write parquet that `datasets` decodes. A picture that recurs in a column is stored once (dictionary pages)."""
    ordered = Features({name: features[name] for name in rows[0]})
    data = Dataset.from_list(rows, features=ordered)
    whole = {"row_group_size": len(rows), "dictionary_pagesize_limit": 2**26}  # one dictionary for the file
    pq.write_table(data.data.table, path, compression="zstd", **whole)
    return data


# --- the command -----------------------------------------------------------------------------------------------------

CARD = """---
license: [mit, apache-2.0]
configs:
- {{config_name: pairs, data_files: pairs.parquet, default: true}}
- {{config_name: lists, data_files: lists.parquet}}
- {{config_name: unseen_users, data_files: unseen_users.parquet}}
- {{config_name: held_out, data_files: held_out.parquet}}
- {{config_name: votes, data_files: votes.parquet}}
---
# Preferences of the emoji world's simulated users

Made by `python -m diffpref.emoji_world.preferences`; no person was asked. Prompts are the bare names of {concepts}
concepts; the other concepts of the world appear in held_out.parquet alone. {images} pictures were sampled from the
world's pipeline ({steps} steps, guidance {guidance}, seed {seed}); the others are its artwork (the world's README.md
names licences and authors).

| file | rows | users |
|---|---|---|
| pairs.parquet | {pairs} choices between two pictures | 200 to train on |
| lists.parquet | {lists} rankings of four | the same |
| unseen_users.parquet | {unseen} choices between two | 56 others |
| held_out.parquet | 2016 choices, of the other concepts (`python -m diffpref.emoji_world.held_out`) | the 56 others |
| votes.parquet | 320 lists of four, five votes each (`python -m diffpref.emoji_world.votes`) | 200 to train on |

- `prompt`; `chosen`, `rejected`, or `images` and their `ranks` (1 is the best)
- `voter_0` … `voter_4`: of each picture, the share of the others that this voter put below it
- `user_id`: an entry of users.json; `group_id`: one choice; `source`: "samples", "artwork" or "mixed"
- `truth_*`: **the answers, for evaluation only.** The user's true utilities, the probability of the choice as it fell,
  and the majority's utilities; in held_out.parquet also `truth_population`, the probability for one who knows the
  population but not the user. No training configuration reads them.
"""


def label(pool: Pool, args: argparse.Namespace) -> dict[str, Dataset]:
    """Every user chooses about equally often; writes the three files."""
    train, unseen = ([u for u in population() if u.split == split] for split in ("train", "unseen"))
    tables = {
        "pairs": (pair_row, PAIRS, train, args.pairs),
        "lists": (list_row, LISTS, train, args.lists),
        "unseen_users": (pair_row, PAIRS, unseen, args.unseen_pairs),
    }
    written = {}
    for number, (name, (row, features, users, count)) in enumerate(tables.items()):
        rng = np.random.default_rng((args.seed, number))
        who = rng.permutation(count) % len(users)
        rows = [row(pool, users[u], i, rng) for i, u in enumerate(tqdm(who, name, unit="choice"))]
        written[name] = write(rows, features, args.out / f"{name}.parquet")
    return written


def summary(pairs: Dataset) -> str:
    """What the labels are worth."""
    probability = np.array(pairs["truth_probability"])
    margin = np.array(pairs["truth_majority_chosen"]) - np.array(pairs["truth_majority_rejected"])
    decisive = np.maximum(probability, 1 - probability) > 0.75
    return (
        f"pairs decided with probability > 0.75: {decisive.mean():.2f}; "
        f"labels that agree with their user's utilities: {(probability > 0.5).mean():.2f}, "
        f"with the majority's: {(margin > 0).mean():.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline to sample from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pool", type=Path, default=Path("runs/emoji-pool"), help="where sampled pictures wait")
    parser.add_argument("--images", type=int, default=2560, help="pictures to sample")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--lists", type=int, default=800)
    parser.add_argument("--unseen-pairs", type=int, default=1120, help="pairs of users who are not trained on")
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.25], help="shards take these in turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pool = make_pool(args)
    written = label(pool, args)
    concepts, guidance = len(set(pool.concepts)), " and ".join(map(str, args.guidance))
    counts = {"pairs": args.pairs, "lists": args.lists, "unseen": args.unseen_pairs, "concepts": concepts}
    made = {"images": args.images, "steps": args.steps, "guidance": guidance, "seed": args.seed}
    (args.out / "README.md").write_text(CARD.format(**counts, **made))
    print(summary(written["pairs"]))
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
