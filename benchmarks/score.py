"""Pictures a second of `diffpref score` and of what people write instead:  python benchmarks/score.py

Same weights, same pictures, same prompts, one process; the variants take turns within a round, and ratios are formed
within a round. Loading a model is not timed, but where a call of the other side does it each time. Needs Linux (/proc).
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from data import about, line, machine, ratio, say, summary, timed
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from worlds import EMOJI

from diffpref.engines import silence
from diffpref.report import write_report
from diffpref.scorer.heads.cosine import Cosine
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scorer.towers import Towers
from diffpref.scoring.prompts import said, with_prompts
from diffpref.scoring.run import Plan, score_all
from diffpref.scoring.sources import Reading, sources

SIZES = ((512, 512), (768, 512), (512, 768), (1024, 768), (1024, 1024))  # width, height
BATCH, SEED, HPS_PICTURES = 32, 0, 8
ARCHITECTURE, BUNDLED = "ViT-B-32", EMOJI / "scorer"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TELLING = {  # what each variant does
    "score": "diffpref score: pictures opened and prepared in threads, batches of 32, each prompt encoded once, CSV",
    "one by one": "open, preprocess, encode_image and encode_text for each picture, in one thread (but torch's)",
    "batched": "the same in batches of 32: all of a batch is opened first, then encoded; a prompt for each picture",
    "hpsv2, a call a picture": "hpsv2.img_score.score(path, prompt, cp), which reads the checkpoint in every call",
    "hpsv2, a call a prompt": "hpsv2.img_score.score([4 paths], prompt, cp): read once for four pictures",
}
BEYOND = "not compared: the bundled head adds more to the cosine, which is all that the loops compute"
Score = Callable[[], list[float]]


@dataclass(frozen=True)
class Work:
    """Picture files with their prompts, which also stand in `list`, one a line."""

    files: list[str]
    prompts: list[str]
    list: Path

    def first(self, number: int) -> list[tuple[str, str]]:
        """The first few pairs."""
        return list(zip(self.files[:number], self.prompts[:number], strict=True))


# --- pictures and weights ---------------------------------------------------------------------------------------------


def draw(folder: Path, number: int) -> list[str]:
    """JPEG files of several sizes: gradients with noise, at quality 90, as large on disk as photographs are."""
    rng, folder = np.random.default_rng(SEED), folder / "pictures"
    folder.mkdir()
    for one in range(number):
        width, height = SIZES[one % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 6, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{one:04d}.jpg", quality=90)
    return sorted(map(str, folder.iterdir()))


def work(folder: Path, files: list[str], share: int) -> Work:
    """A prompt for every `share` pictures, of the length people write."""
    words = [
        "a photo of a lighthouse at dawn, long exposure, soft light, number",
        "an oil painting of a harbour, number",
    ]
    prompts = [f"{words[(one // share) % 2]} {one // share}" for one in range(len(files))]
    path = folder / f"prompts-{share}.txt"
    path.write_text("\n".join(prompts))
    return Work(files, prompts, path)


def scorer(folder: Path, pixels: str) -> PreferenceScorer:
    """A random CLIP as it is loaded from a folder, scored by the cosine."""
    place = folder / pixels
    torch.manual_seed(SEED)
    towers = Towers(open_clip.get_model_config(ARCHITECTURE), pixels=pixels)
    PreferenceScorer(towers, Cosine(towers.width, logit_scale=0.0), name=pixels).save_pretrained(place)
    return PreferenceScorer.from_pretrained(place)


# --- variants ---------------------------------------------------------------------------------------------------------


def ours(judge: PreferenceScorer, task: Work) -> list[float]:
    """`diffpref score` once its model is loaded, its output included."""
    judge.remembered.clear()  # prompts of the round before
    found, out = sources(task.files, Reading()), task.list.with_name("scores.csv")  # beside the prompts
    plan = Plan(out=out, batch_size=BATCH, workers=min(os.cpu_count() or 1, 8), request={}, overwrite=True)
    with redirect_stdout(io.StringIO()):
        score_all(with_prompts(found.items(), said(str(task.list))), len(task.files), {"score": judge}, plan)
    return [float(row.split(",")[-2]) for row in out.read_text().splitlines()[1:]]


@torch.no_grad()
def plain(model: Any, preprocess: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch: int) -> list[float]:
    """The loop that open_clip's README suggests; with `batch`, in batches."""
    scores: list[float] = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        pixels = torch.stack([preprocess(Image.open(path)) for path, _ in some]).to(DEVICE)
        image = F.normalize(model.encode_image(pixels), dim=-1)
        text = F.normalize(model.encode_text(tokenizer([prompt for _, prompt in some]).to(DEVICE)), dim=-1)
        scores += (image * text).sum(-1).tolist()
    return scores


def plain_variants(judge: PreferenceScorer, task: Work, folder: Path) -> dict[str, Score]:
    """Ours and the loops, with the same weights in a model that open_clip made."""
    pairs, tokenizer = task.first(len(task.files)), judge.towers.tokenizer
    model = open_clip.create_model(f"local-dir:{folder}", device=DEVICE).eval()
    preprocess = image_transform_v2(PreprocessCfg(**judge.towers.preprocess_cfg), is_train=False)
    return {
        "score": lambda: ours(judge, task),
        "one by one": lambda: plain(model, preprocess, tokenizer, pairs, 1),
        "batched": lambda: plain(model, preprocess, tokenizer, pairs, BATCH),
    }


