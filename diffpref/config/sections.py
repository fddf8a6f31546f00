"""Typed configuration: the one place where a default is written down.

Docstrings of the fields are the command's help text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffpref.config.objective import NoiseConfig, ObjectiveConfig, ReferenceConfig
from diffpref.config.users import UsersConfig


@dataclass(frozen=True)
class ModelConfig:
    """The base pipeline and how it is tuned.

    Args:
        pretrained_model_name_or_path: Folder or hub id of a diffusers pipeline (SD 1.x/2.x, SDXL, SD3).
        revision: Hub revision.
        variant: Weight variant, such as fp16.
        dtype: Of the frozen base weights. Trainable weights are fp32 in any case.
        attention: Kernel of the denoiser's attention: auto leaves the choice to torch, except on Hopper, where cuDNN's
            goes first; sdpa is torch's choice everywhere. What cannot be had is an error.
        lora: File or folder of a LoRA that is part of the base: loaded, frozen, on in the reference, too, and written
            beside the result. Only with tuning user_adapter.
        tuning: A LoRA on the denoiser, all of its weights, or none of them: with users.source, a user adapter is
            trained beside the first or, with user_adapter, alone.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "sdpa", "cudnn", "flash", "xformers"] = "auto"
    lora: str | None = None
    tuning: Literal["lora", "full", "user_adapter"] = "lora"


@dataclass(frozen=True)
class LoraSettings:
    """The adapter; names and meanings are peft's.

    Args:
        rank: Rank r of the update.
        alpha: Scale numerator; the rank when not given, so that the scale is 1.
        target_modules: Module name endings; the family's attention projections when not given.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        use_dora: Decompose into magnitude and direction.
        compute: Precision that the adapter computes in: its input's, or fp32 with casts at every layer. Its weights
            are fp32 in any case.
        dropout: On the adapter's input. Policy and reference then differ by more than the weights; 0 is right for DPO.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    compute: Literal["input", "float32"] = "input"
    dropout: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Preferences: pairs, lists, likes or captions. README.md has the columns of each.

    Args:
        path: Parquet or JSONL file, folder of them, webdataset shards, or hub id of a data set.
        split: Which split of it.
        format: Whose columns the set has; auto tells by their names.
        kind: What a row is: pairs (two pictures of which one is better), lists (several, with scores or ranks), likes
            (one, liked or not), captions (one, and a prompt that fits it better than another). auto tells by the
            columns.
        comparisons: Which pairs a list makes: all of them, its best with its worst, or neighbours in rank.
        scores: How a list's scores are taken: as they are, or each as the share of the others that it beats.
        scorers: Columns with scores of several scorers, a list of numbers each, one for each picture. Their votes
            replace the label: the majority says which is better, the share of votes is scores and probability.
        aspects: Columns that say by aspect (prompt following, aesthetics, …) which picture of a pair is better: 1 the
            chosen one, -1 the rejected one, 0 neither, null nobody said. Read by scorers.
        joint: Compare each chosen picture with a rejected one of another row, each under its own prompt (dove).
        rejected_captions: Where the prompt comes from that fits worse: rules changes the prompt's own words, shuffle
            takes another row's, rules_or_shuffle the latter where the former finds nothing; or a function by dotted
            path, prompt -> prompt, or a file of JSON lines with prompt and rejected_prompt.
        resolution: Side of the square training pictures; the pipeline's own size when not given.
        buckets: Sizes [height, width] to train at; a group goes into the one nearest to its aspect ratio. auto makes
            a ladder of aspect ratios with as many pixels as resolution². Without buckets every picture is a square.
        center_crop: Crop the middle; otherwise a random place, the same for all pictures of a group.
        random_flip: Mirror half of the groups, all pictures of one alike.
        caption_dropout: Share of groups trained with the empty prompt, which keeps classifier-free guidance alive.
        max_pairs: Use only the first so many groups, of any kind.
        min_margin: Leave out pairs whose margin column is smaller: their label is a coin toss.
        max_margin: Leave out pairs whose margin column is larger: the model has nothing to learn from them.
        ties: What becomes of pairs without a winner (margin 0, label 0.5): left out; kept as they stand; kept with
            probability one half; or kept both ways round.
        faults: A group that cannot be used (a broken picture, no prompt, a missing vote, twice the same picture)
            is left out, named and counted, or stops the run.
        streaming: Read rows as they come, without a copy on this disk; for sets too large to download.
        shuffle_buffer: Rows of a stream that are shuffled among themselves.
        num_workers: Processes that decode pictures; 0 decodes in the training process.
        prefetch_factor: Batches that each of them decodes ahead.
        validation: Held-out preferences, of the same columns: ranking accuracy is measured on them at every validation
            and at the end.
        validation_groups: How many of its rows; a scorer takes all.
        validation_draws: Timesteps and noises that a row's advantage is averaged over.
    """

    path: str
    split: str = "train"
    format: str = "auto"
    kind: Literal["auto", "pairs", "lists", "likes", "captions"] = "auto"
    comparisons: Literal["all", "best_worst", "adjacent"] = "all"
    scores: Literal["as_is", "votes"] = "as_is"
    scorers: list[str] = field(default_factory=list)
    aspects: list[str] = field(default_factory=list)
    joint: bool = False
    rejected_captions: str | None = None
    resolution: int | None = None
    buckets: list[tuple[int, int]] | Literal["auto"] | None = None
    center_crop: bool = True
    random_flip: bool = False
    caption_dropout: float = 0.0
    max_pairs: int | None = None
    min_margin: float | None = None
    max_margin: float | None = None
    ties: Literal["drop", "keep", "half", "both"] = "drop"
    faults: Literal["skip", "raise"] = "skip"
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 2
    prefetch_factor: int = 4
    validation: str | None = None
    validation_groups: int = 64
    validation_draws: int = 4


