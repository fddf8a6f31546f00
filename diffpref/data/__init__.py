"""Preferences from anywhere -> PreferenceBatch."""

from diffpref.data.buckets import pair_sizes
from diffpref.data.checks import Checked, check
from diffpref.data.groups import Asked, Group, GroupCache, PreferenceGroups, collate
from diffpref.data.kinds import KINDS, Kind, Said, check_data_options, fields, kind_of
from diffpref.data.loader import Loader, training_loader
from diffpref.data.sampler import BucketStream, TrainingStream
from diffpref.data.source import load_preferences

__all__ = [
    "KINDS",
    "Asked",
    "BucketStream",
    "Checked",
    "Group",
    "GroupCache",
    "Kind",
    "Loader",
    "PreferenceGroups",
    "Said",
    "TrainingStream",
    "check",
    "check_data_options",
    "collate",
    "fields",
    "kind_of",
    "load_preferences",
    "pair_sizes",
    "training_loader",
]
