"""The benchmark runs as its README says and writes what it promises; no times are asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
VARIANTS = {f"{cache}_workers_{workers}" for cache in ("none", "cache") for workers in (0, 2)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict, str]:
    """(JSON, what was printed) of a quick run."""
    out = tmp_path_factory.mktemp("bench") / "data.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "data.py"), "--quick", "--out", str(out)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_machine_and_the_command_are_named(outcome):
    report, _ = outcome
    assert report["command"] == "python benchmarks/data.py --quick" and report["rounds"] == 1
    assert {"hardware", "python", "torch", "diffusers", "diffpref"} <= report["environment"].keys()
    assert len(report["load_average_at_start"]) == len(report["load_average_at_end"]) == 3
    assert report["ram_gb"] > 0 and report["torch_threads"] >= 1 and "seed" in report


def test_every_question_has_its_numbers(outcome):
    report, printed = outcome
    world = report["worlds"]["large"]
    assert world["data_encode"].keys() == VARIANTS and world["step"].keys() == {"none", "cache"}
    assert (world["build"]["pictures"], world["build"]["prompts"]) == (8, 4) and world["build"]["mb_on_disk"] > 0
    assert world["break_even"].keys() == {"seconds_saved_a_step", "steps", "epochs"}
    memory = world["memory"]
    assert all(m["peak_process_mb"] >= m["peak_training_mb"] >= m["libraries_mb"] > 0 for m in memory.values())
    assert "| loader + encoder, cache workers 2 |" in printed and "Load average" in printed


def test_every_ratio_is_a_positive_number(outcome):
    ratios = outcome[0]["worlds"]["large"]["ratios"]
    assert len(ratios) == 8
    for name, ratio in ratios.items():
        values = [ratio[key] for key in ("min", "median", "max")]
        assert all(math.isfinite(value) and value > 0 for value in values) and values == sorted(values), name


def test_stored_results_have_the_same_shape(outcome):
    stored = [json.loads(path.read_text()) for path in (REPOSITORY / "benchmarks" / "results").glob("data-*.json")]
    assert stored
    for report in stored:
        assert report.keys() == outcome[0].keys() and report["rounds"] >= 3
        for world in report["worlds"].values():
            assert world["ratios"].keys() == outcome[0]["worlds"]["large"]["ratios"].keys()
