"""Put a trained scorer into the package, in fp16, with what it is worth on choices that nobody trained on.

    python -m diffpref.emoji_world.ship_scorer --scorer runs/scorer-emoji/scorer

Measured are the choices of unseen users on held-out concepts (held_out.parquet): how often it would be right if they
chose anew, beside the most that anybody could be who knows the population and not the user, and its calibration.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch

from diffpref.emoji_world.held_out import HELD_OUT
from diffpref.scorer.measures import accuracy, against_truth, calibration_error
from diffpref.scorer.preference import PreferenceScorer

SIDES = ("chosen", "rejected")
SCORER = Path(__file__).parent / "data" / "scorer"
DESCRIPTION = "a small CLIP of the emoji world: what a picture shows, and what the simulated population likes"
TRAINED_ON = "captions of the emoji world, and 24000 choices of its 200 training users (emoji_world/choices.py)"


def measured(scorer: PreferenceScorer) -> dict[str, dict]:
    """On held_out.parquet, intervals clustered by prompt and user."""
    rows = pq.read_table(HELD_OUT).to_pylist()
    prompts, users = [row["prompt"] for row in rows], [row["user_id"] for row in rows]
    chosen, rejected = (scorer.score(images=[row[side] for row in rows], prompts=prompts) for side in SIDES)
    margin = ((chosen - rejected).double() / scorer.temperature).numpy()
    names, truth = {"prompt": prompts, "user": users}, torch.tensor([row["truth_population"] for row in rows])
    found = against_truth(margin, truth.double().numpy(), names)
    found["accuracy of the choices as they fell"] = accuracy(margin, torch.ones(len(rows)).numpy(), names)
    found["calibration error"] = calibration_error(margin, truth.double().numpy(), names)
    return {name: one.as_dict() for name, one in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", type=Path, required=True, help="folder that the training wrote")
    parser.add_argument("--out", type=Path, default=SCORER, help="folder to write")
    args = parser.parse_args(argv)
    scorer = PreferenceScorer.from_pretrained(args.scorer, device="cpu")
    scorer.name, scorer.description, scorer.trained_on = "bundled", DESCRIPTION, TRAINED_ON
    scorer.save_pretrained(args.out, dtype=torch.float16)
    shipped = PreferenceScorer.from_pretrained(args.out, device="cpu")
    shipped.measured = measured(shipped)
    shipped.save_pretrained(args.out, dtype=torch.float16)
    for name, one in shipped.measured.items():
        print(f"{name}: {one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}], n={one['n']}")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
