"""What the reference's errors depend on, as the name of their folder: another weight, another table."""

import hashlib
import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from diffpref.cache import DiskCache
from diffpref.cache.fingerprint import fingerprint, latents_fingerprint, raw, text_fingerprint
from diffpref.config import Config
from diffpref.data.kinds import PROMPTS
from diffpref.noise import FIXED_SEED, Parameterization

CUTTING = ("center_crop", "random_flip", "caption_dropout")  # of data: what is drawn for a group beside its noise


def digest(values: Any) -> str:
    """Of an array's or a tensor's bytes."""
    content = raw(values).tobytes() if isinstance(values, Tensor) else np.ascontiguousarray(values).tobytes()
    return hashlib.sha256(content).hexdigest()


def schedule_facts(parameters: Parameterization) -> list:
    """Class and fields of a model's noise schedule."""
    assert is_dataclass(parameters)
    values = {field.name: getattr(parameters, field.name) for field in fields(parameters)}
    plain = {name: digest(value) if isinstance(value, Tensor) else value for name, value in values.items()}
    return [type(parameters).__name__, plain]


def rows_facts(rows: Dataset, digests: np.ndarray, sizes: tuple[int, int] | np.ndarray) -> list:
    """Pictures [rows,K,32] by their digests, prompts, and the sizes that they are cut to; in order. Labels, weights and
    comparisons are not among them: the reference does not know them."""
    whole = np.broadcast_to(np.asarray(sizes, np.int64), (len(rows), 2))
    words = json.dumps({name: rows[name][:] for name in PROMPTS if name in rows.column_names})
    return [list(digests.shape), digest(digests), digest(whole), hashlib.sha256(words.encode()).hexdigest()]


def path_facts(config: Config, precision: torch.dtype, device: torch.device) -> list:
    """How forward passes are computed. Policy and reference must round alike: in half precision two kernels' errors of
    one prediction differ by more than the logit bears."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    ways = [config.train.kernel, config.train.compile, config.train.channels_last, config.model.attention]
    return [str(precision), config.train.mixed_precision, machine, torch.__version__, *ways]


def encoder_facts(pipe: DiffusionPipeline, cache: DiskCache | None) -> list:
    """How pictures and prompts are encoded; a cache that has let encoders go is named by what they were."""
    pictures, prompts = (cache.pictures, cache.prompts) if cache else (None, None)
    return [
        pictures.folder.name if pictures else f"latents-{latents_fingerprint(pipe)}",
        prompts.folder.name if prompts else f"text-{text_fingerprint(pipe)}",
    ]


def table_fingerprint(
    weights: list,
    parameters: Parameterization,
    config: Config,
    pipe: DiffusionPipeline,
    cache: DiskCache | None,
    rows: list,
    computed: list,
) -> str:
    """Stands for a table: all that its numbers depend on, but for the last digits that a batch's size decides.

    Args:
        weights: Facts of the reference's denoiser.
        parameters: Its noise schedule.
        config: noise, data, reference.draws.
        pipe: With the encoders that are still there.
        cache: What was encoded by those that are not.
        rows: From `rows_facts`.
        computed: From `path_facts`.
    """
    cutting = {name: getattr(config.data, name) for name in CUTTING}
    still = config.data.center_crop and not config.data.random_flip
    places = cache.crops if cache and not still else None  # a cache offers so many places, and without one there is any
    drawn = [FIXED_SEED, config.reference.draws, asdict(config.noise), cutting, places]
    return fingerprint(weights, schedule_facts(parameters), drawn, encoder_facts(pipe, cache), rows, computed)
