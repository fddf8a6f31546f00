"""How good a scorer is: pure functions on arrays, each number with its interval and its tie policy."""

from diffpref.scorer.measures.bias import by_split, correlation, preference_for
from diffpref.scorer.measures.bootstrap import Clusters, Resampling
from diffpref.scorer.measures.cycles import cyclic_accuracy, cyclic_triples, edges
from diffpref.scorer.measures.lists import list_measures
from diffpref.scorer.measures.measured import Measured
from diffpref.scorer.measures.pairs import accuracy, against_truth, by_aspect, difference
from diffpref.scorer.measures.reliability import (
    Reliability,
    brier,
    calibration_error,
    log_loss,
    reliability,
    target_of,
)
from diffpref.scorer.measures.ties import Threshold, pickscore_threshold, three_way, tie_calibration, with_half_points
from diffpref.scorer.measures.users import macro_accuracy, per_user, worst_users

__all__ = [
    "Clusters",
    "Measured",
    "Reliability",
    "Resampling",
    "Threshold",
    "accuracy",
    "against_truth",
    "brier",
    "by_aspect",
    "by_split",
    "calibration_error",
    "correlation",
    "cyclic_accuracy",
    "cyclic_triples",
    "difference",
    "edges",
    "list_measures",
    "log_loss",
    "macro_accuracy",
    "per_user",
    "pickscore_threshold",
    "preference_for",
    "reliability",
    "target_of",
    "three_way",
    "tie_calibration",
    "with_half_points",
    "worst_users",
]
