"""Joint preferences over prompts and pictures (DOVE, 2404.00530): each winner against the loser of another row.

Each picture stands under its own prompt, and the two prompts differ. Row i meets row i + s, in a circle; where both
have the same prompt, another s is tried. No picture is copied: each distance between two rows is one shifted table.
"""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from diffpref.config import DataConfig
from diffpref.data.columns import positions, read_columns, shifted, whole
from diffpref.data.votes import GIVEN

TRIES = 16  # shifts; each that fails leaves out the share of rows whose partner has the same prompt
TAKEN = {"rejected": "rejected", "prompt": "rejected_prompt"}


def joint_pairs(rows: Dataset | IterableDataset, config: DataConfig, seed: int = 0) -> Dataset:
    """Pairs -> pairs with rejected and rejected_prompt of another row; the rows that have no partner are left out.

    A tie, or a row without a label, is nobody's partner. Raises ValueError for streams, for other kinds than pairs, and
    where there is only one prompt.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("data.joint needs all rows at once, which data.streaming does not have")
    if "chosen" not in rows.column_names:
        raise ValueError(f"data.joint needs pairs; {config.path} has the columns {rows.column_names}")
    partner = partners(rows, np.random.default_rng(seed))
    kept = np.flatnonzero(partner >= 0)
    if not len(kept):
        raise ValueError(f"data.joint: no two rows of {config.path} with a winner have different prompts")
    if len(kept) < len(rows):
        print(
            f"data: {len(rows) - len(kept)} of {len(rows)} pairs find no other of another prompt (data.joint)",
            flush=True,
        )
    return arranged(rows, kept, partner[kept])


def partners(rows: Dataset, rng: np.random.Generator) -> np.ndarray:
    """For each row the one that its loser comes from, [rows], -1 where there is none."""
    names = [name for name in ("prompt", "margin") if name in rows.column_names]
    words = list(read_columns(rows, names))
    prompts = np.array([values["prompt"] for values in words], dtype=object)
    decided = np.array(["margin" not in values or bool(values["margin"]) for values in words])
    partner, here = np.full(len(rows), -1), np.arange(len(rows))
    for shift in shifts(len(rows), rng):
        there = (here + shift) % len(rows)
        fits = (partner < 0) & decided[there] & decided & (prompts != prompts[there])
        partner[fits] = there[fits]
    return partner


def shifts(rows: int, rng: np.random.Generator) -> Iterator[int]:
    """Different distances, in a random order."""
    yield from (int(shift) for shift in rng.permutation(np.arange(1, rows))[:TRIES])


def arranged(rows: Dataset, kept: np.ndarray, partner: np.ndarray) -> Dataset:
    """The rows `kept`, each with the loser of its partner."""
    labels = [name for name in ("probability", GIVEN) if name in rows.column_names]  # of pictures that part here
    base, at = whole(rows.remove_columns(labels)), positions(rows)
    distance = (at[partner] - at[kept]) % len(base)
    distances, which = np.unique(distance, return_inverse=True)
    columns = [*base.column_names, *(name for name in ("rejected_prompt",) if name not in base.column_names)]
    tables = [shifted(base, TAKEN, int(distance)).select_columns(columns) for distance in distances]
    return concatenate_datasets(tables).select(at[kept] + which * len(base))
