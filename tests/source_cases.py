"""Rows with users and scores on disk, and the sources that read them: what the tests of sources share."""

from pathlib import Path
from typing import Any

import preference_files as files
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value

from diffpref.cache.team import Team
from diffpref.config import Config, DataConfig, ModelConfig, TrainConfig, UsersConfig
from diffpref.data import check, load_preferences
from diffpref.users.sources import SOURCES
from diffpref.users.sources.contract import PRESENT, UserSource

SCORERS = ["sharp", "warm"]
SHARP = [[4.0, 0.0], [2.0, 2.0], [1.0, 3.0]]  # mean 2, variance (4 + 4 + 0 + 0 + 1 + 1) / 6
WARM = [[10.0, 30.0], [20.0, 30.0], [10.0, 20.0]]  # mean 20, variance (100 + 100 + 0 + 100 + 100 + 0) / 6


def config_of(path: str, source: str, **settings: Any) -> Config:
    data = DataConfig(path, **settings.pop("data", {}))
    users = UsersConfig(source, **settings.pop("users", {}))
    return Config(name="a", model=ModelConfig(""), data=data, users=users, train=TrainConfig(**settings))


def write(path: Path, kind: str = "pairs", **columns: list) -> str:
    """Sound rows with some more columns."""
    rows = files.EXAMPLES[kind](len(next(iter(columns.values()))))
    if kind == "lists":
        rows = [{name: value for name, value in row.items() if name in ("prompt", "images", "scores")} for row in rows]
    features = {name: files.FEATURES[name] for name in rows[0]}
    for name, values in columns.items():
        features[name] = Value("string") if name == "user_id" else List(Value("float64"))
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    pq.write_table(Dataset.from_list(rows, features=Features(features)).data.table, path)
    return str(path)


def built(config: Config) -> tuple[Any, Dataset]:
    """The source, and the checked rows it is of."""
    rows = check(load_preferences(config.data, numbers=config.users.source == "rewards"), config.data).rows
    return SOURCES[config.users.source](config, rows, Team()), rows


def batch(source: UserSource, *made: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What the module takes of groups; None is nobody."""
    inputs = [source.absent() if one is None else one for one in made]
    present = torch.tensor([one is not None for one in made]).float()
    return {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]} | {PRESENT: present}


def weighed(path: Path, kind: str = "pairs", sharp: list = SHARP, warm: list = WARM, **settings: Any) -> Config:
    users = settings.pop("users", {})
    data = {"scorers": SCORERS} | settings.pop("data", {})
    return config_of(write(path, kind, sharp=sharp, warm=warm), "rewards", users=users, data=data, **settings)
