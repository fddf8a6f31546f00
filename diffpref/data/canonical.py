"""Rows of a published layout -> rows with our columns (formats.py has both). Sets and streams give the same rows."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from diffpref.config import DataConfig
from diffpref.data.columns import BATCH, add_column, read_as, read_columns, turn
from diffpref.data.formats import FEATURES, FORMATS, PICTURE, Format, Verdict
from diffpref.data.kinds import KINDS
from diffpref.data.votes import GIVEN, LABELS, NUMBERS, VOTES

Rows = Dataset | IterableDataset


# --- which layout ---------------------------------------------------------------------------------------------------


def recognise(columns: list[str], config: DataConfig) -> str:
    """The name of the layout that columns belong to. Raises ValueError when it is none, or not the one asked for."""
    if config.format != "auto":
        return asked_for(columns, config)
    fitting = [name for name, form in FORMATS.items() if not form.missing(columns, config)]
    if not fitting:
        known = "; ".join(f"{name}: {', '.join(shown(form))}" for name, form in FORMATS.items())
        raise ValueError(f"data.path: {config.path} has the columns {columns}, and needs those of {known}")
    wanted = [name for name in fitting if config.kind in ("auto", *reachable(FORMATS[name].kind))]
    if not wanted:
        kind = FORMATS[fitting[0]].kind
        raise ValueError(f"data.kind is {config.kind}, but {config.path} holds {kind} (data.format {fitting[0]})")
    return wanted[0]


def asked_for(columns: list[str], config: DataConfig) -> str:
    """data.format, if there is such a one and the set has its columns."""
    if config.format not in FORMATS:
        raise ValueError(f"data.format: no format is called {config.format!r}; known are auto, {', '.join(FORMATS)}")
    if missing := FORMATS[config.format].missing(columns, config):
        raise ValueError(
            f"data.format: {config.format} needs the column(s) {missing}, which {config.path} lacks; it has {columns}"
        )
    kind = FORMATS[config.format].kind
    if config.kind not in ("auto", *reachable(kind)):
        raise ValueError(f"data.kind is {config.kind}, but data.format {config.format} holds {kind}")
    return config.format


def shown(form: Format) -> list[str]:
    """The columns a layout is recognised by."""
    return [*form.columns.values(), *form.labels, *filter(None, [form.grouped])]


def reachable(kind: str) -> list[str]:
    """The kinds that rows of this kind can become."""
    return [kind, *(to for source, to in CONVERSIONS if source == kind)]


# --- what is done with it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How rows are read. columns: ours -> theirs. reads: what the verdict reads. makes: which columns it gives. folder:
    where pictures that are paths begin; None for a set of the hub."""

    form: Format
    columns: dict[str, str]
    reads: list[str]
    makes: tuple[str, ...]
    verdict: Verdict | None
    config: DataConfig
    folder: Path | None

    @property
    def pictures(self) -> tuple[str, ...]:
        """Our columns that hold pictures."""
        return KINDS[self.form.kind].pictures

    def judge(self, values: dict[str, Any], number: int) -> dict[str, Any]:
        """What the labels of one row say. Raises ValueError that names the row."""
        if self.verdict is None:
            return {}
        try:
            return self.verdict(values, self.config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error} (row {number} of {self.config.path})") from error

    def picture(self, value: Any) -> Any:
        """A picture of any form, or a list of them -> undecoded."""
        if isinstance(value, list):
            return [self.picture(one) for one in value]
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        return {"bytes": None, "path": self.path(value)} if isinstance(value, str) else value

    def path(self, value: str) -> str | None:
        """Where a picture lies. Raises ValueError for a relative path of a set that lies nowhere."""
        if not value or "://" in value or Path(value).is_absolute():
            return value or None
        if self.folder is None:
            raise ValueError(
                f"data.path: the pictures of {self.config.path} are paths ({value}): download it and give the folder"
            )
        return str(self.folder / value)


def make_plan(rows: Rows, name: str, config: DataConfig, folder: Path | None, numbers: bool = False) -> Plan:
    """Raises ValueError for scorers where they have nothing to say, or that are not there."""
    form, columns = FORMATS[name], list(rows.column_names or [])
    verdict, reads, makes = form.verdict, form.reads(columns), form.makes
    if config.scorers:
        if form.kind not in VOTES:
            raise ValueError(f"data.scorers compare pictures; {config.path} holds {form.kind}, which have one each")
        if missing := [scorer for scorer in config.scorers if scorer not in columns]:
            raise ValueError(f"data.scorers: {config.path} lacks the column(s) {missing}; it has {columns}")
        check_votes(rows, form, config)
        (verdict, makes), reads = (NUMBERS if numbers else VOTES)[form.kind], list(config.scorers)
    left = {*makes, *(LABELS if numbers else ())}
    carried = {ours: theirs for ours, theirs in form.carried(columns).items() if ours not in left}
    carried |= {column: column for column in asked_aspects(name, columns, config)}
    return Plan(form, carried, reads, makes, verdict, config, folder)


