"""Preferences kept out of training: does the policy rank them right, and could it?

The implicit accuracy is the share of pairs with A_chosen > A_rejected, where the reference's own likes cancel. The
ranking accuracy is the share with e_θ(chosen) < e_θ(rejected): what the model itself finds likelier. A policy that
minimises the DPO loss exactly, for labels of probability p, has (β/2)·(A_chosen − A_rejected) = logit p, so it ranks
right where

    logit p + (β/2)·(e_ref(rejected) − e_ref(chosen)) > 0.

The share of those is the idealised ranking accuracy, which a strong reference keeps below 1 (Chen et al. 2024, arXiv
2405.19534).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor

from diffpref.batch import Encoded, PreferenceBatch
from diffpref.config import Config, DataConfig
from diffpref.data import Asked, PreferenceGroups, check, collate, kind_of, load_preferences, pair_sizes
from diffpref.gradient_cache import join_structures
from diffpref.learner import Learner
from diffpref.winrate import WinRate, win_rate

DRAWS = 2**40  # seeds of held-out noise begin here: no training run has them
SPLIT_WEIGHTS = (DistributedType.FSDP, DistributedType.DEEPSPEED)
Numbers = dict[str, float]


@dataclass(frozen=True)
class Ranks:
    """Held-out pairs: policy [P,2] and advantage [P,2] of (chosen, rejected), each the mean of all draws, float64;
    probability [P] of the label, None where the data do not say (of certain labels, the ideal is 1); prompts, P
    strings."""

    policy: np.ndarray
    advantage: np.ndarray
    probability: np.ndarray | None
    prompts: list[str]

    def numbers(self, beta: float) -> Numbers:
        """What the log has of them."""
        margin = self.advantage[:, 0] - self.advantage[:, 1]
        reference = self.policy + self.advantage
        found = {
            "validation/accuracies": share(margin),
            "validation/margins": float(0.5 * beta * margin.mean()),
            "validation/drift_chosen": float(-self.advantage[:, 0].mean()),
            "validation/drift_rejected": float(-self.advantage[:, 1].mean()),
            "validation/rankings": share(self.policy[:, 1] - self.policy[:, 0]),
            "validation/rankings_reference": share(reference[:, 1] - reference[:, 0]),
        }
        if self.probability is not None:
            found["validation/rankings_ideal"] = ideal(reference, self.probability, beta)
        return found

    def accuracy(self, confidence: float) -> WinRate:
        """The implicit accuracy with its interval, clustered by prompt."""
        return win_rate(self.advantage[:, 0], self.advantage[:, 1], self.prompts, confidence=confidence)

    def report(self, config: Config) -> dict:
        """What report.json has of them. The interval needs two prompts."""
        numbers: dict = {key.removeprefix("validation/"): v for key, v in self.numbers(config.objective.beta).items()}
        if len(set(self.prompts)) > 1:
            numbers["accuracy"] = self.accuracy(config.judge.confidence).as_dict()
        return {"validation": numbers | {"pairs": len(self.prompts)}}


def share(values: np.ndarray) -> float:
    """Share above zero, exactly zero counting half."""
    return float((0.5 * (1 + np.sign(values))).mean())


def ideal(reference: np.ndarray, probability: np.ndarray, beta: float) -> float:
    """Idealised ranking accuracy: reference [P,2] errors of (chosen, rejected), probability [P] of the label."""
    with np.errstate(divide="ignore"):  # a certain label has an infinite logit, and is ranked right
        logit = np.log(probability) - np.log1p(-probability)
    return share(logit + 0.5 * beta * (reference[:, 1] - reference[:, 0]))


def check_gradient_noise(config: Config, accelerator: Accelerator) -> None:
    """Raise ValueError where one process does not hold whole gradients to compare."""
    if config.train.gradient_noise_draws and accelerator.distributed_type in SPLIT_WEIGHTS:
        raise ValueError(
            "train.gradient_noise_draws needs whole weights in each process; leave it out with FSDP2 and DeepSpeed"
        )


class HeldOut:
    """Held-out batches, encoded once and kept on the CPU; each draw of timestep and noise is the same at every measure.

    Args:
        learner: Of the run.
        batches: Of held-out groups.
        draws: Timesteps and noises that each item's errors are averaged over.
        gradients: Draws of one batch from which the gradient's variance is estimated; 0 for none.
    """

    def __init__(self, learner: Learner, batches: list[PreferenceBatch], draws: int, gradients: int = 0):
        self.learner, self.draws, self.gradients = learner, draws, gradients
        self.encoded = [moved(learner.encoder(batch), torch.device("cpu")) for batch in batches]
        self.structure = join_structures([encoded.structure for encoded in self.encoded])
        self.prompts = [prompt for batch in batches for prompt in batch.prompts]

    def measure(self) -> Ranks:
        """Errors of all held-out pairs under the policy as it is now."""
        denoiser = self.learner.models.denoiser
        training = denoiser.training
        denoiser.eval()
        try:
            with self.learner.around():
                policy, advantage = np.concatenate([self.errors(encoded) for encoded in self.encoded], axis=1)
        finally:
            denoiser.train(training)
        pairs, known = self.structure.pairs.numpy(), self.structure.probability
        probability = None if known is None else known.double().numpy()
        return Ranks(policy[pairs], advantage[pairs], probability, [self.prompts[i] for i in pairs[:, 0]])

    @torch.no_grad()
    def errors(self, encoded: Encoded) -> np.ndarray:
        """[2,N]: error and advantage of each item, means over the draws."""
        there, total = moved(encoded, self.learner.encoder.device), 0.0
        for draw in range(self.draws):
            noised = self.learner.noise(there, DRAWS + draw)
            found = self.learner.errors(
                noised, there.structure, *self.learner.predictions((there, noised), compared=True)
            )
            total = total + torch.stack([found.policy, found.advantage]).double()
        return (total / self.draws).cpu().numpy()

    def gradient_noise(self) -> Numbers:
        """How much the gradient of one batch varies with timesteps and noise: tr Σ / |G|² from so many draws, where
        |G|² is that of their mean less its own variance (McCandlish et al. 2018, arXiv 1812.06162, appendix A)."""
        if not self.gradients:
            return {}
        there = moved(self.encoded[0], self.learner.encoder.device)
        weights = [p for p in self.learner.models.denoiser.parameters() if p.requires_grad]
        with self.learner.accelerator.no_sync(self.learner.models.denoiser):  # DDP would wait for a backward pass
            with self.learner.around():
                found = [self.gradient(there, weights, DRAWS + draw) for draw in range(self.gradients)]
        return noise_scale(torch.stack(found).double())

    def gradient(self, there: Encoded, weights: list[Tensor], seed: int) -> Tensor:
        """Of a batch's loss at one draw of timesteps and noise, [weights]."""
        loss = self.learner.loss((there, self.learner.noise(there, seed)))
        return torch.cat([g.flatten().cpu() for g in torch.autograd.grad(loss, weights, materialize_grads=True)])


