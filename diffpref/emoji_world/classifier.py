"""The world's judge of what a picture shows: a small network that names its concept and its style.

    python -m diffpref.emoji_world.classifier --out diffpref/emoji_world/data/classifier.safetensors

It is trained on all the artwork, also on the pairs held out of the pipeline, and never on generated pictures. Their
faults are stood in for by augmentation: drawings are moved, bent, recoloured, blurred and made noisy. No training of a
pipeline reads it.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffpref.emoji_world.artwork import ARTWORK, Artwork, load_artwork
from diffpref.emoji_world.build import STYLES

CLASSIFIER = Path(__file__).parent / "data" / "classifier.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """What the weights need to be rebuilt; kept in the metadata of their file."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    size: int  # pictures are resized to this side
    widths: tuple[int, ...]  # channels; each level after the first halves the picture


class Classifier(nn.Module):
    """pictures [B,3,size,size] in [-1,1] -> (concept logits [B,C], style logits [B,S])."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        widths = (3, *config.widths)
        self.levels = nn.Sequential(*(level(i, o, halve=i != 3) for i, o in zip(widths, widths[1:], strict=False)))
        self.concept = nn.Linear(widths[-1], len(config.concepts))
        self.style = nn.Linear(widths[-1], len(config.styles))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.levels(images).mean(dim=(2, 3))
        return self.concept(features), self.style(features)


def level(channels_in: int, channels_out: int, halve: bool) -> nn.Sequential:
    """Two 3x3 convolutions, the first of which may halve the picture."""

    def convolution(channels: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, channels_out, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(*convolution(channels_in, 2 if halve else 1), *convolution(channels_out, 1))


# --- augmentation: what generated pictures do wrong -------------------------------------------------------------------


def uniform(batch: int, low: float, high: float, g: torch.Generator, size: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Uniform numbers [batch, *size]."""
    return low + (high - low) * torch.rand(batch, *size, generator=g)


def bend(images: Tensor, g: torch.Generator) -> Tensor:
    """Small shift, scale and rotation, and a smooth random displacement of about a pixel; what comes in is white."""
    batch, _, height, _ = images.shape
    angle, scale = uniform(batch, -0.2, 0.2, g, ()), uniform(batch, 0.85, 1.2, g, ())
    shift = uniform(batch, -0.2, 0.2, g, (2,))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    waves = torch.randn(batch, 2, 4, 4, generator=g) * uniform(batch, 0, 1.5, g) / height
    grid = grid + F.interpolate(waves, size=images.shape[2:], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)  # zeros outside, hence white


