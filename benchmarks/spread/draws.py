"""Gradients of single pairs of the emoji world, each under several ways to draw its timestep and noise.

A step's gradient is the mean over its groups, so its variance is made of products of group gradients: lengths, and
products of groups that share a draw. What is kept of a gradient is a sketch (every weight's share goes, with a random
sign, to one of SKETCH places): products of sketches are unbiased for those of the gradients, over the signs.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffpref.batch import Encoded, Noised
from diffpref.checkpoint import trainable
from diffpref.config import Config, JudgeConfig, NoiseConfig, SampleConfig, load_config
from diffpref.data import training_loader
from diffpref.learner import Learner
from diffpref.noise.schedules import wide
from diffpref.trainer import Trainer

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "diffpref" / "emoji_world" / "data"
SKETCH = 2**14  # places of a sketch
FIRST, SECOND, APART = 1, 2, 3  # seeds of the iid draw, of the stratified one, of independent noise
Gradients = dict[str, Tensor]

WAYS = {
    "iid": "a timestep and a noise for each pair",
    "stratified": "the same pair again: fresh noise, its timestep from its own share of the step's",
    "neighbour": "the pair's own timestep, minus the noise of the pair before it in the step",
    "mirrored": "the same pair and timestep, minus its noise",
    "mirrored afresh": "the same pair, minus its noise, the timestep of `stratified`",
    "independent": "the pair's own timestep, a noise for the winner and one for the loser",
}


@dataclass(frozen=True)
class Condition:
    """Where gradients are taken.

    name: Of it.  lora: File of the adapter; None for the one a run begins with.  noise: Timesteps.
    """

    name: str
    lora: Path | None = None
    noise: NoiseConfig = field(default_factory=NoiseConfig)


LORA = WORLD / "personal" / "pytorch_lora_weights.safetensors"  # 600 steps of the quickstart's settings
QUICKSTART = NoiseConfig(timesteps="logit_normal", logit_mean=1.0)
CONDITIONS = (
    Condition("start, uniform timesteps"),
    Condition("trained, uniform timesteps", LORA),
    Condition("trained, the quickstart's timesteps", LORA, QUICKSTART),
)


@dataclass(frozen=True)
class Plan:
    """How much is drawn, and where it is kept.

    steps: Of each condition.  pairs: Of a step, and strata of its timesteps.  seed: Of pairs and adapter.
    """

    folder: Path
    steps: int
    pairs: int = 16
    seed: int = 0


def configuration(plan: Plan) -> Config:
    """The quickstart's adapter, objective and data, a pair at a time."""
    place = {
        "model.pretrained_model_name_or_path": WORLD / "pipeline",
        "data.path": WORLD / "preferences" / "pairs.parquet",
        "sample.prompts": WORLD / "evaluation_prompts.txt",
        "output_dir": plan.folder,
        "train.seed": plan.seed,
        "train.train_batch_size": 1,
        "train.gradient_accumulation_steps": plan.pairs,
    }
    flags = [f"--{key}={value}" for key, value in place.items()]
    config = load_config(["--config", str(ROOT / "configs" / "quickstart.yaml"), *flags])
    return replace(config, sample=SampleConfig(), judge=JudgeConfig(), noise=NoiseConfig())


# --- draws ------------------------------------------------------------------------------------------------------------


