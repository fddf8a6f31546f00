"""Values no run can have, and combinations that contradict each other."""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from diffpref.config.sections import Config, RunConfig

# Impossible values: (what must hold, in words, test). The error names key, value and the words.
POSITIVE = ("must be positive", lambda x: x > 0)
NOT_NEGATIVE = ("must not be negative", lambda x: x >= 0)
SHARE = ("must lie in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_ONE = ("must lie in [0, 1)", lambda x: 0 <= x < 1)
Limits = dict[str, tuple[str, Callable[[Any], bool]]]
RUN_LIMITS: Limits = {
    "name": ("must name a folder, not a path", lambda x: bool(re.fullmatch(r"[\w.\-]*\w[\w.\-]*", x))),
    "data.resolution": POSITIVE,
    "data.caption_dropout": SHARE,
    "data.max_pairs": POSITIVE,
    "data.buckets": ("must be pairs of positive sides", lambda x: x == "auto" or x and all(min(b) > 0 for b in x)),
    "data.num_workers": NOT_NEGATIVE,
    "data.prefetch_factor": POSITIVE,
    "data.shuffle_buffer": POSITIVE,
    "data.min_margin": NOT_NEGATIVE,
    "data.max_margin": POSITIVE,
    "data.validation_groups": POSITIVE,
    "data.validation_draws": POSITIVE,
    "cache.max_gb": POSITIVE,
    "train.seed": NOT_NEGATIVE,
    "train.max_train_steps": POSITIVE,
    "train.train_batch_size": POSITIVE,
    "train.gradient_accumulation_steps": POSITIVE,
    "train.learning_rate": POSITIVE,
    "train.lr_warmup_steps": NOT_NEGATIVE,
    "train.adam_beta1": BELOW_ONE,
    "train.adam_beta2": BELOW_ONE,
    "train.adam_weight_decay": NOT_NEGATIVE,
    "train.adam_epsilon": POSITIVE,
    "train.max_grad_norm": POSITIVE,
    "train.skip_grad_norm": ("must be greater than 1", lambda x: x > 1),
    "train.ema_decay": BELOW_ONE,
    "train.checkpointing_steps": NOT_NEGATIVE,
    "train.checkpoints_total_limit": POSITIVE,
    "train.logging_steps": POSITIVE,
}
LIMITS: Limits = RUN_LIMITS | {
    "lora.rank": POSITIVE,
    "lora.alpha": POSITIVE,
    "lora.dropout": BELOW_ONE,
    "cache.crops": POSITIVE,
    "noise.logit_std": POSITIVE,
    "noise.timestep_range": ("must be lowest and highest in [0, 1]", lambda x: 0 <= x[0] < x[1] <= 1),
    "noise.timestep_list": ("must be timesteps from 0 to 999", lambda x: x and all(0 <= t < 1000 for t in x)),
    "noise.inversion_steps": POSITIVE,
    "noise.inversion_eta": NOT_NEGATIVE,
    "reference.draws": POSITIVE,
    "objective.beta": POSITIVE,
    "objective.margin_cap": POSITIVE,
    "objective.winner_anchor": NOT_NEGATIVE,
    "objective.label_smoothing": ("must lie in (0, 0.5)", lambda x: 0 < x < 0.5),
    "objective.ipo_tau": POSITIVE,
    "objective.smoothing": POSITIVE,
    "objective.probability_range": ("must be lowest and highest in [0, 1]", lambda x: 0 <= x[0] < x[1] <= 1),
    "objective.list_temperature": POSITIVE,
    "objective.desirable_weight": NOT_NEGATIVE,
    "objective.undesirable_weight": NOT_NEGATIVE,
    "objective.loser_clip": POSITIVE,
    "objective.reward_temperature": POSITIVE,
    "objective.similarity_temperature": POSITIVE,
    "objective.sft_weight": NOT_NEGATIVE,
    "objective.drift_weight": NOT_NEGATIVE,
    "objective.safeguard": SHARE,
    "sample.seed": NOT_NEGATIVE,
    "train.gradient_cache": POSITIVE,
    "train.gradient_noise_draws": ("must be 0 or at least 2", lambda x: x == 0 or x > 1),
    "train.drift_alarm": POSITIVE,
    "sample.validation_steps": NOT_NEGATIVE,
    "sample.validation_prompts": POSITIVE,
    "sample.images_per_prompt": POSITIVE,
    "sample.num_inference_steps": POSITIVE,
    "sample.batch_size": POSITIVE,
    "users.support": ("must be fewest and most, none negative", lambda x: 0 <= x[0] <= x[1] and x[1] > 0),
    "users.dropout": BELOW_ONE,
    "users.width": POSITIVE,
    "judge.confidence": ("must lie in (0, 1)", lambda x: 0 < x < 1),
}

# Contradictions: (test, the message when it holds).
Contradictions = list[tuple[Callable[[Any], bool], str]]
RUN_CONTRADICTIONS: Contradictions = [
    (
        lambda c: (c.data.min_margin or 0.0) > (math.inf if c.data.max_margin is None else c.data.max_margin),
        "data.min_margin is larger than data.max_margin: no pair can pass",
    ),
]
CONTRADICTIONS: Contradictions = RUN_CONTRADICTIONS + [
    (
        lambda c: c.model.dtype == "float16" and c.train.mixed_precision != "fp16",
        "model.dtype float16 needs train.mixed_precision fp16: its scaler saves small gradients",
    ),
    (
        lambda c: c.noise.timesteps == "list" and c.noise.timestep_list is None,
        "noise.timesteps list needs noise.timestep_list",
    ),
    (
        lambda c: c.objective.name in ("mapo", "mapo_v1") and c.objective.error_space != "model",
        "objective.error_space scales the errors, which mapo is not linear in; leave it at model",
    ),
    (
        lambda c: bool(c.judge.measures) and not c.sample.prompts,
        "judge.measures needs pictures to measure; give sample.prompts",
    ),
    (
        lambda c: bool(c.sample.validation_steps) and not c.sample.prompts and c.data.validation is None,
        "sample.validation_steps needs something to draw or to rank; give sample.prompts or data.validation",
    ),
    (
        lambda c: bool(c.train.gradient_noise_draws) and c.data.validation is None,
        "train.gradient_noise_draws takes its batch from held-out preferences; give data.validation",
    ),
    (
        lambda c: c.judge.judge is not None and not c.sample.prompts,
        "judge.judge needs pictures to judge; give sample.prompts",
    ),
    (
        lambda c: c.data.streaming and (c.cache.latents or c.cache.text),
        "data.streaming passes pictures once and keeps none; a cache is for sets that stay on disk",
    ),
    (
        lambda c: c.model.tuning == "user_adapter" and c.users.source == "none",
        "model.tuning user_adapter needs to know whose pairs these are; set users.source",
    ),
    (
        lambda c: c.sample.user is not None and c.users.source == "none",
        "sample.user is for runs that are conditioned on users; set users.source, or leave it out",
    ),
    (
        lambda c: c.model.lora is not None and c.model.tuning != "user_adapter",
        "model.lora is a part of the base that model.tuning lora and full would train; set it to user_adapter, or load"
        " the LoRA into the pipeline, fuse it and save that",
    ),
    (
        lambda c: c.data.joint and c.users.source in ("encoder", "tastes"),
        "data.joint makes pairs of two people's pictures, which users.source encoder and tastes cannot read",
    ),
    (
        lambda c: c.users.labels != "taste" and c.users.source != "tastes",
        "users.labels is about made-up tastes; set users.source to tastes, or leave it at taste",
    ),
    (
        lambda c: c.users.labels == "difference" and c.model.lora is None,
        "users.labels difference is for a base that has everybody's taste already; name its LoRA in model.lora",
    ),
    (
        lambda c: c.model.tuning == "full" and c.users.source != "none",
        "model.tuning full moves the weights that a user adapter stands on; set it to lora or user_adapter",
    ),
    (
        lambda c: c.users.source in ("encoder", "tastes", "states") and c.users.path is None,
        "users.source encoder, tastes and states need users.path: an encoder's folder, or a file of states",
    ),
    (
        lambda c: c.users.source in ("encoder", "tastes") and c.data.streaming,
        "users.source encoder and tastes look pairs up, which data.streaming does not keep",
    ),
    (
        lambda c: c.users.source == "rewards" and len(c.data.scorers) < 2,
        "users.source rewards makes users who weigh scorers; name two or more columns of scores in data.scorers",
    ),
    (
        lambda c: c.data.streaming and c.data.buckets is not None,
        "data.buckets needs the sizes of all pictures before training, which data.streaming does not have",
    ),
]


Run = TypeVar("Run", bound=RunConfig)


def check(config: Run, limits: Limits, contradictions: Contradictions) -> Run:
    """Raise ValueError for values no run can have; returns the configuration."""
    for key, (words, holds) in limits.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and not holds(value):
            raise ValueError(f"{key} {words}, got {value!r}")
    for contradicts, message in contradictions:
        if contradicts(config):
            raise ValueError(message)
    return config


def validate(config: Config) -> Config:
    """`check`, for a run that tunes a diffusion model."""
    return check(config, LIMITS, CONTRADICTIONS)
