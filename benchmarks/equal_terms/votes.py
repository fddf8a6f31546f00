"""The labels that every objective learns from: lists of four pictures, each voted on by five simulated users.

All views are of the same votes on the same pictures, and show them equally often: a list of four is two pairs is four
likes. Concepts whose pictures choose the settings and measure ranking are in no list.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from diffpref.emoji_world.preferences import LIST
from diffpref.emoji_world.users import User, majority, utility
from diffpref.emoji_world.votes import ballots, groups, pictures, seen, voters

KEPT_OUT = 24  # concepts that no list shows
NOISE = (0, 10, 20, 30, 40)  # per cent of the pairs whose label is turned round
SEED = 4


# --- the lists --------------------------------------------------------------------------------------------------------


def split(prompts: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(to train on, kept out for validation)"""
    order = rng.permutation(prompts).tolist()
    return sorted(order[KEPT_OUT:]), sorted(order[:KEPT_OUT])


def wins(ballots: np.ndarray) -> np.ndarray:
    """[users,k] -> [k,k]: the share of users that put picture i above picture j; 0 on the diagonal."""
    return (ballots[:, :, None] > ballots[:, None, :]).mean(axis=0)


def vote_scores(wins: np.ndarray) -> np.ndarray:
    """[k,k] -> [k]: C_i / (n (k - 1)), the share of a picture's comparisons that it won (RankDPO, section 3)."""
    return wins.sum(axis=1) / (len(wins) - 1)


@dataclass(frozen=True)
class Voted:
    """One list: pictures (PNG), wins [k,k], scores [k]."""

    prompt: str
    images: list[bytes]
    wins: np.ndarray
    scores: np.ndarray


def voted_lists() -> tuple[list[Voted], list[dict], list[str]]:
    """(lists of the training concepts, pairs of the others in their true order, the others' prompts), the same each
    time."""
    rng = np.random.default_rng(SEED)
    of = pictures()
    trained, kept_out = split(list(of), rng)
    made = groups(of, trained, LIST, rng)
    look = seen([png for _, images in made for png in images]).reshape(len(made), LIST, -1)
    users = [voters(rng) for _ in made]  # all first: the votes draw from the same generator
    lists = [vote(*group, *cast, rng) for group, *cast in zip(made, users, look, strict=True)]
    return lists, true_pairs(groups(of, kept_out, 2, rng)), kept_out


def vote(prompt: str, images: list[bytes], users: list[User], look: np.ndarray, rng: np.random.Generator) -> Voted:
    """The users' votes on one list."""
    won = wins(ballots(users, look, rng))
    return Voted(prompt, images, won, vote_scores(won))


def true_pairs(made: list[tuple[str, list]]) -> list[dict]:
    """Pairs of pictures, the one with the larger true utility of the majority first."""
    true = utility(majority(), seen([png for _, pair in made for png in pair])).reshape(-1, 2)
    sides = zip(made, np.argsort(-true, axis=1), strict=True)
    return [{"prompt": p, "chosen": picture(pair[a]), "rejected": picture(pair[b])} for (p, pair), (a, b) in sides]


# --- views -----------------------------------------------------------------------------------------------------------


def picture(png: bytes) -> dict:
    """As `datasets` stores one."""
    return {"bytes": png, "path": None}


def list_rows(lists: list[Voted]) -> list[dict]:
    """The lists themselves."""
    labels = [{"scores": v.scores.tolist(), "wins": v.wins.tolist()} for v in lists]
    return [
        {"prompt": v.prompt, "images": [picture(i) for i in v.images]} | s for v, s in zip(lists, labels, strict=True)
    ]


def pair_rows(lists: list[Voted], rng: np.random.Generator) -> list[dict]:
    """Two pairs of each list that have no picture in common; the majority's winner first."""
    return [pair_row(v, *sides) for v in lists for sides in rng.permutation(LIST).reshape(-1, 2).tolist()]