class Source:
    """The trainer whose loss is differentiated, at one condition.

    Args:
        trainer: With a LoRA.
        condition: Its weights and timesteps are set here.
    """

    def __init__(self, trainer: Trainer, condition: Condition):
        self.trainer, self.condition, self.parameters = trainer, condition, trainer.parameterization
        self.weights = list(trainable(trainer.denoiser).values())
        noise = condition.noise
        self.learner = self.with_noise(noise)
        self.stratified = self.with_noise(replace(noise, stratified=True))
        self.independent = self.with_noise(replace(noise, strategy="independent"))
        generator = torch.Generator().manual_seed(0)
        count = sum(w.numel() for w in self.weights)
        self.place = torch.randint(SKETCH, (count,), generator=generator)
        self.sign = torch.randint(2, (count,), generator=generator).float().mul_(2).sub_(1)

    def with_noise(self, noise: NoiseConfig) -> Learner:
        """The trainer's learner, drawing otherwise."""
        t = self.trainer
        config = replace(t.config, noise=noise)
        return Learner(t.accelerator, t.learner.models, t.encoder, self.parameters, config, t.loop.groups_per_step())

    def draws(self, block: list[Encoded]) -> Iterator[dict[str, Noised]]:
        """For each group of a step, each way's x_t and target."""
        first = [self.learner.noise(encoded, FIRST) for encoded in block]
        noises = [self.noise_of(*item) for item in zip(block, first, strict=True)]
        for i, encoded in enumerate(block):
            second = self.stratified.noise(encoded, SECOND)
            yield {
                "iid": first[i],
                "stratified": second,
                "neighbour": self.renoised(encoded, first[i], -noises[i - 1]),
                "mirrored": self.renoised(encoded, first[i], -noises[i]),
                "mirrored afresh": self.renoised(encoded, second, -noises[i]),
                "independent": self.independent.noise(encoded, APART),
            }

    def noise_of(self, encoded: Encoded, noised: Noised) -> Tensor:
        """ε [N,C,h,w] of x_t = a·x0 + s·ε."""
        a, s = (wide(value, encoded.latents) for value in self.parameters.coefficients(noised.level))
        return (noised.x_t - a * encoded.latents) / s

    def renoised(self, encoded: Encoded, at: Noised, noise: Tensor) -> Noised:
        """Another noise at the same levels."""
        x0, mixtures = encoded.latents, (self.parameters.coefficients(at.level), self.parameters.target(at.level))
        x_t, target = (wide(by_x0, x0) * x0 + wide(by_noise, x0) * noise for by_x0, by_noise in mixtures)
        return replace(at, x_t=x_t, target=target)

    def gradient(self, encoded: Encoded, noised: Noised) -> Tensor:
        """Of the pair's loss, [weights]."""
        loss = self.learner.loss((encoded, noised))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights, materialize_grads=True)])

    def sketch(self, gradient: Tensor) -> Tensor:
        """[weights] -> [SKETCH]."""
        return torch.zeros(SKETCH).index_add_(0, self.place, self.sign * gradient)

    def block(self, block: list[Encoded], bar: tqdm) -> Gradients:
        """Of each way: sketches [B,SKETCH] and exact squared lengths [B] of a step's groups; levels [B] of both
        draws of timesteps."""
        rows: dict[str, list[Tensor]] = {}
        for encoded, ways in zip(block, self.draws(block), strict=True):
            for way, noised in ways.items():
                gradient = self.gradient(encoded, noised)
                rows.setdefault(way, []).append(self.sketch(gradient))
                rows.setdefault(f"{way}/squared", []).append(gradient.square().sum())
                bar.update()
            for way in ("iid", "stratified"):
                rows.setdefault(f"{way}/level", []).append(ways[way].level[0])
        return {name: torch.stack(values) for name, values in rows.items()}


# --- kept on disk -----------------------------------------------------------------------------------------------------


def key_of(config: Config, condition: Condition) -> str:
    """What gradients depend on, as a folder's name."""
    pairs = config.train.gradient_accumulation_steps
    facts = [asdict(config.lora), asdict(config.objective), asdict(condition.noise), config.train.seed, SKETCH, pairs]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    if condition.lora:
        digest.update(condition.lora.read_bytes())
    return digest.hexdigest()[:12]


def gradients(condition: Condition, plan: Plan) -> Gradients:
    """Of the plan's steps [n,B,…]; those that are on disk are read, the others made and written one by one."""
    config = configuration(plan)
    home = plan.folder / key_of(config, condition)
    home.mkdir(parents=True, exist_ok=True)
    paths = [home / f"{number:04}.safetensors" for number in range(plan.steps)]
    if not all(path.exists() for path in paths):
        make(condition, config, paths)
    parts = [load_file(path) for path in paths]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def make(condition: Condition, config: Config, paths: list[Path]) -> None:
    """What is missing among the steps' files."""
    trainer = Trainer(config)
    if condition.lora:
        load_lora(trainer, condition.lora)
    source, start = Source(trainer, condition), next(i for i, path in enumerate(paths) if not path.exists())
    place = {"start": start, "rank": 0, "world": 1, "seed": config.train.seed}
    batches = iter(training_loader(trainer.checked.rows, trainer.sizes, config, **place))
    pairs = config.train.gradient_accumulation_steps
    with tqdm(total=(len(paths) - start) * pairs * len(WAYS), desc=condition.name, unit="gradient") as bar:
        for path in paths[start:]:
            found = source.block([trainer.encoder(next(batches)) for _ in range(pairs)], bar)
            save_file(found, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


def load_lora(trainer: Trainer, path: Path) -> None:
    """An exported adapter into the one that trains. Raises ValueError where they are not alike."""
    prefix = f"{trainer.family.denoiser}."
    state = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    if len(state) != len(trainable(trainer.denoiser)):
        raise ValueError(f"{path} holds {len(state)} tensors, this adapter {len(trainable(trainer.denoiser))}")
    result = set_peft_model_state_dict(trainer.denoiser, state)
    if result.unexpected_keys:
        raise ValueError(f"{path} is a LoRA of other modules: {result.unexpected_keys[0]}")
