"""Did it work? The same prompts and seeds before and after, a judge, and the report."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from diffpref.config import Config, SampleConfig, config_hash, name_of, to_dict
from diffpref.report import before_after, curves, environment, model_card, write_report
from diffpref.sample import sample
from diffpref.winrate import compare


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts themselves, or those of a text file, one a line. Raises FileNotFoundError or ValueError."""
    if not isinstance(config.prompts, str):
        return config.prompts
    path = Path(config.prompts)
    if not path.is_file():
        raise FileNotFoundError(f"sample.prompts: no file {path}; give a list of prompts or a text file with one a line")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"sample.prompts: {path} holds no prompt")
    return prompts


class Verdict:
    """Draws the base before training and the policy after it, with the same noise, and compares them."""

    def __init__(self, config: Config, pipe: DiffusionPipeline, prompts: list[str], precision: Callable[[], AbstractContextManager]):
        self.config, self.pipe, self.precision = config, pipe, precision
        self.prompts = [p for p in prompts for _ in range(config.sample.images_per_prompt)]
        self.seeds = [config.sample.seed + i for _ in prompts for i in range(config.sample.images_per_prompt)]
        self.shown = [i * config.sample.images_per_prompt for i in range(min(len(prompts), config.sample.validation_prompts))]
        self.base: list[Image.Image] = []
        self.base_scores: np.ndarray | None = None

    def draw(self, items: list[int], label: str) -> list[Image.Image]:
        """Pictures of the model as it is now, for the given items of the plan."""
        settings = self.config.sample
        with self.precision():
            return sample(
                self.pipe,
                [self.prompts[i] for i in items],
                [self.seeds[i] for i in items],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                batch_size=settings.batch_size,
                progress=label,
            )

    def draw_base(self) -> None:
        """Pictures of the untouched model. The judge sees them now: if it fails, it fails before training."""
        self.base = self.draw(list(range(len(self.prompts))), "pictures before")
        if self.config.judge.judge:
            compare(self.config.judge.judge, self.base, self.base, self.prompts, confidence=self.config.judge.confidence)

    def preview(self, step: int) -> None:
        """Validation pictures, base and policy side by side, to validation/step-<n>.png."""
        folder = self.config.run_dir / "validation"
        folder.mkdir(exist_ok=True)
        now, before = self.draw(self.shown, f"validation at step {step}"), [self.base[i] for i in self.shown]
        before_after(before, now, [self.prompts[i] for i in self.shown], folder / f"step-{step:06d}.png", title=f"step {step}")

    def conclude(self, facts: dict, seconds: dict[str, float], started: float) -> dict:
        """Draw the policy, judge, write report, pictures and model card; returns the report."""
        drawing = time.perf_counter()
        after = self.draw(list(range(len(self.prompts))), "pictures after") if self.prompts else []
        judged = self.judge(after) if after else {}
        now = time.perf_counter()
        seconds = seconds | {"after": now - drawing, "total": now - started}
        run = {"name": self.config.name, "seed": self.config.train.seed, "objective": self.config.objective.name}
        report = judged | run | facts | {
            "seconds": {key: round(value, 2) for key, value in seconds.items()},
            "config_hash": config_hash(self.config),
            "environment": environment(),
        }
        self.write(report, after)
        return report

    def judge(self, after: list[Image.Image]) -> dict:
        """Win rate and measures of the policy's pictures against the base's."""
        settings, result = self.config.judge, {}
        if settings.judge:
            rate = compare(settings.judge, self.base, after, self.prompts, confidence=settings.confidence)
            result = {"win_rate": rate.as_dict(), "judge": name_of(settings.judge)}
            print(f"win rate vs base {rate}", flush=True)
        measures = {}
        for name, measure in settings.measures.items():
            before, now = (float(np.mean(measure(images, self.prompts))) for images in (self.base, after))
            measures[name] = {"before": before, "after": now}
            print(f"{name}: {before:.3f} before, {now:.3f} after", flush=True)
        return result | ({"measures": measures} if measures else {})

    def write(self, report: dict, after: list[Image.Image]) -> None:
        """report.json, before_after.png, curves.png and the model card."""
        folder = self.config.run_dir
        if after:
            before_after(self.base, after, self.prompts, folder / "before_after.png", title=self.config.name)
        curves(folder / "metrics.jsonl", folder / "curves.png")
        model_card(folder, to_dict(self.config), report)
        write_report(folder / "report.json", report)
