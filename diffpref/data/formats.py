"""Published layouts of preference sets -> our own columns.

    pairs:    prompt, chosen, rejected    (+ rejected_prompt, weight, margin, probability, user_id, group_id)
    lists:    prompt, images, scores      (+ wins, weight, user_id, group_id)
    likes:    prompt, image, label        (+ weight, user_id, group_id)
    captions: prompt, image, rejected_prompt

A layout is a row of FORMATS: its columns renamed, and a verdict that reads the labels (never the pictures) and says
what they mean. Where the side of the winner differs from row to row, the rows are selected from two tables over the
same memory (columns.py). Pictures are neither decoded nor copied, with one exception: a set that has one picture in a
row, with its bytes, has to be written once more as lists, into the cache of `datasets`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Image, List, Value

from diffpref.config import DataConfig
from diffpref.data.kinds import LABELS, beaten

Verdict = Callable[[dict[str, Any], DataConfig], dict[str, Any]]

CARRIED = (
    "rejected_prompt",
    "weight",
    "margin",
    "probability",
    "wins",
    "user_id",
    "group_id",
)  # under our names, if they are there
PICTURE = Image(decode=False)
FEATURES: dict[str, Any] = {  # of the columns that are made here
    "prompt": Value("string"),
    "chosen": PICTURE,
    "rejected": PICTURE,
    "image": PICTURE,
    "images": List(PICTURE),
    "rejected_prompt": Value("string"),
    "margin": Value("float64"),
    "probability": Value("float64"),
    "label": Value("float64"),
    "scores": List(Value("float64")),
    "wins": List(List(Value("float64"))),
    "given": List(List(Value("float64"))),
}


@dataclass(frozen=True)
class Format:
    """A layout.

    kind: of its rows.  columns: ours -> theirs, all of them must be there.  labels: what the verdict reads and must be
    there too, unless data.scorers decide instead.  hints: what it reads if it is there.  makes: our columns that the
    verdict gives; it may also say turned, that the second picture won, or None, that nobody knows.  extra: ours ->
    theirs, if they are there.  grouped: the column that says which rows, of one picture each, are one list.  ids: the
    columns that identify the two pictures, so that their bytes need not be compared.
    """

    kind: str
    columns: dict[str, str]
    labels: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    verdict: Verdict | None = None
    extra: dict[str, str] = field(default_factory=dict)
    grouped: str | None = None
    ids: tuple[str, ...] = ()

    def reads(self, columns: list[str]) -> list[str]:
        """The columns of a set that the verdict reads."""
        return [*self.labels, *(name for name in self.hints if name in columns)]

    def missing(self, columns: list[str], config: DataConfig) -> list[str]:
        """What a set lacks of this layout."""
        needed = [*self.columns.values(), *([] if config.scorers else self.labels), *filter(None, [self.grouped])]
        return [name for name in dict.fromkeys(needed) if name not in columns]

    def carried(self, columns: list[str]) -> dict[str, str]:
        """Ours -> theirs for everything that is taken over as it is."""
        found = {name: name for name in CARRIED if name in columns} | {
            ours: theirs for ours, theirs in self.extra.items() if theirs in columns
        }
        return self.columns | {ours: theirs for ours, theirs in found.items() if ours not in self.columns}


# --- verdicts -------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A number, also one written as text (webdataset), or None: another word is a fault of its row."""
    if value is None:
        return None
    try:
        value = float(value)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def by_two_labels(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Pick-a-Pic: 1 and 0 for winner and loser, 0.5 twice for a tie; has_label is false where nobody chose."""
    first, second = number(row["label_0"]), number(row["label_1"])
    if first is None or second is None or row.get("has_label") is False:
        return {"turned": None, "margin": None}
    return {"turned": second > first, "margin": abs(first - second)}


def by_first_label(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """learn-user-pref: 1 where the first picture won, 0 where the second did; its authors compare with a half."""
    first = number(row["label0"])
    if first is None:
        return {"turned": None, "margin": None}
    return {"turned": first < 0.5, "margin": abs(2 * first - 1)}


def floats(values: Any) -> list[float] | None:
    """A list of numbers, NaN for those that are missing."""
    return None if values is None else [math.nan if value is None else float(value) for value in values]


def by_scores(row: dict[str, Any], config: DataConfig, column: str = "scores") -> dict[str, Any]:
    """Higher is better."""
    return {"scores": floats(row[column])}


def by_preference(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """HPDv2, train: 1 for the picture that was preferred."""
    return by_scores(row, config, "human_preference")


def by_ranks(row: dict[str, Any], config: DataConfig, column: str = "ranks") -> dict[str, Any]:
    """1 is the best: the score is the share of the others that it beats. Where a rank is missing nothing is known."""
    ranks = floats(row[column])
    if ranks is None or any(map(math.isnan, ranks)):
        return {"scores": ranks and [math.nan] * len(ranks)}
    return {"scores": list(beaten([-rank for rank in ranks]))}


def by_rank(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """The same under the name that HPDv2 and ImageRewardDB give it."""
    return by_ranks(row, config, "rank")


def by_like(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """True or False, 1 or 0, 1 or -1 -> 1 or -1; None for any other number, and for words."""
    return {"label": LABELS.get(number(row["label"]))}


# --- layouts --------------------------------------------------------------------------------------------------------

SIDES = {"chosen": "jpg_0", "rejected": "jpg_1"}
PICKAPIC: dict[str, Any] = {
    "labels": ("label_0", "label_1"),
    "hints": ("has_label",),
    "makes": ("margin",),
    "verdict": by_two_labels,
    "extra": {"group_id": "ranking_id"},
    "ids": ("image_0_uid", "image_1_uid"),
}
LISTED: dict[str, Any] = {"kind": "lists", "makes": ("scores",)}
OURS = {"prompt": "prompt", "images": "images"}

# Where the columns are known from is said beside each. Order matters to `auto`: the first that fits is taken.
FORMATS: dict[str, Format] = {
    # Ours. data-is-better-together/open-image-preferences-v1-binarized has these columns too (its card).
    "pairs": Format("pairs", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
    "lists": Format(columns=OURS, labels=("scores",), verdict=by_scores, **LISTED),
    "ranked_lists": Format(columns=OURS, labels=("ranks",), verdict=by_ranks, **LISTED),
    "captions": Format("captions", {"prompt": "prompt", "image": "image", "rejected_prompt": "rejected_prompt"}),
    "likes": Format(
        "likes", {"prompt": "prompt", "image": "image"}, labels=("label",), makes=("label",), verdict=by_like
    ),
    # Card of yuvalkirstain/pickapic_v1 (v2 has the same columns and some more).
    "pickapic": Format("pairs", {"prompt": "caption"} | SIDES, **PICKAPIC),
    # Keys that the diffusers ORPO example reads from its .tar shards of Pick-a-Pic.
    "pickapic_webdataset": Format("pairs", {"prompt": "original_prompt"} | SIDES, **PICKAPIC),
    # Card of wenyii/learn-user-pref and the loader of github.com/Mowenyii/learn-user-pref. It is published as pickled
    # pandas tables, which we do not open (a pickle can run any code): convert them to parquet once.
    "learn_user_pref": Format(
        "pairs",
        {"prompt": "prompt", "chosen": "image0", "rejected": "image1"},
        labels=("label0",),
        makes=("margin",),
        verdict=by_first_label,
    ),
    # path1 is the preferred one: card of HPDv3++, which extends it. What confidence and choice_dist mean is documented
    # nowhere we know of, so they are not read.
    "hpdv3": Format("pairs", {"prompt": "prompt", "chosen": "path1", "rejected": "path2"}),
    # Card of ymhao/HPDv2: train.json, 1 for preference.
    "hpdv2": Format(
        columns={"prompt": "prompt", "images": "file_path"},
        labels=("human_preference",),
        verdict=by_preference,
        **LISTED,
    ),
    # Card of THUDM/ImageRewardDB, metadata-*.parquet: one picture a row.
    "imagereward": Format(
        columns={"prompt": "prompt", "images": "image_path"},
        labels=("rank",),
        verdict=by_rank,
        extra={"group_id": "prompt_id"},
        grouped="prompt_id",
        **LISTED,
    ),
    # The same with the pictures inside, as its loading script made it.
    "imagereward_embedded": Format(
        columns={"prompt": "prompt", "images": "image"},
        labels=("rank",),
        verdict=by_rank,
        extra={"group_id": "prompt_id"},
        grouped="prompt_id",
        **LISTED,
    ),
    # Card of ymhao/HPDv2: test.json, average ranks; lower is better in the evaluation of github.com/tgxs002/HPSv2.
    "hpdv2_test": Format(
        columns={"prompt": "prompt", "images": "image_path"},
        labels=("rank",),
        verdict=by_rank,
        **LISTED,
    ),
    # Pictures with their prompts, for data.rejected_captions to add the other prompt; "text" as in most image folders.
    "captioned": Format("captions", {"prompt": "prompt", "image": "image"}),
    "captioned_text": Format("captions", {"prompt": "text", "image": "image"}),
}
