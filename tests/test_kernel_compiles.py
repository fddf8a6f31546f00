"""The loss's kernels become machine code for the GPUs that people have; no GPU and no driver is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffpref.triton_kernels.preference_head import LINKS

TESTS = Path(__file__).parent
SHARES = {80: ["logistic", "soft_label"], 90: ["smoothed", "square"], 100: ["hinge", "exclusive"]}  # of the links


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """What a process without the interpreter says of each kernel, for each architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    environment |= {"TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}
    shares = [f"{capability}:{','.join(links)}" for capability, links in SHARES.items()]
    line = [sys.executable, str(TESTS / "kernel_ptx.py"), *shares]
    found = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return [json.loads(row) for row in found.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARES)
def test_kernels_compile(capability, rows):
    rows = [row for row in rows if row["capability"] == capability]
    names = [row["kernel"] for row in rows]
    assert {name: names.count(name) for name in names} == {
        "partial_sums_kernel": 2,  # with mask, noise and drift, and without
        "item_sums_kernel": 1,
        "gradient_kernel": 2,
        "preference_head_kernel": 2,
    }
    for row in rows:
        assert row["target"].startswith(f"sm_{capability}") and row["cubin"] > 1000
        assert not row["spilled"] and not row["fma"], "rounded one by one, as PyTorch does it"


def test_every_link_is_compiled_for_some():
    assert sorted(link for links in SHARES.values() for link in links) == sorted(LINKS)
