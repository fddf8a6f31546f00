"""What a row of preferences says: which pictures it has, which items they make, and which item is better.

A row is a group of items that are compared with one another. There are four kinds, one row of KINDS each.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffpref.config import DataConfig

Row = dict[str, Any]
Picture = dict[str, Any]  # undecoded: {"bytes", "path"}
PICTURES = ("chosen", "rejected", "image", "images")  # columns that hold pictures; images holds lists of them
PROMPTS = ("prompt", "rejected_prompt")
NONE: Picture = {"bytes": None, "path": None}
LABELS = {1: 1.0, 0: -1.0, -1: -1.0}  # True and False are 1 and 0
WINNER_FIRST = {"scores": (1.0, 0.0), "labels": (1.0, -1.0)}


@dataclass(frozen=True)
class Said:
    """What a row says about its items.

    items: (number of the picture, prompt) of each.  pairs: (better, worse), numbers of items.  scores: of each item,
    higher is better.  labels: of each item, +1 liked, -1 not.  probability: of each pair, that the better one is
    preferred.  None where the row does not say.
    """

    items: tuple[tuple[int, str], ...]
    pairs: tuple[tuple[int, int], ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None
    probability: tuple[float, ...] | None = None

    @property
    def prompts(self) -> list[str]:
        """Of each item."""
        return [prompt for _, prompt in self.items]

    def without_prompts(self) -> "Said":
        """The same with empty prompts: all go, or none."""
        return replace(self, items=tuple((picture, "") for picture, _ in self.items))


@dataclass(frozen=True)
class Kind:
    """A kind of rows.

    columns: that it needs.  pictures: those of them that hold pictures.  says: (row, configuration) -> what it says;
    needs none of the pictures.  gives: fields that objectives may use.  more: the same by columns that a set may have
    beside.  captionless: whether prompts may be dropped.
    """

    name: str
    columns: tuple[str, ...]
    pictures: tuple[str, ...]
    says: Callable[[Row, DataConfig], Said]
    gives: frozenset[str]
    more: dict[str, str] = field(default_factory=dict)
    captionless: bool = True

    def named_pictures(self, row: Row) -> dict[str, Picture]:
        """The undecoded pictures of a row, in the order in which items number them, by what messages call them."""
        named: dict[str, Picture] = {}
        for column in self.pictures:
            if column == "images":
                named |= {f"images[{i}]": picture or NONE for i, picture in enumerate(row[column] or ())}
            else:
                named[column] = row[column] or NONE
        return named


# --- pairs --------------------------------------------------------------------------------------------------------


def pair(row: Row, config: DataConfig) -> Said:
    """The chosen picture over the rejected one, each under its own prompt where there are two."""
    items = ((0, row["prompt"]), (1, row.get("rejected_prompt") or row["prompt"]))
    said = Said(items, ((0, 1),), probability=pair_probability(row, config), **WINNER_FIRST)
    return TIES[config.ties](said) if row.get("margin") == 0 else said


def pair_probability(row: Row, config: DataConfig) -> tuple[float, ...] | None:
    """What the column says; where it says nothing and ties are one half, a pair that is none is certain."""
    value = row.get("probability")
    if value is None or value != value:
        return (1.0,) if config.ties == "half" else None
    return (float(value),)


def both_ways(said: Said) -> Said:
    """Each of the two over the other: the mean over a group's pairs makes each count half."""
    turned = said.probability and (*said.probability, 1 - said.probability[0])
    return replace(said, pairs=((0, 1), (1, 0)), scores=(0.5, 0.5), probability=turned)


# What becomes of a row whose margin is 0. Those that are dropped are never asked. A tie's labels stay: +1 and -1 have
# no middle.
TIES: dict[str, Callable[[Said], Said]] = {
    "drop": lambda said: said,
    "keep": lambda said: said,
    "half": lambda said: replace(said, scores=(0.5, 0.5), probability=(0.5,)),
    "both": both_ways,
}


# --- lists --------------------------------------------------------------------------------------------------------


def ranked(row: Row, config: DataConfig) -> Said:
    """Pictures with scores under one prompt; with wins [k][k], the share of voters that put i above j, also the
    probability of each pair."""
    scores = SCORES[config.scores](tuple(map(float, row["scores"])))
    pairs = COMPARISONS[config.comparisons](scores)
    wins = row.get("wins")
    probability = None if wins is None else tuple(float(wins[better][worse]) for better, worse in pairs)
    return Said(tuple((i, row["prompt"]) for i in range(len(scores))), pairs, scores, probability=probability)


def beaten(scores: Sequence[float]) -> tuple[float, ...]:
    """Finite scores -> the share of the others that each beats, ties half: 1 for the best of all, 0 for the last."""
    points = [sum((one > other) + 0.5 * (one == other) for other in scores) - 0.5 for one in scores]
    return tuple(point / max(len(scores) - 1, 1) for point in points)


SCORES: dict[str, Callable[[tuple[float, ...]], tuple[float, ...]]] = {
    "as_is": lambda scores: scores,
    "votes": beaten,
}


