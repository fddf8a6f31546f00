"""Scorers by name, of this package and of others."""

from typing import Any

from diffpref.scorer.clip import PreferenceScorer
from diffpref.scorer.contract import Scorer


def load_scorer(name: str, **options: Any) -> Scorer:
    """Any scorer by its name, folder or file. `options` go to what makes it, such as device."""
    return PreferenceScorer.from_pretrained(name, **options)
