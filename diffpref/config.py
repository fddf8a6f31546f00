"""Typed configuration: the one place where a default is written down.

YAML file, then dotted overrides on the command line (`--train.learning_rate 1e-4`). Unknown keys, wrong types and
impossible values are errors that name the key. Docstrings of the fields are the command's help text.
"""

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser


@dataclass(frozen=True)
class ModelConfig:
    """The base pipeline and how it is tuned.

    Args:
        pretrained_model_name_or_path: Folder or hub id of a diffusers pipeline (SD 1.x/2.x, SDXL, SD3).
        revision: Hub revision.
        variant: Weight variant, such as fp16.
        dtype: Of the frozen base weights. Trainable weights are fp32 in any case.
        tuning: A LoRA on the denoiser, or all of the denoiser's weights.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tuning: Literal["lora", "full"] = "lora"


@dataclass(frozen=True)
class LoraSettings:
    """The adapter; names and meanings are peft's.

    Args:
        rank: Rank r of the update.
        alpha: Scale numerator; the rank when not given, so that the scale is 1.
        target_modules: Module name endings; the family's attention projections when not given.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        use_dora: Decompose into magnitude and direction.
        dropout: On the adapter's input. Policy and reference then differ by more than the weights; 0 is right for DPO.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Preferences: rows with prompt, chosen, rejected (and optionally weight).

    Args:
        path: Parquet or JSONL file, folder of them, or hub id of a data set.
        split: Which split of it.
        resolution: Side of the square training pictures; the pipeline's own size when not given.
        center_crop: Crop the middle; otherwise a random place, the same for both pictures of a pair.
        random_flip: Mirror half of the pairs, both pictures alike.
        caption_dropout: Share of groups trained with the empty prompt, which keeps classifier-free guidance alive.
        max_pairs: Use only the first so many pairs.
        num_workers: Processes that decode pictures; 0 decodes in the training process.
    """

    path: str
    split: str = "train"
    resolution: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    caption_dropout: float = 0.0
    max_pairs: int | None = None
    num_workers: int = 2


@dataclass(frozen=True)
class NoiseConfig:
    """How x_t is made.

    Args:
        strategy: One noise for the group (Diffusion-DPO), or one for each item. The timestep is shared either way.
        timesteps: How timesteps are drawn.
        logit_mean: m of the logit-normal sampler.
        logit_std: s of the logit-normal sampler.
    """

    strategy: Literal["shared", "independent"] = "shared"
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised.

    Args:
        name: dpo, or sft on the winners.
        beta: Multiplies half the margin of mean squared errors, as in Diffusion-DPO's --beta_dpo.
    """

    name: Literal["dpo", "sft"] = "dpo"
    beta: float = 5000.0


