"""Rebuild gallery/: the quickstart's run at several seeds, its sheet, and a page made from the numbers.

    make gallery        or:  python -m diffpref.emoji_world.gallery --seeds 0 1 2 3

Runs that are already in runs/ under the same configuration are taken as they are; an interrupted rebuild goes on.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

CONFIG = Path("configs/quickstart.yaml")
GALLERY = Path("gallery")


def run_name(seed: int) -> str:
    """Of the run in runs/."""
    return f"gallery-quickstart-{seed}"


def arguments(seed: int) -> list[str]:
    """What a seed changes: training randomness and the noise that both models draw from."""
    return ["--name", run_name(seed), "--train.seed", str(seed), "--sample.seed", str(1000 * seed)]


def run(seed: int) -> Path:
    """The run's folder, after training if it is not there yet or was made with other settings."""
    from diffpref.config import config_hash, load_config

    config = load_config(["--config", str(CONFIG), *arguments(seed)])
    report = config.run_dir / "report.json"
    if not report.exists() or json.loads(report.read_text())["config_hash"] != config_hash(config):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "diffpref/train.py"]
        subprocess.run([*launch, "--config", str(CONFIG), *arguments(seed), "--overwrite", "true"], check=True)
    return config.run_dir


def commit() -> str:
    """The commit that the pictures were made at."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def sheet(seed: int, folder: Path) -> dict:
    """What sheet.json holds of one run: how to make it again, and its numbers."""
    adapter = hashlib.sha256((folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()[:12]
    report = json.loads((folder / "report.json").read_text())
    command = " ".join(["accelerate launch diffpref/train.py --config", str(CONFIG), *arguments(seed)])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {"command": command, "adapter_sha256": adapter, "report": report, "config": config}


def page(sheets: list[dict]) -> str:
    """gallery/README.md, from the numbers alone."""
    rows = []
    for entry in sheets:
        report, rate = entry["report"], entry["report"]["win_rate"]
        concept = report["measures"]["concept_recognition"]
        rows.append(
            f"| {report['seed']} | {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}] | {rate['n']} |"
            f" {rate['ties']} | {concept['before']:.2f} → {concept['after']:.2f} |"
        )
    first = sheets[0]["report"]
    return "\n".join(
        [
            "# Gallery",
            "",
            "Made by `make gallery` from the JSON files beside the pictures; not written by hand.",
            "",
            "All objectives on equal terms: [objectives](objectives/README.md).",
            "Preferences of scorers instead of people: [synpic](synpic/README.md).",
            "One person at a time, from a few pairs: [personalization](personalization/README.md).",
            "",
            "## Quickstart: the emoji world learns the majority's taste",
            "",
            "![before and after](quickstart/before_after.png)",
            "",
            f"Diffusion-DPO, {first['steps']} steps on {first['groups_seen']} pairs of the preference-training"
            f" concepts. The pictures are of {first['win_rate']['clusters']} other concepts, drawn before and after"
            " from the same noise. Judge: the simulated majority's true utility, which training never sees. Intervals:"
            " 95 %, bootstrap over prompts.",
            "",
            "| seed | win rate vs base | n | ties | concept recognised |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Hardware: {first['environment']['hardware']}. Made at commit {sheets[0]['commit']}.",
            "",
            "![training curves](quickstart/curves.png)",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    args = parser.parse_args()
    out = GALLERY / "quickstart"
    out.mkdir(parents=True, exist_ok=True)
    sheets = []
    for seed in args.seeds:
        folder = run(seed)
        sheets.append(sheet(seed, folder) | {"commit": commit()})
        (out / f"seed-{seed}.json").write_text(json.dumps(sheets[-1], indent=2) + "\n")
        if seed == args.seeds[0]:
            for name in ("before_after.png", "curves.png"):
                shutil.copy(folder / name, out / name)
    (GALLERY / "README.md").write_text(page(sheets))
    print(f"gallery/ rebuilt: {len(sheets)} runs")


if __name__ == "__main__":
    main()
