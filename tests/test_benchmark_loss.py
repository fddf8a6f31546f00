"""Both commands run as they say and write what they promise; the check before the clock catches another loss. No times
are asserted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch

from diffpref.config import NoiseConfig

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))

from lossy.cases import APART, DTYPES, SHAPES, Case, make  # noqa: E402
from lossy.equal import check, distance, exact  # noqa: E402
from lossy.ways import WAYS, Way, run  # noqa: E402
from spread.estimates import measured  # noqa: E402

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def command(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python benchmarks/<name>.py …` to its end."""
    return forked.call([sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *arguments])


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loss(tmp_path_factory) -> tuple[dict, str]:
    """(JSON, what was printed) of a run with tiny shapes."""
    out = tmp_path_factory.mktemp("loss") / "loss.json"
    sizes = ["--shrunk", "8", "--shapes", "sd15,flux", "--pairs", "3", "--interpreted", "3", "--dtypes", "bf16,fp32"]
    impl = "eager,half_reference,ours,triton_errors,triton,triton_graph"
    done = command("loss", "--device", "cpu", "--impl", impl, *sizes, "--each", "0.01", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def of(report: dict, **wanted) -> list[dict]:
    """Rows that are so."""
    return [row for row in report["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_what_numbers_depend_on_is_named(loss):
    report, printed = loss
    assert {"hardware", "torch", "triton", "diffpref"} <= report["environment"].keys()
    assert report["git"] and report["predictions"]["small_us"]["eager"] and "say nothing about a GPU" in printed
    assert len(of(report, impl="eager")) == 4 and len(report["rows"]) == 12 + 8 * INTERPRETED


def test_bytes_are_counted_by_hand(loss):
    flux, n = of(loss[0], shape="flux", dtype="bf16", impl="eager")[0], 512 * 8 * 6
    assert flux["item"] == [512, 8] and flux["bytes_min"] == 4 * n * 2
    assert flux["floor_us"] == pytest.approx(flux["bytes_min"] / loss[0]["copy_tbs"] / 1e6)
    # Both means, forward: cast of prediction and target (6 bytes each), difference and square as one (12), mean (4);
    # backward of one of them: mean's spread (4), its product (16), cast (6). The rest are vectors.
    assert flux["bytes"] == pytest.approx(82 * n, rel=0.02)


def test_times_and_gaps_belong_together(loss):
    for row in of(loss[0], impl="ours") + of(loss[0], impl="eager"):
        for kind in ("hot_us", "cold_us"):
            found = row[kind]
            assert 0 < found["p20"] <= found["p50"] <= found["p80"] and found["n"] >= 2 and found["apart"] >= 0
            assert found["gap"] == pytest.approx(found["p50"] / row["floor_us"])
            assert found["tbs"] == pytest.approx(row["bytes_min"] / found["p50"] / 1e6)


def test_no_way_waits_for_the_device_and_the_kernels_are_three_launches(loss):
    assert all(row["waits"] == 0 for row in loss[0]["rows"])
    fused = of(loss[0], impl="triton")
    assert all(row["launches"] == len(row["kernels"]) == 3 for row in fused) and bool(fused) == INTERPRETED


def test_ours_errs_less_in_the_logit_and_half_precision_more(loss):
    report = loss[0]
    assert report["logit"]["reached"] and max(report["logit"]["worst_over_formula"].values()) <= 0.1
    worst = max(row["error"]["logit"] for row in of(report, impl="half_reference", dtype="bf16"))
    assert worst > 100 * max(row["error"]["logit"] for row in of(report, impl="eager"))


def test_interpreted_kernels_and_graphs_have_no_times(loss):
    report = loss[0]
    assert not any("cold_us" in row for row in report["rows"] if row["impl"].startswith("triton"))
    assert any(name.startswith("triton_graph") and "want a GPU" in why for name, why in report["left_out"].items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_autograd_in_fp64(shape, dtype):
    x = make(case := Case(shape, dtype, pairs=2, shrunk=8), CPU, seed=3)
    wide = replace(x, policy=x.policy.detach().double().requires_grad_(), reference=x.reference.double())
    wide = replace(wide, target=x.target.double())
    p, r, y = (t.flatten(1) for t in (wide.policy, wide.reference, wide.target))
    error, base = (p - y).square().mean(1), (r - y).square().mean(1)
    logits = -2500.0 * ((error[:2] - error[2:]) - (base[:2] - base[2:]))
    loss = -torch.nn.functional.logsigmoid(logits).mean()
    gradient = torch.autograd.grad(loss, wide.policy, grad_outputs=x.scale.double())[0]
    true = exact(x)
    torch.testing.assert_close(true.logits, logits.detach())
    torch.testing.assert_close(true.loss, loss.detach())
    torch.testing.assert_close(true.gradient, gradient)
    apart = (wide.policy - wide.reference).detach().square().mean().sqrt().item()
    assert case.elements == p.numel() and apart == pytest.approx(APART[shape], rel=0.3, abs=5e-3)


def wrong(what: str) -> Way:
    """diffusers' other script, whose β counts double; another target; a NaN."""
    formula = WAYS["eager"]

    def doubled(x):
        return formula.loss(replace(x, settings=replace(x.settings, beta=2 * x.settings.beta)))

    def moved(x):
        return formula.loss(replace(x, target=x.target + 0.05))

    def nothing(x):
        loss, logits = formula.loss(x)
        return loss * float("nan"), logits

    return Way(what, {"beta": doubled, "target": moved, "nan": nothing}[what], formula.logits)


@pytest.mark.parametrize("what", ["beta", "target", "nan"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_loss_is_refused_before_it_is_timed(what, dtype):
    x = make(case := Case("sdxl", dtype, pairs=2, shrunk=8), CPU, seed=1)
    true = exact(x)
    for name in ("eager", "ours"):
        check(name, distance(WAYS[name], x, true), case)
    with pytest.raises(ValueError, match=r"fast does not compute the same at sdxl, 2 pairs, .* nothing is timed"):
        check("fast", distance(wrong(what), x, true), case)


def test_a_scaled_loss_keeps_half_precision_from_vanishing():
    x = make(Case("wan", "fp16", pairs=2, shrunk=4), CPU, seed=0)
    gradient = run(WAYS["ours"], x)[2]
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--impl", "fast"], "'fast' is unknown; known: eager"), (["--dtypes", "int8"], "'int8' is unknown; known: fp32")],
)
def test_unknown_names_are_refused(arguments, message, capsys):
    from loss import parse

    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


# --- the variance -----------------------------------------------------------------------------------------------------


def test_variance_goes_on_where_it_was_and_writes_what_it_promises(tmp_path):
    out, folder = tmp_path / "variance.json", tmp_path / "gradients"
    line = ["--pairs", "2", "--conditions", "1", "--folder", str(folder), "--out", str(out)]
    done = command("variance", "--steps", "2", *line)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["objective"]["beta"] == 50 and report["lora"]["rank"] == 16 and report["pairs_a_step"] == 2
    found = report["conditions"]["start, uniform timesteps"]
    assert found["variance of a pair"]["value"] > 0 and "| ratio/stratified |" in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*/*.safetensors"))) == 2 and not list(folder.glob("*/*.part"))


def drawn(steps: int, pairs: int, seed: int) -> dict[str, torch.Tensor]:
    """Gradients [steps,pairs,3] of a made-up world: g = m(t) + d(pair) + ε, with known variances; m is ±1 in the two
    halves of the timesteps, Var d = 0.75, Var ε = 3."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(steps, pairs, 3, generator=g)

    def by_level(level: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones_like(level), torch.where(level < 0.5, -1.0, 1.0), torch.zeros_like(level)], -1)

    data, noise = normal(0.5), normal(1.0)
    level = torch.rand(steps, pairs, generator=g)
    order = torch.stack([torch.randperm(pairs, generator=g) for _ in range(steps)])
    spread = (order + torch.rand(steps, pairs, generator=g)) / pairs
    moved = torch.roll(noise, 1, 1)
    ways = {
        "iid": by_level(level) + data + noise,
        "stratified": by_level(spread) + data + normal(1.0),
        "neighbour": by_level(level) + data - moved,
        "mirrored": by_level(level) + data - noise,
        "mirrored afresh": by_level(spread) + data - noise,
        "independent": 2 * by_level(level) + data + normal(2.0),
    }
    squared = {f"{name}/squared": value.square().sum(-1) for name, value in ways.items()}
    return ways | squared | {"iid/level": level, "stratified/level": spread}


def test_known_variances_are_found():
    found = measured(drawn(steps=400, pairs=8, seed=0), NoiseConfig())
    expected = {  # V = 1 + 0.75 + 3
        "mean squared": 1.0,
        "variance of a pair": 4.75,
        "share of the data": 0.75 / 4.75,
        "ratio/stratified": 3.75 / 4.75,
        "whole steps/iid": 1.0,
        "whole steps/stratified": 3.75 / 4.75,
        "ratio/antithetic neighbours": 1.75 / 4.75,
        "ratio/a pair twice": 5.5 / 4.75,
        "ratio/a pair twice, mirrored": 3.5 / 4.75,
        "ratio/a pair twice, mirrored, fresh timestep": 2.5 / 4.75,
        "given the pairs/stratified": 3.0 / 4.0,
        "given the pairs/a pair twice, mirrored": 2.0 / 4.0,
        "ratio/independent": (4 + 0.75 + 12) / 4.75,
        "independent/length of the mean": 2.0,
        "independent/cosine of the means": 1.0,
        "independent/bias squared": 1.0,
    }
    for name, value in expected.items():
        row = found[name]
        assert row["value"] == pytest.approx(value, abs=0.15 * max(1, value)), name
        assert row["low"] - 0.05 <= value <= row["high"] + 0.05, name


def test_levels_of_another_distribution_fall_into_its_own_strata():
    from spread.estimates import quantiles

    level = torch.sigmoid(1.0 + torch.randn(20_000, generator=torch.Generator().manual_seed(0))).numpy()
    places = quantiles(level, NoiseConfig(timesteps="logit_normal", logit_mean=1.0))
    counts = torch.histc(torch.from_numpy(places), 10, 0, 1)
    assert (counts - 2000).abs().max() < 200
