"""Did it work? The same prompts and seeds before and after, a judge, and the report."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from diffpref.config import Config, SampleConfig, config_hash, name_of, to_dict
from diffpref.figures import before_after, curves
from diffpref.report import environment, model_card, write_report
from diffpref.sample import sample
from diffpref.winrate import WinRate, scores, win_rate


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts themselves, or those of a text file, one a line. Raises FileNotFoundError or ValueError."""
    if not isinstance(config.prompts, str):
        return config.prompts
    path = Path(config.prompts)
    if not path.is_file():
        raise FileNotFoundError(
            f"sample.prompts: no file {path}; give a list of prompts or a text file with one a line"
        )
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"sample.prompts: {path} holds no prompt")
    return prompts


Drawing = Callable[[], AbstractContextManager[DiffusionPipeline]]  # inside: the pipeline as it is to draw now


class Verdict:
    """Draws the base before training and the policy after it, with the same noise, and compares them.

    Where the weights are sharded every process has one, and all draw; only the `main` one judges, writes and speaks.
    """

    def __init__(self, config: Config, drawing: Drawing, prompts: list[str], main: bool = True):
        self.config, self.drawing, self.main = config, drawing, main
        each = config.sample.images_per_prompt
        self.prompts = [p for p in prompts for _ in range(each)]
        self.seeds = [config.sample.seed + i for _ in prompts for i in range(each)]
        self.shown = range(0, min(len(prompts), config.sample.validation_prompts) * each, each)
        self.functions = config.judge.measures | ({"judge": config.judge.judge} if config.judge.judge else {})
        self.base: list[Image.Image] = []
        self.before: dict[str, np.ndarray] = {}

    def draw(self, items: range, label: str) -> list[Image.Image]:
        """Pictures of the model as it is now, for the given items of the plan."""
        settings = self.config.sample
        if not items:
            return []
        with self.drawing() as pipe:
            return sample(
                pipe,
                [self.prompts[i] for i in items],
                [self.seeds[i] for i in items],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                batch_size=settings.batch_size,
                progress=label if self.main else None,
            )

    def draw_all(self, label: str) -> tuple[list[Image.Image], dict[str, np.ndarray]]:
        """Every picture of the plan, and what judge and measures say of it: name -> [N]."""
        images = self.draw(range(len(self.prompts)), label)
        functions = self.functions.items() if self.main and images else ()
        return images, {name: scores(function, images, self.prompts) for name, function in functions}

    def draw_base(self) -> None:
        """Pictures of the untouched model. The judge sees them now: if it fails, it fails before training."""
        self.base, self.before = self.draw_all("pictures before")

    def preview(self, step: int) -> None:
        """Validation pictures, base and policy side by side, to validation/step-<n>.png."""
        now = self.draw(self.shown, f"validation at step {step}")
        if not self.main:
            return
        path = self.config.run_dir / "validation" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        before_after(
            [self.base[i] for i in self.shown], now, [self.prompts[i] for i in self.shown], path, title=f"step {step}"
        )

    def conclude(self, facts: dict, seconds: dict[str, float], started: float) -> dict:
        """Draw the policy, judge, write report, pictures and model card; returns the report."""
        drawing = time.perf_counter()
        images, after = self.draw_all("pictures after")
        if not self.main:
            return {}
        judged = self.judge(after)
        if accuracy := facts.get("validation", {}).get("accuracy"):
            print(f"held-out accuracy {WinRate(**accuracy)}")
        now = time.perf_counter()
        seconds = seconds | {"after": now - drawing, "total": now - started}
        run = {"name": self.config.name, "seed": self.config.train.seed, "objective": self.config.objective.name}
        report = (
            judged
            | run
            | facts
            | {
                "seconds": {key: round(value, 2) for key, value in seconds.items()},
                "config_hash": config_hash(self.config),
                "environment": environment(),
            }
        )
        self.write(report, images, after)
        return report

    def judge(self, after: dict[str, np.ndarray]) -> dict:
        """Win rate and means of the measures, policy against base; says them."""
        result: dict = {}
        means = {
            name: {"before": float(self.before[name].mean()), "after": float(values.mean())}
            for name, values in after.items()
            if name in self.config.judge.measures
        }
        print(f"the adapter, report and pictures are in {self.config.run_dir}")
        for name, mean in means.items():
            print(f"{name.replace('_', ' ')}: {mean['before']:.3f} before, {mean['after']:.3f} after")
        if "judge" in after:
            rate = win_rate(after["judge"], self.before["judge"], self.prompts, confidence=self.config.judge.confidence)
            result = {"win_rate": rate.as_dict(), "judge": name_of(self.config.judge.judge)}
            print(f"win rate vs base {rate}")
        return result | ({"measures": means} if means else {})

    def write(self, report: dict, images: list[Image.Image], after: dict[str, np.ndarray]) -> None:
        """report.json, before_after.png, curves.png and the model card."""
        folder, judged = self.config.run_dir, "judge" in after
        if images:
            before_after(
                self.base,
                images,
                self.prompts,
                folder / "before_after.png",
                scores=(self.before["judge"], after["judge"]) if judged else None,
                title=self.config.name,
                subtitle=f"win rate against the base {report['win_rate']['value']:.2f}" if judged else "",
            )
        curves(folder / "metrics.jsonl", folder / "curves.png", title=self.config.name)
        write_report(folder / "report.json", report)
        model_card(folder, to_dict(self.config), report)
