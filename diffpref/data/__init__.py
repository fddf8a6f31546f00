"""Preferences from anywhere -> PreferenceBatch."""

from diffpref.data.buckets import pair_sizes
from diffpref.data.checks import Checked, check
from diffpref.data.loader import Loader, training_loader
from diffpref.data.pairs import PairCache, PreferencePairs, collate
from diffpref.data.sampler import BucketStream, TrainingStream
from diffpref.data.source import load_preferences

__all__ = [
    "BucketStream",
    "Checked",
    "Loader",
    "PairCache",
    "PreferencePairs",
    "TrainingStream",
    "check",
    "collate",
    "load_preferences",
    "pair_sizes",
    "training_loader",
]