def recolour(images: Tensor, g: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and a slight tint."""
    batch = len(images)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * uniform(batch, 0.7, 1.3, g)
    images = images * uniform(batch, 0.75, 1.2, g) + uniform(batch, -0.15, 0.15, g)
    return images + uniform(batch, -0.06, 0.06, g, (3, 1, 1))


def degrade(images: Tensor, g: torch.Generator) -> Tensor:
    """Blur of random strength, then noise of random strength, fine and coarse."""
    batch, channels, height, width = images.shape
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(blurred, uniform(batch, 0, 1, g).square())
    coarse = torch.randn(batch, channels, height // 4, width // 4, generator=g)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    fine = torch.randn(images.shape, generator=g)
    return images + fine * uniform(batch, 0, 0.12, g) + coarse * uniform(batch, 0, 0.15, g)


def augment(images: Tensor, g: torch.Generator) -> Tensor:
    """[B,3,H,W] in [-1,1] -> the same pictures as a mediocre painter would copy them."""
    return degrade(recolour(bend(images, g), g), g).clamp(-1, 1)


# --- training --------------------------------------------------------------------------------------------------------


def train(art: Artwork, picked: Tensor, config: ClassifierConfig, args: argparse.Namespace, label: str) -> Classifier:
    """Train on the drawings `picked [M]`; a one-cycle learning rate, label smoothing on both heads."""
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    model = Classifier(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    bar = tqdm(range(args.steps), label)
    for step in bar:
        i = picked[torch.randint(len(picked), (args.batch_size,), generator=g)]
        concept, style = model(augment(art.images[i], g).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(concept, art.concept[i], label_smoothing=0.1)
        loss = loss + F.cross_entropy(style, art.style[i], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, art: Artwork, picked: Tensor, copies: int, seed: int) -> tuple[float, float]:
    """(concept, style) top-1 on `copies` augmented copies of each drawing; 0 copies: on the drawings themselves."""
    g = torch.Generator().manual_seed(seed + 1)
    i = picked.repeat(max(copies, 1))
    right = torch.zeros(2)
    for part in i.split(128):
        images = augment(art.images[part], g) if copies else art.images[part]
        for head, (logits, truth) in enumerate(zip(model(images), (art.concept, art.style), strict=True)):
            right[head] += (logits.argmax(dim=1) == truth[part]).sum()
    return tuple((right / len(i)).tolist())


def report(model: Classifier, art: Artwork, picked: Tensor, seed: int, what: str) -> None:
    """Print accuracies on drawings and on augmented copies."""
    for copies, kind in ((0, "as drawn"), (8, "augmented")):
        concept, style = accuracy(model, art, picked, copies, seed)
        print(f"{what}, {kind}: concept {concept:.3f}, style {style:.3f} (n={len(picked) * max(copies, 1)})")


# --- files and use ---------------------------------------------------------------------------------------------------


def save_classifier(model: Classifier, path: Path) -> None:
    """fp16 weights, with the configuration in the metadata."""
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"config": json.dumps(asdict(model.config))})


@cache
def load_classifier(path: Path = CLASSIFIER) -> Classifier:
    """The trained classifier, in fp32 and eval mode; loaded once. Raises FileNotFoundError when it is not there."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no classifier at {path}; python -m diffpref.emoji_world.classifier makes it")
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["config"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = Classifier(ClassifierConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def to_tensor(images: list[Image], size: int) -> Tensor:
    """Pictures of any size -> [N,3,size,size] in [-1,1]."""
    resized = [i.convert("RGB").resize((size, size), Resampling.LANCZOS) for i in images]  # a copy where the size fits
    return torch.from_numpy(np.stack([np.asarray(i) for i in resized])).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def classify(images: list[Image], path: Path = CLASSIFIER) -> tuple[np.ndarray, np.ndarray]:
    """N pictures -> (concept probabilities [N,C], style probabilities [N,S]), float64."""
    model = load_classifier(path)
    outputs = [model(to_tensor(images[i : i + 128], model.config.size)) for i in range(0, len(images), 128)]
    concept, style = (torch.cat(logits).double().softmax(dim=1).numpy() for logits in zip(*outputs, strict=True))
    return concept, style


def split_prompt(prompt: str) -> tuple[str, str | None]:
    """ "name" or "name, style" -> (name, style or None)."""
    name, _, style = prompt.rpartition(", ")
    return (name, style) if style in STYLES else (prompt, None)


def concept_recognition(images: list[Image], prompts: list[str]) -> np.ndarray:
    """Measure [N]: 1 where the concept named by the prompt is the classifier's first guess, else 0."""
    concepts = load_classifier().config.concepts
    unknown = {p for p in prompts if split_prompt(p)[0] not in concepts}
    if unknown:
        raise ValueError(f"not among the classifier's {len(concepts)} concepts: {', '.join(sorted(unknown))}")
    named = np.array([concepts.index(split_prompt(p)[0]) for p in prompts])
    return (classify(images)[0].argmax(axis=1) == named).astype(np.float64)


def style_recognition(images: list[Image], prompts: list[str]) -> np.ndarray:
    """Measure [N] for styled prompts: 1 where the style word is the classifier's first guess, else 0."""
    styles = [split_prompt(p)[1] for p in prompts]
    if None in styles:
        raise ValueError(f"this prompt names no style: {prompts[styles.index(None)]!r}; styles are {', '.join(STYLES)}")
    return (classify(images)[1].argmax(axis=1) == [STYLES.index(s) for s in styles]).astype(np.float64)


def style_share(images: list[Image]) -> np.ndarray:
    """Share of the pictures [S] in which each style is the classifier's first guess."""
    return np.bincount(classify(images)[1].argmax(axis=1), minlength=len(STYLES)) / len(images)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--artwork", type=Path, default=ARTWORK, help="data set written by diffpref.emoji_world.build")
    parser.add_argument("--widths", type=int, nargs="+", default=(24, 48, 96, 160), help="channels of the levels")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="the highest of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="first train a copy without 8 %% of the pairs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    art = load_artwork(args.artwork)
    config = ClassifierConfig(art.concepts, STYLES, art.size, tuple(args.widths))
    if args.validate:
        copy = train(art, art.training, config, args, "without 8 % of the pairs")
        report(copy, art, art.training, args.seed, "throw-away copy, pairs it saw")
        report(copy, art, (~art.seen).nonzero().squeeze(1), args.seed, "throw-away copy, pairs it never saw")
    everything = torch.arange(len(art.images))
    model = train(art, everything, config, args, "classifier")
    report(model, art, everything, args.seed, "all drawings")
    save_classifier(model, args.out)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {args.out.stat().st_size / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
