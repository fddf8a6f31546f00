"""What tests of diffpref scorer eval share: a scorer of flat pictures, and files of preferences."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from preference_files import FEATURES, encoded, value

from diffpref.config import DataConfig
from diffpref.scorer.contract import Scorer
from diffpref.scorer.evaluation import evaluate, judge, own
from diffpref.scorer.evidence import read_evidence
from diffpref.scorer.measures import Resampling

QUICK = Resampling(resamples=100)
MORE = {"user_id": Value("int64")} | {name: Value("float64") for name in ("truth", "beauty", "fit")}


class Brightness(Scorer):
    """A scorer of flat grey pictures: their value, over `temperature`. `seen`: what it opened."""

    name = "brightness"

    def __init__(self, temperature: float = 1.0, wrong: float | None = None):
        self.temperature, self.wrong, self.seen = temperature, wrong, []

    def prepare(self, picture: Image.Image) -> float:
        self.seen.append(picture.size)
        return float(np.asarray(picture.convert("L")).mean())

    def judge(self, prepared: list[float], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([float("nan") if x == self.wrong else x for x in prepared])


def grey(level: int, width: int = 16, height: int = 16, mode: str = "L") -> dict:
    """A flat picture."""
    return value(encoded(Image.new("L", (width, height), level).convert(mode)))


def pair(prompt: str, chosen: dict, rejected: dict, user: int | None = None, **columns) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": user, **columns}


def ranked(prompt: str, levels: list[int], scores: list[float]) -> dict:
    return {"prompt": prompt, "images": [grey(level) for level in levels], "scores": scores}


def save(path: Path, rows: list[dict]) -> str:
    features = Features({name: (FEATURES | MORE)[name] for name in rows[0]})
    pq.write_table(Dataset.from_list(rows, features=features).data.table, path)
    return str(path)


def read(path: str, truth: str | None = None, personal: bool = False, **settings):
    return read_evidence(DataConfig(path=path, **settings), truth, personal=personal)


def results(scorer: Scorer, evidence, **settings):
    """Measures of one scorer."""
    judgement = judge(scorer, evidence, workers=1)
    return evaluate([judgement], evidence, [own(judgement)], QUICK, **settings)[0][0]


MIXED = [
    pair("a cat", grey(200), grey(100), 7, margin=1.0),
    pair("a cat", grey(100), grey(200), 8, margin=1.0),  # the same two, the other way round
    pair("a dog", grey(200), grey(100, 16, 24), 7, margin=1.0),  # a picture of before under another prompt
    pair("a dog", grey(150, mode="RGBA"), grey(50, mode="RGB"), None, margin=0.0),  # a tie, of nobody
    pair("", grey(1), grey(2), 7, margin=1.0),
]
