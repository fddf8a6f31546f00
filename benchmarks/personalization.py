"""Personalised tuning in the emoji world: your taste from a few pairs.

python benchmarks/personalization.py bound      what one who knows the model of users exactly makes of 1 to 16 pairs
"""

import argparse
import os
from pathlib import Path

# One thread: small matrices. OpenMP reads these when torch is loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100", "HF_HUB_OFFLINE": "1"}

from data import about, machine, say  # noqa: E402
from personal import bayes, people  # noqa: E402
from personal.bound import bound, choices_of  # noqa: E402

from diffpref.report import write_report  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def before_training(users: int | None) -> dict:
    """The bound over pictures that are there before anything is trained."""
    of = people.held_out()
    offers = {
        "8 samples": choices_of(of, 8, artwork=False),
        "all samples": choices_of(of, None, artwork=False),
        "samples and artwork": choices_of(of, None, artwork=True),
    }
    found = bound(people.new_users(users), offers, of)
    return {"drawn": bayes.DRAWN, "pictures": len(of.prompts), "comparisons": len(of.pairs), "bound": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["bound"])
    parser.add_argument("--users", type=int, help="the first so many of the 56")
    parser.add_argument(
        "--out", type=Path, help="JSON file; benchmarks/results/personalization-bound-<machine>.json if none"
    )
    args = parser.parse_args()
    report = about(False, 1) | before_training(args.users)
    write_report(args.out or RESULTS / f"personalization-bound-{machine()}.json", report)
    tell(report["bound"])


def tell(rows: dict) -> None:
    """A table."""
    columns = [name for name in next(iter(rows.values())) if name != "effective"]
    say(f"| pairs | {' | '.join(columns)} | effective |\n|{'---|' * (len(columns) + 2)}")
    for n, row in rows.items():
        cells = [f"{row[c]['value']:.3f} [{row[c]['low']:.3f}, {row[c]['high']:.3f}]" for c in columns]
        print(f"| {n} | {' | '.join(cells)} | {row['effective']['min']:.0f} |")


if __name__ == "__main__":
    main()
