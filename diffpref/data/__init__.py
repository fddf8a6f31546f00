"""Preferences from anywhere -> PreferenceBatch."""

from diffpref.data.pairs import PreferencePairs, collate
from diffpref.data.sampler import TrainingStream
from diffpref.data.source import load_preferences

__all__ = ["PreferencePairs", "TrainingStream", "collate", "load_preferences"]
