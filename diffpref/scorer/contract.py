"""What a scorer is. Two methods make one; scores, comparisons, ranks and streams follow from them."""

from abc import ABC, abstractmethod
from typing import Any

from PIL import Image
from torch import Tensor

from diffpref.scorer.score import Scoring


class Scorer(Scoring, ABC):
    """Says how well pictures fit their prompts and please people.

    name: what it is called in tables.
    temperature: P(a preferred to b) = σ((s_a − s_b) / temperature).
    needs_prompt: False for scorers of the picture alone, whose prompts may be empty.
    any_mode: True for scorers whose `prepare` takes pictures of every mode, as the file has it.
    """

    name: str
    temperature: float = 1.0
    needs_prompt: bool = True
    any_mode: bool = False

    @abstractmethod
    def prepare(self, picture: Image.Image) -> Any:
        """An upright RGB picture (transparency on white) -> what `judge` takes of it. Runs in worker threads."""

    @abstractmethod
    def judge(self, prepared: list[Any], prompts: list[str]) -> Tensor:
        """A batch of N prepared pictures and their prompts -> scores [N], fp32 on the CPU; higher is better."""
