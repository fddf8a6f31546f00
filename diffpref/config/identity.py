"""A configuration as plain values: written down, hashed, compared."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from diffpref.config.sections import RunConfig


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=name_of))


def name_of(value: object) -> str:
    """Paths and functions as the text that a configuration file has for them."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


# Keys that say where, how often and how fast, but not what is computed: a run may go on with others.
INCIDENTAL = (
    "name",
    "output_dir",
    "overwrite",
    "data.num_workers",
    "data.prefetch_factor",
    "data.validation",
    "data.validation_groups",
    "data.validation_draws",
    "cache.folder",
    "cache.max_gb",
    "lora.compute",
    "model.attention",
    "train.channels_last",
    "train.checkpointing_steps",
    "train.checkpoints_total_limit",
    "train.resume_from_checkpoint",
    "train.compile",
    "train.gradient_checkpointing",
    "train.gradient_noise_draws",
    "train.kernel",
    "train.logging_steps",
    "train.report_to",
    "sample",
    "judge",
)
# Keys whose product with the number of processes is what counts: the groups of an optimiser step.
BATCH = ("train.train_batch_size", "train.gradient_accumulation_steps")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def computed(config: RunConfig) -> dict[str, Any]:
    """The keys, dotted, that say what a run computes."""
    incidental = tuple(key + "." for key in INCIDENTAL)
    return {k: v for k, v in flatten(to_dict(config)).items() if not (k + ".").startswith(incidental)}


def config_hash(config: RunConfig) -> str:
    """Identifies what a run computes: every key but its name and folder."""
    content = {k: v for k, v in to_dict(config).items() if k not in ("name", "output_dir", "overwrite")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def differing(config: RunConfig, stored: dict[str, Any]) -> list[str]:
    """What a checkpoint's `computed` keys say otherwise than this configuration, one line each.

    A constant learning rate does not depend on the number of steps, so such a run may be made longer.
    """
    now = computed(config)
    free = {*BATCH, *(["train.max_train_steps"] if config.train.lr_scheduler.startswith("constant") else [])}
    keys = sorted((now.keys() | stored.keys()) - free)
    return [
        f"{key}: {stored.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} here"
        for key in keys
        if stored.get(key, ()) != now.get(key, ())
    ]