@dataclass(frozen=True)
class StoreConfig:
    """Where what encoders make is kept.

    Args:
        folder: Where; output_dir/cache when not given. Runs share it.
        max_gb: Size it may reach. Entries of other models and pictures are removed for new ones.
    """

    folder: Path | None = None
    max_gb: float = 50.0


@dataclass(frozen=True)
class CacheConfig(StoreConfig):
    """What the encoders make, kept on disk: each picture and prompt is encoded once, and the encoders leave memory.

    Args:
        latents: Keep the VAE's posterior of every picture; latents are drawn from it afresh at each step.
        text: Keep the text encoders' output for every prompt.
        crops: Random places a cached crop may lie at, for each pair; 1 with data.center_crop.
    """

    latents: bool = False
    text: bool = False
    crops: int = 4


@dataclass(frozen=True)
class LoopConfig:
    """The loop, whatever is trained.

    Args:
        max_train_steps: Optimiser steps.
        train_batch_size: Groups (pairs, lists, likes or captions: rows of the set) in one forward pass of one
            process.
        gradient_accumulation_steps: Forward passes to an optimiser step.
        optimizer: AdamW in one kernel; the same, one operation after the other; or bitsandbytes' AdamW with 8-bit
            states (a quarter of their memory; needs the extra 8bit).
        learning_rate: Peak rate of the optimiser.
        lr_scheduler: diffusers' name of the schedule.
        lr_warmup_steps: Steps of linear warm-up.
        adam_beta1: First moment's decay.
        adam_beta2: Second moment's decay.
        adam_weight_decay: Decoupled weight decay.
        adam_epsilon: Added to the denominator.
        max_grad_norm: Gradients are clipped to this norm.
        skip_grad_norm: Leave out an optimiser step whose gradient norm is more than so many times the running
            average, or not finite. Costs a wait for the GPU at every step.
        ema_decay: Average the trainable weights at this decay; the result is then the average.
        mixed_precision: Compute precision under autocast.
        gradient_checkpointing: Recompute activations: less memory, more time.
        seed: Of what trains, the order of the data, and all that is drawn.
        checkpointing_steps: Steps between checkpoints; 0 for none.
        checkpoints_total_limit: Keep only so many of the newest; all when not given.
        resume_from_checkpoint: latest, or a checkpoint folder of this run.
        logging_steps: Steps between lines in metrics.jsonl.
        report_to: accelerate trackers, such as tensorboard or wandb.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adamw_unfused", "adamw_8bit"] = "adamw"
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    skip_grad_norm: float | None = None
    ema_decay: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The loop, of a diffusion model.

    Args:
        gradient_cache: Items that hold activations at once. Errors of the whole batch are computed first without
            graph, then each item is run again with its coefficient: one more forward pass, the memory of so few items.
        gradient_noise_draws: Draws of timesteps and noise from which the variance of a batch's gradient is estimated
            whenever held-out preferences are measured; 0 for none.
        gradient_checkpointing: Recompute activations: less memory, more time. auto measures at the first batch whether
            they fit without (where weights are sharded, or DeepSpeed's, it does not recompute).
        kernel: Who reduces predictions to errors: Triton kernels, PyTorch, or (auto) the former on a CUDA device.
        compile: torch.compile's backend for the denoiser: a transformer block by block, a UNet whole.
        channels_last: Keep the convolutions' weights and inputs in channels-last layout.
        drift_alarm: Standard errors by which the winners' drift must exceed zero before the alarm speaks.
        on_drift: At the alarm, say so and go on, or stop early and conclude.
    """

    gradient_cache: int | None = None
    gradient_noise_draws: int = 0
    # auto is for this loop alone: others have only true and false
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    kernel: Literal["auto", "torch", "triton"] = "auto"
    compile: Literal["none", "inductor", "aot_eager", "eager"] = "none"
    channels_last: bool = False
    drift_alarm: float = 4.0
    on_drift: Literal["warn", "stop"] = "warn"


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
        user: Embedding of the user for whom a run with users.source draws (diffpref user embed); nobody when not given.
    """

    prompts: list[str] | str = field(default_factory=list)
    validation_steps: int = 0
    validation_prompts: int = 8
    images_per_prompt: int = 4
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    batch_size: int = 16
    seed: int = 0
    user: str | None = None


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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, whatever is trained.

    Args:
        name: Of the run; it lives in output_dir/name.
        output_dir: Folder of the runs.
        overwrite: Start afresh where a run of this name is already; otherwise that is an error.
        data: The preferences.
        cache: What encoders make, on disk.
        train: The loop.
    """

    name: str
    output_dir: Path = Path("runs")
    overwrite: bool = False
    data: DataConfig
    cache: StoreConfig = field(default_factory=StoreConfig)
    train: LoopConfig = field(default_factory=LoopConfig)

    @property
    def run_dir(self) -> Path:
        """Where everything of this run goes."""
        return self.output_dir / self.name


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A run that tunes a diffusion model.

    Args:
        model: The base pipeline.
        lora: The adapter.
        cache: Encoded pictures and prompts on disk.
        noise: Timesteps and noise.
        objective: The loss.
        reference: What the policy is compared with.
        users: Whom the model is personalised for.
        train: The loop.
        sample: Pictures.
        judge: The verdict.
    """

    model: ModelConfig
    lora: LoraSettings = field(default_factory=LoraSettings)
    cache: CacheConfig = field(default_factory=CacheConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    users: UsersConfig = field(default_factory=UsersConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