def hps_variants(judge: PreferenceScorer, task: Work, folder: Path) -> dict[str, Score]:
    """Ours and the hpsv2 package, whose model is given the same weights. Raises what importing it raises."""
    from hpsv2 import img_score

    options = {"light_augmentation": True, "aug_cfg": {}, "output_dict": True, "precision": "fp32", "device": DEVICE}
    model, _, preprocess = img_score.create_model_and_transforms(ARCHITECTURE, None, **options)
    img_score.model_dict.update(model=model, preprocess_val=preprocess)  # or it would ask the hub for a ViT-H/14
    checkpoint = folder / "hps.pt"
    torch.save({"state_dict": judge.towers.model.state_dict()}, checkpoint)
    few = task.first(HPS_PICTURES)
    groups = [(prompt, [path for path, said in few if said == prompt]) for prompt in dict.fromkeys(p for _, p in few)]

    def call(paths: Any, prompt: str) -> list[float]:
        return [float(score) for score in img_score.score(paths, prompt, cp=str(checkpoint))]

    return {
        "score": lambda: ours(judge, task),
        "hpsv2, a call a picture": lambda: [score for path, prompt in few for score in call(path, prompt)],
        "hpsv2, a call a prompt": lambda: [score for prompt, paths in groups for score in call(paths, prompt)],
    }


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(name: str, variants: dict[str, Score], rounds: int, other: str | None = None) -> dict[str, Any]:
    """Pictures a second, ratios, and how far the scores of the others are from ours. `other`: why they are not the
    same number."""
    scores, rates = {}, {variant: [] for variant in variants}
    for variant, act in variants.items():  # once without a clock: files are in memory then, weights touched
        scores[variant] = act()
    for number in range(rounds):
        say(f"{name}, round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")
        for variant, act in variants.items():
            rates[variant].append(len(scores[variant]) / timed(act))
    others = [variant for variant in variants if variant != "score"]
    return {
        "images_per_second": {variant: summary(values) for variant, values in rates.items()},
        "ratios": {f"score over {variant}": ratio(rates["score"], rates[variant]) for variant in others},
        "largest_difference_of_scores": other or {v: apart(scores["score"], scores[v]) for v in others},
        "pictures": {variant: len(values) for variant, values in scores.items()},
    }


def apart(ours: list[float], theirs: list[float]) -> float:
    """Largest difference, over as many as they have."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=False))


def worlds(folder: Path, pictures: int, rounds: int) -> dict[str, Any]:
    """All comparisons."""
    files = draw(folder, pictures)
    four, each = work(folder, files, 4), work(folder, files, 1)
    judge = scorer(folder, "open_clip")
    found: dict[str, Any] = {"mb_of_pictures": sum(os.path.getsize(file) for file in files) / 1e6}
    for name, task in (("four pictures a prompt", four), ("a prompt a picture", each)):
        found[name] = measure(name, plain_variants(judge, task, folder / "open_clip"), rounds)
    if BUNDLED.is_dir():
        variants = plain_variants(PreferenceScorer.from_pretrained("bundled"), four, BUNDLED)
        found["bundled, four pictures a prompt"] = measure("bundled", variants, rounds, BEYOND)
    try:
        judge = scorer(folder, "letterbox")
        variants = hps_variants(judge, four, folder / "letterbox")
    except (ImportError, OSError) as error:
        return found | {"hpsv2": f"not measured: {type(error).__name__}: {error}"}
    return found | {"hpsv2": measure("hpsv2", variants, rounds)}


def main() -> None:
    """Measure in turns, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often the variants take turns")
    parser.add_argument("--pictures", type=int, default=48, help="how many are scored")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/score-<machine>.json if none")
    args = parser.parse_args()
    silence()
    report = about(False, args.rounds) | {"command": "python benchmarks/score.py", "variants": TELLING}
    report |= {"other_versions": {d.name: d.version for d in distributions() if d.name in ("open_clip_torch", "hpsv2")}}
    report |= {"architecture": f"{ARCHITECTURE}, random weights, fp32", "device": DEVICE, "sizes": SIZES}
    with tempfile.TemporaryDirectory() as folder:
        report["worlds"] = worlds(Path(folder), args.pictures, args.rounds)
    report["load_average_at_end"] = list(os.getloadavg())
    out = args.out or Path(__file__).parent / "results" / f"score-{machine()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    print("\n".join(table(report["worlds"])))


def table(found: dict[str, Any]) -> list[str]:
    """The numbers in plain words."""
    rows = ["| what | median | min – max |", "|---|---|---|"]
    for world, numbers in found.items():
        if isinstance(numbers, dict):
            rows += [line(f"{world}: {name}", v, "images/s") for name, v in numbers["images_per_second"].items()]
            rows += [line(f"{world}: {name}", values, "x") for name, values in numbers["ratios"].items()]
    return rows


if __name__ == "__main__":
    main()