def asked_aspects(format: str, columns: list[str], config: DataConfig) -> list[str]:
    """data.aspects. Raises ValueError where they are not there, or where the rows do not say which picture is the
    chosen one."""
    if config.aspects and (format != "pairs" or config.scorers):
        raise ValueError("data.aspects need rows with prompt, chosen and rejected, and no data.scorers")
    if missing := [name for name in config.aspects if name not in columns]:
        raise ValueError(f"data.aspects: {config.path} lacks the column(s) {missing}; it has {columns}")
    return config.aspects


def check_votes(rows: Rows, form: Format, config: DataConfig) -> None:
    """Raise ValueError for a scorer's column that does not hold lists of numbers, or numbers where each picture has
    a row of its own."""
    for name in config.scorers:
        feature = (rows.features or {}).get(name)
        if not is_number(feature if form.grouped else getattr(feature, "feature", None)):
            wanted = "a number" if form.grouped else "a list of numbers, one for each picture"
            raise ValueError(f"data.scorers: the column {name} of {config.path} must hold {wanted}; it holds {feature}")


def to_canonical(rows: Rows, name: str, config: DataConfig, folder: Path | None, numbers: bool = False) -> Rows:
    """Rows of the named layout -> our columns, of the kind that data.kind asks for. With `numbers` those of
    data.scorers are carried along instead of voting."""
    plan = make_plan(rows, name, config, folder, numbers)
    if plan.form.grouped:
        rows = group_rows(rows, plan)
    rows = of_stream(rows, plan) if isinstance(rows, IterableDataset) else of_set(rows, plan)
    kind = plan.form.kind if config.kind == "auto" else config.kind
    return rows if kind == plan.form.kind else CONVERSIONS[plan.form.kind, kind](rows)


# --- sets -----------------------------------------------------------------------------------------------------------


def of_set(rows: Dataset, plan: Plan) -> Dataset:
    """A set: columns are renamed, the made ones added, and rows whose second picture won are taken from elsewhere."""
    found = list(verdicts(rows, plan))
    rows = rows.select_columns(list(plan.columns.values()))
    rows = rows.rename_columns({theirs: ours for ours, theirs in plan.columns.items() if ours != theirs})
    for name in plan.pictures:
        rows = as_pictures(rows, name, plan)
    for name in plan.makes:
        rows = add_column(rows, name, [values[name] for values in found], feature=FEATURES[name])
    return turn(rows, "chosen", "rejected", [values["turned"] for values in found]) if has(found, "turned") else rows


def has(found: list[dict[str, Any]], name: str) -> bool:
    """Whether the verdicts speak of this."""
    return bool(found) and name in found[0]


def verdicts(rows: Dataset, plan: Plan) -> Iterator[dict[str, Any]]:
    """What the labels of each row say; pictures are not read, only counted."""
    if plan.verdict is None:
        return
    counts = picture_counts(rows, plan)
    for number, (values, pictures) in enumerate(zip(read_columns(rows, plan.reads), counts, strict=True)):
        yield plan.judge(values | {"pictures": pictures}, number)


def picture_counts(rows: Dataset, plan: Plan) -> Iterator[int | None]:
    """Pictures in each row."""
    name = plan.columns[plan.pictures[0]]
    for table in rows.select_columns([name]).with_format("arrow").iter(BATCH):
        if plan.form.kind == "lists":
            yield from pc.list_value_length(table[name]).to_pylist()
        else:
            yield from [len(plan.pictures)] * len(table)


def as_pictures(rows: Dataset, name: str, plan: Plan) -> Dataset:
    """A column of pictures in any form -> undecoded pictures. Bytes stay where they are; paths are made whole."""
    feature = rows.features[name]
    if not is_path(feature):
        return read_as(rows, name, FEATURES[name])
    values = [plan.picture(values[name]) for values in read_columns(rows, [name])]
    columns = rows.column_names
    return add_column(rows.remove_columns(name), name, values, feature=FEATURES[name]).select_columns(columns)


def is_path(feature: Any) -> bool:
    """Whether a column holds paths, or lists of them."""
    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Value) and "string" in inner.dtype