def between(scores: tuple[float, ...], levels: Iterable[tuple[float, float]]) -> tuple[tuple[int, int], ...]:
    """Every item of one score over every item of another, for each (better, worse) of scores."""
    where = {level: [i for i, score in enumerate(scores) if score == level] for level in scores}
    return tuple((one, other) for better, worse in levels for one in where[better] for other in where[worse])


def all_pairs(scores: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """Every two items whose scores differ."""
    levels = sorted(set(scores), reverse=True)
    return between(scores, [(better, worse) for i, better in enumerate(levels) for worse in levels[i + 1 :]])


def best_worst(scores: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """The best over the worst; where several are equally good, each of them."""
    return between(scores, [(max(scores), min(scores))] if max(scores) > min(scores) else [])


def neighbours(scores: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """Each rank over the next; where several share a rank, each of them."""
    levels = sorted(set(scores), reverse=True)
    return between(scores, zip(levels, levels[1:], strict=False))


COMPARISONS: dict[str, Callable[[tuple[float, ...]], tuple[tuple[int, int], ...]]] = {
    "all": all_pairs,
    "best_worst": best_worst,
    "adjacent": neighbours,
}


# --- likes and captions -------------------------------------------------------------------------------------------


def like(row: Row, config: DataConfig) -> Said:
    """One picture, liked or not."""
    return Said(((0, row["prompt"]),), labels=(LABELS[row["label"]],))


def captions(row: Row, config: DataConfig) -> Said:
    """One picture under two prompts, of which the first fits better."""
    return Said(((0, row["prompt"]), (0, row["rejected_prompt"])), ((0, 1),), **WINNER_FIRST)


# --- the table ----------------------------------------------------------------------------------------------------

PREFERRED = frozenset({"pairs", "scores", "labels"})
# In this order columns are recognised. Dropping the captions of a captions row would leave nothing to compare.
KINDS: dict[str, Kind] = {
    "pairs": Kind(
        "pairs",
        columns=("prompt", "chosen", "rejected"),
        pictures=("chosen", "rejected"),
        says=pair,
        gives=PREFERRED,
        more={"probability": "probability", "rejected_prompt": "captions"},
    ),
    "lists": Kind(
        "lists",
        columns=("prompt", "images", "scores"),
        pictures=("images",),
        says=ranked,
        gives=frozenset({"pairs", "scores"}),
        more={"wins": "probability"},
    ),
    "captions": Kind(
        "captions",
        columns=("prompt", "image", "rejected_prompt"),
        pictures=("image",),
        says=captions,
        gives=PREFERRED | {"captions"},
        captionless=False,
    ),
    "likes": Kind(
        "likes",
        columns=("prompt", "image", "label"),
        pictures=("image",),
        says=like,
        gives=frozenset({"labels"}),
    ),
}


def kind_of(column_names: Iterable[str] | None, config: DataConfig) -> Kind:
    """The kind of a set, by data.kind or by its columns.

    Raises ValueError, which names the columns that each kind needs, when they are not there.
    """
    columns = list(column_names or ())
    wanted = [kind for name, kind in KINDS.items() if config.kind in ("auto", name)]
    found = next((kind for kind in wanted if set(kind.columns) <= set(columns)), None)
    if found is None:
        needed = "; ".join(f"{kind.name}: {', '.join(kind.columns)}" for kind in wanted)
        raise ValueError(f"data.path: {config.path} has the columns {columns}, and needs those of {needed}")
    return found


# Keys of data -> the kinds of rows that they mean something for.
ONLY_FOR = {
    "comparisons": ("lists",),
    "scores": ("lists",),
    "ties": ("pairs",),
    "caption_dropout": tuple(name for name, kind in KINDS.items() if kind.captionless),
}


def check_data_options(column_names: Iterable[str] | None, config: DataConfig) -> None:
    """Raise ValueError for an option that is set and would be dropped in silence, because the rows with these columns
    (as `load_preferences` gives them) are of a kind that does not use it; and as `kind_of`.

    For the training set: held-out rows of another kind share its options.
    """
    kind, default = kind_of(column_names, config), DataConfig(path=config.path)
    for key, names in ONLY_FOR.items():
        if kind.name not in names and getattr(config, key) != getattr(default, key):
            raise ValueError(
                f"data.{key} is for {' and '.join(names)}, and {config.path} holds {kind.name}; leave it out"
            )


def fields(column_names: Iterable[str] | None, config: DataConfig) -> frozenset[str]:
    """What the rows will tell an objective: some of pairs, scores, labels, probability, captions (several prompts in a
    group), user, aspects. Raises ValueError as `kind_of`."""
    columns = list(column_names or ())
    kind = kind_of(columns, config)
    said = {"probability"} if kind.name == "pairs" and config.ties == "half" else set()
    said |= ({"user"} if "user_id" in columns else set()) | ({"aspects"} if config.aspects else set())
    return kind.gives | said | {kind.more[name] for name in columns if name in kind.more}
