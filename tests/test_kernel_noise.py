"""Counter-based noise, and x_t and target made with it: PyTorch and the kernels, which are the same to the bit."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import ON, poisoned  # noqa: F401
from scipy import stats
from scipy.special import erfinv, ndtri

from diffpref.triton_kernels import available
from diffpref.triton_kernels.noise_pairs import noise_pairs
from diffpref.triton_kernels.philox import LOW, normal_of, philox, philox_normal, philox_words, streams

KEYS = [0, 1, -5, 2**40 + 3, 2**63 + 7, -(2**63)]


# --- integers ---------------------------------------------------------------------------------------------------------

# Random123's kat_vectors (Salmon et al.), "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def by_hand(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds in Python's own integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        one, two = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = two >> 32 ^ b ^ k, two & LOW, one >> 32 ^ d ^ m, one & LOW
        k, m = (k + 0x9E3779B9) & LOW, (m + 0xBB67AE85) & LOW
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    counter, key, result = ([int(word, 16) for word in words.split()] for words in (counter, key, result))
    words = philox([torch.tensor([word]) for word in counter], tuple(torch.tensor([word]) for word in key))
    assert [int(word) for word in words] == result == by_hand(counter, key)


def test_a_streams_words_are_those_of_its_counters():
    draws, seed, n = torch.arange(len(KEYS)) * 70000, 2**41 + 9, 11
    words = philox_words(streams(KEYS, seed=seed, draw=draws).table, n)
    for row, key, draw in zip(words.tolist(), KEYS, draws.tolist(), strict=True):
        counters = [[block, draw, key & LOW, key >> 32 & LOW] for block in range(3)]
        assert row == [word for c in counters for word in by_hand(c, [seed & LOW, seed >> 32])][:n]


# --- the normal distribution ------------------------------------------------------------------------------------------


def test_normal_numbers_are_the_inverse_distribution_function_of_their_words():
    """Within four units in the last place of fp64's, in the middle, at the seams and in both tails."""
    ends = torch.arange(20_000)
    seam = int((1 - math.sqrt(1 - 2**-10)) * 2**31)  # where the polynomials meet: 1 − q² = 2^-10
    starts = [0, 2**31 - 20_000, 2**31, 2**32 - 20_000, 2**31 - 10_000 - seam, 2**31 - 10_000 + seam, 1_234_567_890]
    words = torch.cat([start + ends for start in starts])
    v = words.numpy().astype(np.float64) - np.where(words.numpy() >= 2**31, 2.0**32, 0)
    q, rest = np.abs(2 * v + 1) / 2**32, (2**32 - np.abs(2 * v + 1)) / 2**32
    exact = np.sign(v + 0.5) * np.where(q < 0.5, math.sqrt(2) * erfinv(q), -ndtri(rest / 2))
    found = normal_of(words).double().numpy()
    assert (np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 4
    assert np.abs(found).max() == pytest.approx(6.338, abs=1e-3)
    assert np.array_equal(found[20_000 * 3 :][:20_000][::-1], -found[:20_000]), "symmetric"


def test_noise_is_standard_normal():
    """A million numbers of 64 keys: moments within 4.5 standard errors, the tails as often as they should be."""
    z = philox_normal(range(64), (1 << 14,), seed=3).double().flatten().numpy()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4.5 * math.sqrt(variance / n)
    for bound in (1, 2, 3, 4):
        share = 2 * stats.norm.sf(bound)
        assert 1e-5 < stats.binomtest(int((np.abs(z) > bound).sum()), n, share).pvalue
    assert stats.kstest(z, "norm").pvalue > 1e-4


def test_keys_draws_seeds_and_positions_are_unrelated():
    """1024 numbers each of neighbouring seeds, keys (and far ones) and draws: no correlation beyond chance's."""
    keys, given = [0, 1, 2, 3, 2**32, 2**33, -1], product((0, 1), (0, 1, 2**16))
    rows = torch.cat([philox_normal(keys, (1024,), seed=seed, draw=draw) for seed, draw in given])
    r = torch.corrcoef(rows).fill_diagonal_(0)
    assert r.abs().max() < 5.2 / math.sqrt(1024)  # 861 pairs of rows
    for lag in range(1, 9):
        products = rows[:, lag:] * rows[:, :-lag]
        assert products.mean().abs() < 4.5 / math.sqrt(products.numel())


def test_any_part_can_be_made_again():
    whole = philox_normal(KEYS, (4, 5, 3), seed=1, draw=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(philox_normal([KEYS[i] for i in order], (4, 5, 3), seed=1, draw=2), whole[order])
    assert torch.equal(philox_normal(KEYS[2:3], (60,), seed=1, draw=2)[0], whole[2].flatten())
    assert torch.equal(philox_normal(KEYS, (7,), seed=1, draw=2), whole.flatten(1)[:, :7])
    assert torch.equal(philox_normal(torch.tensor(KEYS[:4]), (60,), seed=1 + 2**64, draw=2), whole[:4].flatten(1))
    assert philox_normal([], (4, 2), seed=0).shape == (0, 4, 2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [1, 6, 1023, 2500])
def test_the_kernel_makes_the_same_noise(n):
    """Integers and floats alike: one block or several, a last one that is not full."""
    keys, draws = KEYS[n % 3 :][:3], torch.tensor([0, 7, 2**31 + 5])
    expected = philox_normal(keys, (n,), seed=-7, draw=draws, kernel="torch")
    found = philox_normal(keys, (n,), seed=-7, draw=draws, device=ON, kernel="triton")
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(philox_normal(keys, (n,), seed=-7, draw=draws, device=ON).cpu(), expected)


# --- x_t and target ---------------------------------------------------------------------------------------------------

LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
CASES = [  # shape, dtype, layout, coefficients
    ((5, 4, 16, 24), torch.float32, None, 4),
    ((5, 4, 33, 11), torch.bfloat16, LAST, 4),
    ((3, 3, 2, 5, 7), torch.float16, LAST_3D, 2),
    ((3, 61, 9), torch.float32, None, 4),
    ((4, 1, 7, 3), torch.float64, LAST, 2),
]


def case(shape, dtype, layout, count):
    """x0, noise and streams of three rows, coefficients, rows."""
    g = torch.Generator().manual_seed(5)
    x0 = torch.randn(shape, generator=g).to(ON, dtype)
    x0 = x0 if layout is None else x0.to(memory_format=layout)
    noise, made = torch.randn(3, *shape[1:], generator=g).to(ON), streams([8, -9, 10], seed=4, draw=1, device=ON)
    coefficients = tuple((torch.rand(count, shape[0], generator=g) - 0.3).to(ON))
    return x0, noise, made, coefficients, torch.randint(3, (shape[0],), generator=g).to(ON)


def in_fp64(x0, noise, coefficients, rows):
    """[x_t, target] by their equations."""
    wide = [value.double().view(-1, *(1,) * (x0.ndim - 1)) for value in coefficients]
    return [wide[i] * x0.double() + wide[i + 1] * noise[rows].double() for i in range(0, len(wide), 2)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype", "layout", "count"), CASES)
def test_the_kernel_mixes_as_the_equations_and_as_pytorch(shape, dtype, layout, count):
    """Noise that is read and noise that is made on the way; each run of the kernel with the same bits."""
    x0, noise, made, coefficients, rows = case(shape, dtype, layout, count)
    for source, read in ((noise, noise), (made, made.normal(shape[1:], "torch"))):
        x_t, target = noise_pairs(x0, source, coefficients, rows, kernel="triton")
        again, plain = (noise_pairs(x0, source, coefficients, rows, kernel=kernel) for kernel in ("triton", "torch"))
        assert (target is None) == (count == 2)
        for k, exact in enumerate(in_fp64(x0, read, coefficients, rows)):
            found = (x_t, target)[k]
            assert found.dtype == torch.float32 and found.stride() == x0.stride()
            torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
            assert torch.equal(found, plain[k]) and torch.equal(found, again[k])


def test_items_do_not_depend_on_their_batch():
    """Another order of items and of noise rows; one item alone, its noise its own."""
    x0, noise, made, coefficients, rows = case((5, 4, 9, 7), torch.float32, None, 4)
    order = torch.tensor([4, 2, 0, 3, 1], device=ON)
    for source in (noise, made):
        whole = noise_pairs(x0, source, coefficients, rows, kernel="triton")
        mixed = noise_pairs(x0[order], source, tuple(c[order] for c in coefficients), rows[order], kernel="triton")
        assert all(torch.equal(m, w[order]) for m, w in zip(mixed, whole, strict=True))
    alone = noise_pairs(x0[2:3], noise[rows[2:3]], tuple(c[2:3] for c in coefficients), kernel="triton")
    assert torch.equal(alone[0], noise_pairs(x0, noise, coefficients, rows, kernel="triton")[0][2:3])


def test_pictures_with_gaps_in_memory_are_copied():
    x0, noise, _, coefficients, rows = case((4, 4, 6, 5), torch.float32, None, 4)
    for view in (x0[:, :, ::2], x0[::2].expand(2, 4, 6, 5), x0.transpose(2, 3), x0[:1].expand(4, 4, 6, 5)):
        part = noise[:, :, :: 6 // view.shape[2]] if view.shape[3] == 5 else noise.transpose(2, 3)
        given = view, part, tuple(c[: len(view)] for c in coefficients), rows[: len(view)]
        pairs = zip(noise_pairs(*given, kernel="triton"), noise_pairs(*given, kernel="torch"), strict=True)
        assert all(torch.equal(found, plain) for found, plain in pairs)


def test_an_empty_batch_is_none():
    x0, noise, _, coefficients, rows = case((4, 4, 6, 5), torch.float32, None, 4)
    x_t, target = noise_pairs(x0[:0], noise, tuple(c[:0] for c in coefficients), rows[:0], kernel="triton")
    assert x_t.shape == target.shape == (0, 4, 6, 5)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_sizes_that_do_not_fit_are_refused(kernel):
    x0, noise, made, coefficients, rows = case((5, 4, 6, 5), torch.float32, None, 4)
    with pytest.raises(ValueError, match=r"two or four coefficients of shape \(5,\), one for each item; got .*\(4,\)"):
        noise_pairs(x0, noise, (*coefficients[:3], coefficients[3][:4]), rows, kernel=kernel)
    with pytest.raises(ValueError, match="wants two or four coefficients"):
        noise_pairs(x0, noise, coefficients[:3], rows, kernel=kernel)
    with pytest.raises(ValueError, match=r"noise \(3, 4, 6, 4\) has rows of another shape than the items \(5,"):
        noise_pairs(x0, noise[..., :4], coefficients, rows, kernel=kernel)
    for source in (noise, made):
        with pytest.raises(ValueError, match="got 3 rows of noise for 5 items; say with `rows`"):
            noise_pairs(x0, source, coefficients, kernel=kernel)
    with pytest.raises(ValueError, match="got the rows of 4 items for 5 items"):
        noise_pairs(x0, noise, coefficients, rows[:4], kernel=kernel)


def test_triton_that_cannot_run_is_an_error_and_auto_is_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="train.kernel triton cannot run: Triton has no driver for tensors on cpu;"):
        philox_normal([0], (3,), seed=0, kernel="triton")
    assert philox_normal([0], (3,), seed=0, kernel="auto").shape == (1, 3)
    with pytest.raises(ValueError, match="train.kernel 'cuda' is unknown; known: auto, torch, triton"):
        philox_normal([0], (3,), seed=0, kernel="cuda")
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="cannot run: Triton is not installed"):
        available.use_triton("triton", torch.device("cuda"))
    assert not available.use_triton("auto", torch.device("cuda"))


# --- the compiler -----------------------------------------------------------------------------------------------------

COMPILE = r"""
import json, re, sys
import torch
import diffpref.noise
from diffpref.triton_kernels import noise_pairs, philox

philox.philox_normal([0], (2,), seed=0)
assert "triton" not in sys.modules, "imported before a kernel is launched"

import kernel_ptx

def report(name, capability, found):
    print(json.dumps([name, capability, sorted(set(re.findall(r"[a-z0-9.]+\.f32\w*", found.asm["ptx"])))]))

kernel_ptx.report, table = report, philox.streams([0, 1], seed=0)
x0, row, by = torch.zeros(4, 4, 64, 64), torch.zeros(4, dtype=torch.int64), torch.ones(4)
channels_last = x0.bfloat16().to(memory_format=torch.channels_last)
for capability in (80, 90, 100):
    philox.launch = noise_pairs.launch = kernel_ptx.compiled(capability)
    noise_pairs.fused(x0, table, (by,) * 4, row)
    if capability == 80:
        noise_pairs.fused(channels_last, table, (by,) * 4, row)
        noise_pairs.fused(channels_last, x0, (by,) * 2, None)
        philox.fused(table.table, 5000)
"""


def test_compiled_for_gpus_no_operation_rounds_otherwise_than_pytorchs(tmp_path):
    """PTX for three generations, without a device, in a process that imports Triton only then. Sums and products are
    rounded to nearest, none is fused, nothing is approximate, no small number becomes zero: the interpreter's bits."""
    folders = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    line, environment = [sys.executable, "-c", COMPILE], os.environ | {"TRITON_INTERPRET": "0"} | folders
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in kernels] == ["mix_kernel"] * 3 + ["normal_kernel"] + ["mix_kernel"] * 2
    for name, capability, operations in kernels:
        rounding = {operation for operation in operations if operation.startswith(("add", "sub", "mul"))}
        assert rounding and all(".rn." in operation and "ftz" not in operation for operation in rounding), name
        others = {operation.split(".")[0] for operation in set(operations) - rounding}
        assert others <= {"ld", "st", "mov", "neg", "selp", "setp", "cvt"}, f"{name} for {capability}"