def is_number(feature: Any) -> bool:
    """Whether a column holds numbers, or nothing at all."""
    return isinstance(feature, Value) and bool(re.match(r"u?int|float|decimal|null", feature.dtype))


# --- streams --------------------------------------------------------------------------------------------------------


def of_stream(rows: IterableDataset, plan: Plan) -> IterableDataset:
    """A stream: the same, row after row as they come."""
    known = rows.features or {}
    for theirs in plan.columns.values():
        rows = undecoded_column(rows, theirs, known.get(theirs))
    pictures = plan.pictures
    carried = {name: known.get(theirs) for name, theirs in plan.columns.items() if name not in pictures}
    made = {name: FEATURES[name] for name in (*pictures, *plan.makes)}
    features = {name: made.get(name, carried.get(name)) for name in (*plan.columns, *plan.makes)}
    return rows.map(
        lambda row, number: convert(row, number, plan),
        with_indices=True,
        features=Features(features),
        remove_columns=rows.column_names,
    )


def undecoded_column(rows: IterableDataset, name: str, feature: Any) -> IterableDataset:
    """The stream, with this column not decoded if it is one of pictures."""
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return rows.cast_column(name, List(PICTURE))
    return rows.cast_column(name, PICTURE) if isinstance(feature, Image) else rows


def convert(row: dict[str, Any], number: int, plan: Plan) -> dict[str, Any]:
    """One row of a stream."""
    ours = {name: row[theirs] for name, theirs in plan.columns.items()}
    pictures = plan.pictures
    ours |= {name: plan.picture(ours[name]) for name in pictures}
    count = len(ours["images"] or ()) if plan.form.kind == "lists" else len(pictures)
    found = plan.judge({name: row[name] for name in plan.reads} | {"pictures": count}, number)
    sides = turned_sides(ours, found["turned"]) if "turned" in found else {}
    return ours | {name: found[name] for name in plan.makes} | sides


def turned_sides(row: dict[str, Any], turned: bool | None) -> dict[str, Any]:
    """The two pictures, winner first; none where nobody knows."""
    if turned is None:
        return {"chosen": None, "rejected": None}
    return {"chosen": row["rejected"], "rejected": row["chosen"]} if turned else {}


# --- one picture a row -> lists -------------------------------------------------------------------------------------


def group_rows(rows: Rows, plan: Plan) -> Dataset:
    """Rows of one picture each -> one row for each value of the grouping column, in order of appearance.

    Paths are gathered as they are. Pictures inside the set are written once more, into the cache of `datasets`.
    Raises ValueError for a stream.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(f"data.streaming: {plan.config.path} has one picture a row, and a list needs several rows")
    key, images = str(plan.form.grouped), plan.columns["images"]
    columns = list(dict.fromkeys([*plan.columns.values(), *plan.reads, key]))
    groups: dict[Any, list[int]] = {}
    for number, values in enumerate(read_columns(rows, [key])):
        groups.setdefault(values[key], []).append(number)
    features = {
        name: List(PICTURE if name == images and not is_path(rows.features[name]) else rows.features[name])
        if name in (images, *plan.reads)
        else rows.features[name]
        for name in columns
    }
    source = rows.select_columns(columns)
    source = source if is_path(rows.features[images]) else source.cast_column(images, PICTURE)
    return Dataset.from_generator(
        gather,
        features=Features(features),
        # tuples: datasets takes lists for shards that processes share
        gen_kwargs={"rows": source, "groups": tuple(groups.values()), "listed": (images, *plan.reads)},
        fingerprint=f"{source._fingerprint}-lists",
        split="train",
    )


def gather(rows: Dataset, groups: Sequence[Sequence[int]], listed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row a group: the listed columns as lists, of the others the first value."""
    for numbers in groups:
        some = [rows[number] for number in numbers]
        yield {name: [row[name] for row in some] if name in listed else some[0][name] for name in some[0]}


# --- another kind ---------------------------------------------------------------------------------------------------


def chosen_pictures(rows: Rows) -> Rows:
    """Pairs -> captions: the winner with its prompt."""
    left = [name for name in ("rejected", "margin", "probability", GIVEN) if name in (rows.column_names or [])]
    return rows.remove_columns(left).rename_column("chosen", "image")


def liked_pictures(rows: Rows) -> Rows:
    """Likes -> captions: the pictures that are liked."""
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda label: label == 1, input_columns=["label"]).remove_columns("label")
    liked = np.flatnonzero([values["label"] == 1 for values in read_columns(rows, ["label"])])
    return rows.select(liked).remove_columns("label")


CONVERSIONS = {("pairs", "captions"): chosen_pictures, ("likes", "captions"): liked_pictures}
