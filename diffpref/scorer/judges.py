"""Scorers as judges of a run: functions of pictures and prompts, named in a configuration.

judge: {judge: diffpref.scorer.judges.bundled}
"""

from functools import lru_cache

import numpy as np
from PIL.Image import Image

from diffpref.scorer.contract import Scorer


@lru_cache(maxsize=4)
def loaded(name: str) -> Scorer:
    """A scorer, loaded once."""
    from diffpref.scorer import load_scorer

    return load_scorer(name)


def judged(name: str, images: list[Image], prompts: list[str]) -> np.ndarray:
    """Scores [N], as log-odds are counted: a difference of 1 is a probability of 0.73."""
    scorer = loaded(name)
    return scorer.score(images=images, prompts=prompts, progress=False).double().numpy() / scorer.temperature


def bundled(images: list[Image], prompts: list[str]) -> np.ndarray:
    """The scorer of the emoji world."""
    return judged("bundled", images, prompts)


def pickscore(images: list[Image], prompts: list[str]) -> np.ndarray:
    """PickScore v1."""
    return judged("pickscore", images, prompts)


def hpsv2_1(images: list[Image], prompts: list[str]) -> np.ndarray:
    """HPSv2.1."""
    return judged("hpsv2.1", images, prompts)


def laion_aesthetic(images: list[Image], prompts: list[str]) -> np.ndarray:
    """LAION's aesthetic predictor v2: of the picture alone."""
    return judged("laion-aesthetic", images, prompts)