@dataclass(frozen=True)
class ReferenceConfig:
    """What the policy is compared with.

    Args:
        kind: The same model with its adapter off, or a frozen copy made before training (the choice for full
        fine-tuning).
    """

    kind: Literal["adapter_off", "frozen_copy"] = "adapter_off"


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_train_steps: Optimiser steps.
        train_batch_size: Comparisons in one forward pass of one process.
        gradient_accumulation_steps: Forward passes to an optimiser step.
        learning_rate: Peak rate of AdamW.
        lr_scheduler: diffusers' name of the schedule.
        lr_warmup_steps: Steps of linear warm-up.
        adam_beta1: First moment's decay.
        adam_beta2: Second moment's decay.
        adam_weight_decay: Decoupled weight decay.
        adam_epsilon: Added to the denominator.
        max_grad_norm: Gradients are clipped to this norm.
        mixed_precision: Compute precision of the denoiser under autocast.
        gradient_checkpointing: Recompute activations: less memory, more time.
        seed: Of the adapter's start, the order of the data, timesteps and noise.
        checkpointing_steps: Steps between checkpoints; 0 for none.
        resume_from_checkpoint: latest, or a checkpoint folder of this run.
        logging_steps: Steps between lines in metrics.jsonl.
        report_to: accelerate trackers, such as tensorboard or wandb.
        drift_alarm: Standard errors by which the winners' drift must exceed zero before the alarm speaks.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    resume_from_checkpoint: str | None = None
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    drift_alarm: float = 4.0


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn, for validation and for the verdict at the end; before and after share their seeds.

    Args:
        prompts: Prompts, or a text file with one a line. Without prompts no pictures are drawn.
        validation_steps: Training steps between validation pictures; 0 for none before the end.
        validation_prompts: How many of the prompts the validation pictures show.
        images_per_prompt: Seeds for each prompt at the end.
        num_inference_steps: Denoising steps of a picture.
        guidance_scale: Classifier-free guidance.
        batch_size: Pictures drawn at once.
        seed: First seed.
    """

    prompts: list[str] | str = field(default_factory=list)
    validation_steps: int = 0
    validation_prompts: int = 8
    images_per_prompt: int = 4
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class JudgeConfig:
    """Who decides whether the tuned pictures are better. Functions by dotted path, (images, prompts) -> one number
    a picture.

    Args:
        judge: Higher is better; gives the win rate of the tuned policy over the base.
        measures: More numbers to report as means before and after, by name.
        confidence: Of the win rate's interval, clustered by prompt.
    """

    judge: Callable | None = None
    measures: dict[str, Callable] = field(default_factory=dict)
    confidence: float = 0.95


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        name: Of the run; it lives in output_dir/name.
        output_dir: Folder of the runs.
        overwrite: Start afresh where a run of this name is already; otherwise that is an error.
        model: The base pipeline.
        lora: The adapter.
        data: The preferences.
        noise: Timesteps and noise.
        objective: The loss.
        reference: What the policy is compared with.
        train: The loop.
        sample: Pictures.
        judge: The verdict.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    output_dir: Path = Path("runs")
    overwrite: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    @property
    def run_dir(self) -> Path:
        """Where everything of this run goes."""
        return self.output_dir / self.name


# Impossible values: (what must hold, in words, test). The error names key, value and the words.
POSITIVE = ("must be positive", lambda x: x > 0)
NOT_NEGATIVE = ("must not be negative", lambda x: x >= 0)
SHARE = ("must lie in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_ONE = ("must lie in [0, 1)", lambda x: 0 <= x < 1)
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("must name a folder, not a path", lambda x: bool(re.fullmatch(r"[\w.\-]*\w[\w.\-]*", x))),
    "lora.rank": POSITIVE,
    "lora.alpha": POSITIVE,
    "lora.dropout": BELOW_ONE,
    "data.resolution": POSITIVE,
    "data.caption_dropout": SHARE,
    "data.max_pairs": POSITIVE,
    "data.num_workers": NOT_NEGATIVE,
    "noise.logit_std": POSITIVE,
    "objective.beta": POSITIVE,
    "train.seed": NOT_NEGATIVE,
    "sample.seed": NOT_NEGATIVE,
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
    "train.checkpointing_steps": NOT_NEGATIVE,
    "train.logging_steps": POSITIVE,
    "sample.validation_steps": NOT_NEGATIVE,
    "sample.validation_prompts": POSITIVE,
    "sample.images_per_prompt": POSITIVE,
    "sample.num_inference_steps": POSITIVE,
    "sample.batch_size": POSITIVE,
    "judge.confidence": ("must lie in (0, 1)", lambda x: 0 < x < 1),
}


def validate(config: Config) -> Config:
    """Raise ValueError for values no run can have; returns the configuration."""
    for key, (words, holds) in LIMITS.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and not holds(value):
            raise ValueError(f"{key} {words}, got {value!r}")
    if config.model.tuning == "full" and config.reference.kind == "adapter_off" and config.objective.name != "sft":
        raise ValueError("model.tuning full has no adapter to switch off; set reference.kind to frozen_copy")
    if config.model.dtype == "float16" and config.train.mixed_precision != "fp16":
        raise ValueError("model.dtype float16 needs train.mixed_precision fp16: its scaler saves small gradients")
    if config.judge.measures and not config.sample.prompts:
        raise ValueError("judge.measures needs pictures to measure; give sample.prompts")
    if config.sample.validation_steps and not config.sample.prompts:
        raise ValueError("sample.validation_steps needs something to draw; give sample.prompts")
    if config.judge.judge and not config.sample.prompts:
        raise ValueError("judge.judge needs pictures to judge; give sample.prompts")
    return config


def config_parser() -> ArgumentParser:
    """The command line of a run."""
    parser = ArgumentParser(
        prog="train.py", description="Tune a diffusion model on preferences.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for f in fields(cls):
        nested = is_dataclass(f.type)
        keys += known_keys(f.type, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


UNKNOWN_KEY = (
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
    r"nrecognized arguments: --([\w.]+)",
)


def explain(error: Exception) -> str:
    """A parser's error with, for a key that does not exist, the nearest one that does."""
    message = str(error)
    unknown = next((m for m in (re.search(p, message) for p in UNKNOWN_KEY) if m), None)
    if not unknown:
        return message
    key = ".".join(unknown.groups())
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    near = near or [k for k in known_keys() if k.endswith("." + key)][:1]
    return f"unknown configuration key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def load_config(argv: Sequence[str] | None = None) -> Config:
    """Parse a command line. Raises ValueError, naming the key, for anything a run cannot use."""
    parser = config_parser()
    try:
        parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        instance = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(explain(error)) from error
    return validate(Config(**{f.name: getattr(instance, f.name) for f in fields(Config)}))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=name_of))


def name_of(value: object) -> str:
    """Paths and functions as the text that a configuration file has for them."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


def config_hash(config: Config) -> str:
    """Identifies what a run computes: every key but its name and folder."""
    content = {k: v for k, v in to_dict(config).items() if k not in ("name", "output_dir", "overwrite")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