def pair_row(v: Voted, a: int, b: int) -> dict:
    """One pair; probability is the share of votes for the winner."""
    a, b = (a, b) if v.wins[a, b] > 0.5 else (b, a)
    sides = {"chosen": picture(v.images[a]), "rejected": picture(v.images[b])}
    return {"prompt": v.prompt, **sides, "probability": float(v.wins[a, b])}


def like_rows(lists: list[Voted]) -> list[dict]:
    """Each picture by itself: liked if it won more than half of its comparisons."""
    scored = [(v.prompt, i, s) for v in lists for i, s in zip(v.images, v.scores, strict=True)]
    return [{"prompt": p, "image": picture(i), "label": bool(s > 0.5)} for p, i, s in scored]


def pair_like_rows(pairs: list[dict]) -> list[dict]:
    """Each picture of the pairs by itself: winners are liked, losers are not."""
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": p["prompt"], "image": p[side], "label": liked} for p in pairs for side, liked in sides]


def dual_rows(pairs: list[dict], prompts: list[str], rng: np.random.Generator) -> list[dict]:
    """The pairs, with the prompt of another concept for each loser."""
    return [row | {"rejected_prompt": another(row["prompt"], prompts, rng)} for row in pairs]


def caption_rows(dual: list[dict]) -> list[dict]:
    """The winners by themselves, each with its own prompt and another's."""
    return [{"prompt": d["prompt"], "image": d["chosen"], "rejected_prompt": d["rejected_prompt"]} for d in dual]


def another(prompt: str, prompts: list[str], rng: np.random.Generator) -> str:
    """One of the other prompts."""
    return str(rng.choice([p for p in prompts if p != prompt]))


def flip(pairs: list[dict], percent: int) -> list[dict]:
    """The pairs with a share of them turned round: so many of each ten, the same ones and more at a larger share. The
    votes' share is then that of the wrong side, as if it had been counted wrongly."""
    rng = np.random.default_rng(SEED)
    place = np.concatenate([rng.permutation(10) for _ in range(-(-len(pairs) // 10))])[: len(pairs)]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    return [turned[i] if place[i] * 10 < percent else pairs[i] for i in range(len(pairs))]


# --- files -----------------------------------------------------------------------------------------------------------

PICTURE, NUMBER = ImageFeature(decode=False), Value("float64")
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("prompt", "rejected_prompt"), Value("string")),
    **dict.fromkeys(("chosen", "rejected", "image"), PICTURE),
    "images": List(PICTURE),
    "label": Value("bool"),
    "probability": NUMBER,
    "scores": List(NUMBER),
    "wins": List(List(NUMBER)),
}


def write(path: Path, rows: list[dict]) -> None:
    """Rows to parquet; the file is whole or not there."""
    part = path.with_suffix(".part")
    features = Features({name: COLUMNS[name] for name in rows[0]})
    Dataset.from_list(rows, features=features).to_parquet(part)
    part.replace(path)


def views(lists: list[Voted], prompts: list[str]) -> dict[str, list[dict]]:
    """Name of a file -> its rows."""
    rng = np.random.default_rng(SEED)
    pairs = pair_rows(lists, rng)
    dual = dual_rows(pairs, prompts, rng)
    made = {"lists": list_rows(lists), "likes": like_rows(lists), "captions": caption_rows(dual), "dual": dual}
    for percent in NOISE:
        made[f"pairs-{percent}"] = flip(pairs, percent)
        made[f"pair_likes-{percent}"] = pair_like_rows(made[f"pairs-{percent}"])
    return made


def make(folder: Path) -> None:
    """Write all views, the held-out pairs and the validation prompts into a folder, unless they are there."""
    done = folder / "validation_prompts.txt"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lists, held_out, prompts = voted_lists()
    for name, rows in views(lists, sorted({v.prompt for v in lists})).items():
        write(folder / f"{name}.parquet", rows)
    write(folder / "held_out.parquet", held_out)
    done.write_text("\n".join(prompts) + "\n")  # last: it says that all is there
