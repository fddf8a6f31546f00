"""What makes a step fast, one switch each: a change of the configuration, or of the trainer once it is made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from diffpref.config import Config
from diffpref.trainer import Trainer

HALF = {"model.dtype": "bfloat16", "train.mixed_precision": "bf16"}
WHOLE = {"model.dtype": "float32", "train.mixed_precision": "no"}
CACHES = {"cache.latents": True, "cache.text": True}
FULL = CACHES | {"train.gradient_checkpointing": False}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with dotted keys set."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        fresh = replace(getattr(config, section), **{name: value}) if section else value
        config = replace(config, **{section or name: fresh})
    return config


# --- what no key of the configuration switches ------------------------------------------------------------------------


def public_toggle(trainer: Trainer) -> None:
    """The reference by diffusers' disable_adapters and enable_adapters."""
    denoiser = trainer.denoiser

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        denoiser.disable_adapters()
        try:
            yield trainer.learner.models.denoiser
        finally:
            denoiser.enable_adapters()

    trainer.learner.models = replace(trainer.learner.models, base=reference)


@dataclass(frozen=True)
class Lever:
    """what: is other than in `ours`.  changes: of the configuration.  alter: of the trainer.  on: the kinds of device
    on which it is tried unless asked for by name.  estimator: whether it is no longer the same expectation.  epochs:
    gone through before anything is timed."""

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    alter: Callable[[Trainer], None] = lambda trainer: None
    on: tuple[str, ...] = ("cpu", "cuda")
    estimator: bool = False
    epochs: int = 0


GPU, CPU = ("cuda",), ("cpu",)
# In order of gain expected: what a budget cuts off is the end.
LEVERS: dict[str, Lever] = {
    "ours": Lever("caches, workers, cheap toggle, cast LoRA; bf16 on a GPU, fp32 elsewhere"),
    "no_caches": Lever("neither latents nor text cached", {"cache.latents": False, "cache.text": False}),
    "no_workers": Lever("pictures decoded in the training process", {"data.num_workers": 0}),
    "no_latent_cache": Lever("the VAE at each step", {"cache.latents": False}),
    "no_text_cache": Lever("the text encoders once for each prompt, kept in memory", {"cache.text": False}),
    "checkpointing": Lever("activations computed twice", {"train.gradient_checkpointing": True}),
    "compile": Lever("torch.compile, inductor", {"train.compile": "inductor"}, on=GPU),
    "channels_last": Lever("channels-last convolutions", {"train.channels_last": True}),
    "fast": Lever("compile and channels-last", {"train.compile": "inductor", "train.channels_last": True}, on=()),
    "bf16": Lever("bf16", HALF, on=CPU),
    "fp32": Lever("fp32", WHOLE, on=GPU),
    "no_casting": Lever("peft's own casts of a LoRA's input", HALF | {"lora.compute": "float32"}),
    "public_toggle": Lever("diffusers' disable_adapters and enable_adapters", alter=public_toggle),
    "torch_kernel": Lever("the loss in PyTorch", {"train.kernel": "torch"}, on=GPU),
    "plain_adamw": Lever("AdamW in more than one kernel", {"train.optimizer": "adamw_unfused"}),
    "sdpa": Lever("attention as torch chooses", {"model.attention": "sdpa"}, on=GPU),
    "kept_reference": Lever(
        "reference errors of one draw a pair kept", {"reference.draws": 1}, estimator=True, epochs=1
    ),
}
