"""Losses by name: what a head says of a batch in, numbers to differentiate out."""

from diffpref.scorer.losses.config import LossConfig
from diffpref.scorer.losses.table import LOSSES, Loss
from diffpref.scorer.losses.total import check_loss, needs_fields, total

__all__ = ["LOSSES", "Loss", "LossConfig", "check_loss", "needs_fields", "total"]
