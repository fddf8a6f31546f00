"""A few choices of a person -> the embedding of their taste."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpref.config import DataConfig
from diffpref.data import check, kind_of, load_preferences
from diffpref.data.kinds import Kind, Row
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.score import Ready, batches
from diffpref.users.embedding import UserEmbedding
from diffpref.users.encoder import UserEncoder
from diffpref.users.files import ENCODER

SIDES = ("chosen", "rejected")
BATCH = 32  # pictures at once


@dataclass(frozen=True)
class Pair:
    """A choice: chosen was liked better than rejected, both for the prompt. Pictures of any form that scorers take:
    files, bytes, PIL images, arrays, tensors.  source: what messages call it."""

    prompt: str
    chosen: Any
    rejected: Any
    source: str = ""


def encode_user(
    pairs: Sequence[Pair] | str | PathLike[str],
    encoder: UserEncoder | str | PathLike[str],
    *,
    whose: Any = None,
    name: str = "",
) -> UserEmbedding:
    """The embedding of a person who made these choices; their order is of no influence.

    Args:
        pairs: A list, or where it is read from: parquet, JSON lines, a folder with metadata.jsonl, …
        encoder: The encoder, its folder, or the folder of the run that tuned an adapter with it.
        whose: With rows of several users, which one.
        name: What the embedding is to be called.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: No pairs, pairs of several users, or one that cannot be used: the first, with its number.
    """
    if isinstance(pairs, str | PathLike):
        pairs = read_pairs(DataConfig(path=str(pairs), faults="raise"), whose)
    return embedding_of(list(pairs), encoder if isinstance(encoder, UserEncoder) else load_encoder(encoder), name)


def embedding_of(some: list[Pair], encoder: UserEncoder, name: str = "") -> UserEmbedding:
    """The same, of a list and with an encoder in memory, which is left in the mode it was found in."""
    if not some:
        raise ValueError("no pairs: a taste is read from one at least, and better from four")
    support, training = pair_features(some, encoder.scorer())[None], encoder.training
    place = next(encoder.parameters()).device
    try:
        with torch.inference_mode():
            state = encoder.eval()(support.to(place), torch.ones(support.shape[:2], dtype=torch.bool, device=place))[0]
    finally:
        encoder.train(training)
    return UserEmbedding(state.clone(), encoder.id, len(some), name)


def load_encoder(folder: str | PathLike[str]) -> UserEncoder:
    """The encoder in a folder, or in that of a run. Raises as `UserEncoder.from_pretrained`."""
    inside = Path(folder) / ENCODER
    return UserEncoder.from_pretrained(inside if inside.is_dir() else folder)


# --- pairs ------------------------------------------------------------------------------------------------------------


def read_pairs(config: DataConfig, whose: Any = None) -> list[Pair]:
    """The choices of one user in a set of pairs or lists; pictures are not decoded.

    Raises FileNotFoundError, or ValueError for rows that say nothing of choices between pictures, for a row that cannot
    be used, and for those of several users where none is named.
    """
    rows = load_preferences(config)
    kind = kind_of(rows.column_names, config)
    if kind.name not in ("pairs", "lists"):
        raise ValueError(
            f"{config.path} holds {kind.name}; a taste is read from choices between pictures: pairs, lists"
        )
    rows = check(rows, config).rows
    mine = of_user(rows, whose, config.path) if "user_id" in (rows.column_names or ()) else rows
    if whose is not None and mine is rows:
        raise ValueError(f"{config.path} has no column user_id, so that {whose!r} cannot be told from others")
    return [pair for row in mine for pair in choices(row, kind, config)]


def of_user(rows: Any, whose: Any, path: str) -> Any:
    """The rows of one user. Raises ValueError where that is not clear."""
    known = [str(user) for user in dict.fromkeys(rows["user_id"]) if user is not None and user == user]
    if whose is None and len(known) > 1:
        raise ValueError(f"{path} holds choices of {len(known)} users ({', '.join(known[:3])}, …): say whose")
    if whose is None:
        return rows
    if str(whose) not in known:
        raise ValueError(f"{path} has no choices of the user {whose!r}; it has those of {', '.join(known[:3])}, …")
    return rows.select([i for i, user in enumerate(rows["user_id"]) if str(user) == str(whose)])


def choices(row: Row, kind: Kind, config: DataConfig) -> Iterator[Pair]:
    """What a row says, pair by pair."""
    said, named = kind.says(row, config), kind.named_pictures(row)
    names, pictures = list(named), list(named.values())
    for better, worse in said.pairs:
        (chosen, prompt), (rejected, _) = said.items[better], said.items[worse]
        source = f"row {row['row']} of {config.path}, {names[chosen]} and {names[rejected]}"
        yield Pair(prompt, pictures[chosen], pictures[rejected], source)


# --- features ---------------------------------------------------------------------------------------------------------


def pair_features(pairs: Sequence[Pair], scorer: PreferenceScorer) -> Tensor:
    """K pairs -> [K,3,D], unit vectors of the prompt, the chosen and the rejected picture, on the CPU.

    Raises ValueError or FileNotFoundError for the first pair that has no prompt or whose picture cannot be used, with
    its number, from 1.
    """
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair.prompt, str) or not pair.prompt.strip():
            raise ValueError(f"pair {number}{known_as(pair)} has no prompt")
    prompts = scorer.embed(prompts=[pair.prompt for pair in pairs]).prompts
    items = (((getattr(pair, side),), None) for pair in pairs for side in SIDES)
    found: list[Tensor] = []
    for chunk in batches(scorer, items, BATCH, None, prompted=False):
        refuse(chunk, pairs, len(found))
        with torch.inference_mode():
            found += scorer.towers.images(torch.stack([ready.prepared[0] for ready in chunk])).cpu()
    return torch.cat([prompts[:, None], torch.stack(found).unflatten(0, (len(pairs), 2))], dim=1)


def refuse(chunk: list[Ready], pairs: Sequence[Pair], before: int) -> None:
    """Raise the first error, saying whose picture it is."""
    for place, ready in enumerate(chunk, before):
        if ready.error is not None:
            pair, side = pairs[place // 2], SIDES[place % 2]
            kind = FileNotFoundError if isinstance(ready.error, FileNotFoundError) else ValueError
            raise kind(
                f"pair {place // 2 + 1}{known_as(pair)}: the {side} picture{file_of(getattr(pair, side))} cannot be"
                f" used ({ready.error})"
            ) from ready.error


def known_as(pair: Pair) -> str:
    """Where a pair was read from, in a message."""
    return f" ({pair.source})" if pair.source else ""


def file_of(picture: Any) -> str:
    """The file of a picture, in a message."""
    path = picture.get("path") if isinstance(picture, dict) else picture if isinstance(picture, str | Path) else None
    return f" {path}" if path else ""
