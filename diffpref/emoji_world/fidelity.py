"""Does the pipeline draw what it is asked for? The classifier's word, against the bars the world was built to.

    python -m diffpref.emoji_world.fidelity --pipeline diffpref/emoji_world/data/pipeline --out fidelity.json

prints a table with 95 % intervals, and writes the numbers and, beside them, a sheet of samples (PNG).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image, Resampling
from scipy.stats import binomtest

from diffpref.config import ModelConfig
from diffpref.emoji_world.artwork import Artwork, caption, load_artwork
from diffpref.emoji_world.build import STYLES
from diffpref.emoji_world.classifier import classify, concept_recognition, style_recognition
from diffpref.families import load_pipeline
from diffpref.sample import sample

PIPELINE = Path(__file__).parent / "data" / "pipeline"
SHEET_CONCEPTS = ("red apple", "automobile", "cat face", "pizza", "rose", "penguin", "cactus", "robot", "octopus")


@dataclass(frozen=True)
class Bar:
    """A share `value` of n pictures, its Wilson interval [low, high], and the bar it should reach, if any."""

    what: str
    value: float
    low: float
    high: float
    n: int
    bar: float | None

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or nothing where there is no bar."""
        return "" if self.bar is None else "PASS" if self.value >= self.bar else "FAIL"

    def __str__(self) -> str:
        bar = "" if self.bar is None else f">= {self.bar:.2f}"
        interval = f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.what:<36} {interval}  n={self.n:<5} {bar:<8} {self.verdict}".rstrip()


def measured(what: str, hits: np.ndarray, bar: float | None = None) -> Bar:
    """Hits [N] of 0/1 -> a Bar."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return Bar(what, float(hits.mean()), float(interval.low), float(interval.high), len(hits), bar)


def prompts_of(art: Artwork) -> dict[str, list[str]]:
    """Three kinds of prompts: styled pairs the pipeline was trained on, styled pairs it never saw, bare names."""
    captions = [art.caption(i, styled=True) for i in range(len(art.images))]
    return {
        "trained": [c for c, seen in zip(captions, art.seen, strict=True) if seen],
        "held out": [c for c, seen in zip(captions, art.seen, strict=True) if not seen],
        "unstyled": list(art.concepts),
    }


def judge(pictures: dict[str, tuple[list[str], list[Image]]]) -> list[Bar]:
    """Prompts and pictures of each kind -> every number of the report."""
    trained, held_out, unstyled = (pictures[kind] for kind in ("trained", "held out", "unstyled"))
    guesses = classify(unstyled[1])[1].argmax(axis=1)
    return [
        measured("concept, trained pairs", concept_recognition(*reversed(trained)), 0.90),
        measured("concept, held-out pairs", concept_recognition(*reversed(held_out)), 0.60),
        measured("style, trained pairs", style_recognition(*reversed(trained)), 0.80),
        *(measured(f"share of {s}, unstyled prompts", guesses == i, 0.05) for i, s in enumerate(STYLES)),
        measured("style, held-out pairs", style_recognition(*reversed(held_out))),
        measured("concept, unstyled prompts", concept_recognition(*reversed(unstyled))),
    ]


def sheet(draw: Callable[[list[str], str], list[Image]], unstyled: int = 3, scale: int = 3) -> Image:
    """One row a concept: its five styles, then unstyled draws."""
    columns = (*STYLES, *(None,) * unstyled)
    images = draw([caption(c, s) for c in SHEET_CONCEPTS for s in columns], "sheet")
    scaled = [i.resize((scale * i.width, scale * i.height), Resampling.NEAREST) for i in images]
    return make_image_grid(scaled, rows=len(SHEET_CONCEPTS), cols=len(columns))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of the pipeline")
    parser.add_argument("--out", type=Path, help="JSON file to write; the sheet goes beside it")
    parser.add_argument("--images", type=int, default=501, help="pictures of each kind of prompt (501 trained pairs)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale of classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others follow it")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pipe = load_pipeline(ModelConfig(str(args.pipeline))).to(args.device)

    def draw(prompts: list[str], label: str) -> list[Image]:
        return sample(
            pipe,
            prompts,
            list(range(args.seed, args.seed + len(prompts))),
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            batch_size=args.batch_size,
            progress=label,
        )

    kinds = {kind: list(islice(cycle(p), args.images)) for kind, p in prompts_of(load_artwork()).items()}
    bars = judge({kind: (prompts, draw(prompts, kind)) for kind, prompts in kinds.items()})
    print(*bars, sep="\n")
    if args.out:
        settings = {"pipeline": str(args.pipeline), "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
        numbers = {b.what: {**asdict(b), "verdict": b.verdict} for b in bars}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"settings": settings, "bars": numbers}, indent=2) + "\n")
        sheet(draw).save(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