def noise_scale(gradients: Tensor) -> Numbers:
    """Gradients [draws, weights] of the same batch -> trace of their covariance, squared length of their mean without
    that covariance's share in it, and the ratio (left out where that length is within the noise)."""
    trace = gradients.var(dim=0).sum()
    length = gradients.mean(dim=0).square().sum() - trace / len(gradients)
    known = {"gradient/variance": trace.item(), "gradient/squared": length.item()}
    return known | ({"gradient/noise_scale": (trace / length).item()} if length > 0 else {})


def moved(encoded: Encoded, device: torch.device) -> Encoded:
    """The same on another device."""
    conditioning = {key: value.to(device) for key, value in encoded.conditioning.items()}
    structure = encoded.structure.to(device)
    return replace(encoded, latents=encoded.latents.to(device), conditioning=conditioning, structure=structure)


@dataclass(frozen=True)
class HeldOutRows:
    """The first rows of data.validation that can be used, and how they are read."""

    data: DataConfig
    rows: Dataset
    sizes: np.ndarray | None


def held_out_rows(data: DataConfig, numbers: bool = False) -> HeldOutRows | None:
    """None without data.validation; `numbers` as of `load_preferences`. Raises ValueError or FileNotFoundError, naming
    it, for a set that cannot be used or has no pairs."""
    if data.validation is None:
        return None
    shown = replace(data, path=data.validation, max_pairs=data.validation_groups, streaming=False, caption_dropout=0.0)
    try:
        rows = load_preferences(shown, numbers)
        checked = check(rows, shown)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.path", "data.validation", 1)) from error
    kind = kind_of(rows.column_names, shown)
    if "pairs" not in kind.gives:
        raise ValueError(f"data.validation: accuracy is of pairs, and {data.validation} holds {kind.name}")
    return HeldOutRows(shown, checked.rows, checked.sizes)


def held_out_batches(
    held: HeldOutRows, resolution: int, multiple: int, batch_size: int, asked: Asked | None = None
) -> list[PreferenceBatch]:
    """The rows whole and undropped, cut as the training's are.

    Args:
        held: The rows.
        resolution: The pipeline's own picture side.
        multiple: What sides must be multiples of.
        batch_size: Groups of a batch; of one size each.
        asked: Whose they are.
    """
    kind, sizes = kind_of(held.rows.column_names, held.data), pair_sizes(held.data, resolution, multiple, held.sizes)
    groups = PreferenceGroups(held.rows, kind, held.data, sizes, seed=0, asked=asked)
    count = batch_size if isinstance(sizes, tuple) else 1
    keys = range(len(groups))
    return [collate([groups[key, key] for key in keys[first : first + count]]) for first in keys[::count]]
