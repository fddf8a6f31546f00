"""The benchmarks of a step and of memory run as their README says; what they count is right by hand, and a formula that
is not the script's is caught. No times are asserted."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from stepping.architectures import TINY  # noqa: E402
from stepping.bases import make_bases  # noqa: E402
from stepping.budgets import GB, SETTINGS, Parts, Situation, computed  # noqa: E402
from stepping.clock import Clock  # noqa: E402
from stepping.counting import count  # noqa: E402
from stepping.equal import EXACT, Unequal, awaken, check, compare, draw, through_ours, through_script  # noqa: E402
from stepping.levers import LEVERS, changed  # noqa: E402
from stepping.live import Live  # noqa: E402
from stepping.ours import Ours, configured, engine  # noqa: E402
from stepping.rows import read_rows, stacked  # noqa: E402
from stepping.script import Recipe, Script, with_lora  # noqa: E402

RECIPE = Recipe(batch=2, rank=4)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict, str]:
    """(JSON, what was printed) of the command at its smallest."""
    out = tmp_path_factory.mktemp("bench") / "step.json"
    sizes = ["--model", "sd15", "--size", "tiny", "--device", "cpu", "--pairs", "2", "--set", "4"]
    turns = ["--levers", "public_toggle", "--warm", "1", "--steps", "1", "--rounds", "2", "--out", str(out)]
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), *sizes, *turns]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_command_names_what_its_numbers_depend_on(outcome):
    report, printed = outcome
    assert report["command"].startswith("python benchmarks/step.py --model sd15 --size tiny")
    assert {"hardware", "torch", "triton", "diffusers", "peft", "diffpref"} <= report["environment"].keys()
    assert len(report["load_average_at_start"]) == len(report["load_average_at_end"]) == 3
    assert report["git"] and report["torch_threads"] >= 1 and report["rounds"] == 2
    assert all(rate > 0 for rate in report["ceilings"].values())
    assert report["predictions"]["steps"]["sd15"]["goal_over_script_with_workers"] == 2.2
    assert "| ours |" in printed and "Load average" in printed and "Limit" in printed


def test_every_variant_has_its_numbers(outcome):
    variants = outcome[0]["variants"]
    assert list(variants) == ["script", "script_workers", "script_cached", "ours", "public_toggle"]
    for name, row in variants.items():
        assert row["seconds_a_step"]["n"] == 2 and row["share_of_limit"] > 0
        assert row["of_that_waiting_for_data"]["median"] >= 0
        assert row["times_as_fast_as"][name]["median"] == 1 if name in row["times_as_fast_as"] else True
        assert all(math.isfinite(ratio["median"]) for ratio in row["times_as_fast_as"].values())


def test_both_sides_compute_the_same(outcome):
    for found in outcome[0]["equal_maths"].values():
        assert found["within"] and found["cosine"] > 0.99999 and found["margin_difference"] < 1e-3
        assert abs(found["loss"] - found["script_loss"]) < 1e-3 and found["loss"] != pytest.approx(
            math.log(2), abs=1e-4
        )


def test_the_script_does_more_and_waits_more(outcome):
    """Its four numbers read back; both encoders; AdamW one parameter after the other."""
    counts = outcome[0]["counts"]
    assert counts["script"]["waits"]["_local_scalar_dense"] >= 4
    assert counts["script"]["flop"] > counts["script_cached"]["flop"]
    assert counts["script"]["operations"] > counts["script_cached"]["operations"] > counts["ours"]["operations"]
    assert counts["public_toggle"]["flop"] == counts["ours"]["flop"] > 0


# --- the same maths ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(a variant of ours, its engine, the script's denoiser and noise, what both are given) at tiny size."""
    folder, state = tmp_path_factory.mktemp("sides"), {}
    bases = make_bases("sdxl", "tiny", folder, 4, torch.device("cpu"))
    lever = LEVERS["no_caches"]
    with engine(state):
        ours = Ours(configured("ours", lever, bases, RECIPE, 4, folder), bases, lever)
    pipe = bases.at(torch.float32)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet = with_lora(pipe.unet, RECIPE)
    awaken(ours.model, 0), awaken(unet, 0)
    return ours, state, unet, scheduler, draw(ours.trainer, ours.batch(), scheduler), bases


def of_ours(sides) -> tuple:
    """Loss, margins, gradients."""
    with engine(sides[1]):
        return through_ours(sides[0].trainer, sides[4])


def test_equal_sides_pass(sides):
    check("ours", compare(of_ours(sides), through_script(*sides[2:5], RECIPE.beta), EXACT))


def test_another_beta_is_caught(sides):
    with pytest.raises(Unequal, match="ours does not compute what the script computes"):
        check("ours", compare(of_ours(sides), through_script(*sides[2:5], 0.9 * RECIPE.beta), EXACT))


def test_other_noise_is_caught(sides):
    given = replace(sides[4], noise=sides[4].noise.flip(0))
    found = compare(of_ours(sides), through_script(*sides[2:4], given, RECIPE.beta), EXACT)
    assert not found.within and not replace(found, loss=math.nan).within


def test_swapped_sides_are_caught(sides):
    """Winners for losers: the margins change their sign, and the gradients point elsewhere."""
    given = sides[4]
    structure = replace(given.encoded.structure, pairs=given.encoded.structure.pairs.flip(1))
    swapped = replace(given, encoded=replace(given.encoded, structure=structure))
    found = compare(of_ours(sides), through_script(*sides[2:4], swapped, RECIPE.beta), EXACT)
    assert not found.within and found.cosine < 0


# --- parts ------------------------------------------------------------------------------------------------------------


def test_twins_share_memory_until_they_are_cast(sides):
    bases = sides[5]
    one, two = bases.at(torch.float32).unet, bases.at(torch.float32).unet
    assert one is not two and one.conv_in.weight.data_ptr() == two.conv_in.weight.data_ptr()
    two.to(torch.bfloat16)
    assert one.conv_in.weight.dtype == torch.float32 and one.conv_in.weight is not two.conv_in.weight


def test_the_script_reads_what_the_trainer_reads(sides):
    """SDXL's rows: tokens of both encoders, sizes and corners; the same pictures, up to how they are cut to size."""
    bases = sides[5]
    rows = read_rows(bases.pairs, 4)
    with engine({}):
        script = Script(bases.at(torch.float32), rows, RECIPE, bases.resolution)
    batch = stacked([script.loader.dataset[i] for i in range(4)])
    assert batch["pixels"].shape == (4, 6, 32, 32) and batch["pixels"].abs().max() < 1.0001
    assert batch["time_ids"].tolist() == [[36, 40, 0, 2, 32, 32]] * 4  # 40x36 pictures: 36 high, cut to the middle
    inputs = script.inputs(batch)
    assert inputs["encoder_hidden_states"].shape == (8, 77, 56)
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (8, 24)


def test_counts_by_hand():
    """A product [4,8]x[8,16] and its weight's gradient, 2·4·8·16 each; the square of [4,16] keeps its input, the
    product [4,8]; an .item() is a wait, and so is an index by a mask."""
    model, x = torch.nn.Linear(8, 16, bias=False), torch.ones(4, 8)
    counts = count(lambda: model(x).square().sum().backward(), model)
    assert counts.flop == 2 * (2 * 4 * 8 * 16) and counts.saved == 4 * (4 * 8 + 4 * 16) and not counts.waits
    waiting = count(lambda: (model(x).sum().item(), x[x > 0]), model)
    assert dict(waiting.waits) == {"_local_scalar_dense": 1, "index": 1}


def test_live_memory_by_hand():
    """Of 1000 and 500 numbers, never three vectors at once."""
    start = torch.ones(1000)
    with Live([start]) as live:
        twice = start * 2
        half = twice[:500] + 1  # twice and half: 6000 bytes
        del twice
        half = half + 1  # 4000 for a moment
    assert (live.peak, live.now) == (6000, 2000)


def test_the_clock_leaves_the_first_steps_out():
    clock = Clock(2, 3, torch.device("cpu"))
    for _ in clock.watched(range(5)):
        clock.tick()
    turn = clock.turn()
    assert 0 <= turn.waited < turn.seconds
    with pytest.raises(RuntimeError, match="2 steps were made, not 3"):
        short = Clock(1, 2, torch.device("cpu"))
        short.tick(), short.tick()
        short.turn()


def test_memory_of_a_setting():
    """Checkpointing takes less for a pair; LoRA weights are fp32 in any case; the parts add up by hand."""
    plain, again = (computed("sd15", TINY["sd15"], setting) for setting in SETTINGS[:2])
    assert plain.pair > again.pair > 0 and plain.denoiser == again.denoiser
    assert plain.optimizer == 2 * plain.lora
    parts = Parts(denoiser=int(2 * GB), lora=0, optimizer=int(GB), vae=int(GB), texts=int(GB), pair=int(2 * GB))
    assert [parts.pairs(card, Situation()) for card in (8, 12)] == [2, 4]
    assert parts.pairs(12, Situation(encoders=True)) == 3 and parts.pairs(2, Situation()) == 0
    assert parts.fixed(Situation(frozen_copy=True, optimizer="adamw_8bit")) == int(4.25 * GB)


def test_every_lever_is_a_configuration(sides):
    """Keys that exist, and values other than those of ours."""
    for name, lever in LEVERS.items():
        config = changed(sides[0].trainer.config, lever.changes)
        assert name == "ours" or lever.changes or lever.alter is not LEVERS["ours"].alter
        assert config.name == "ours"
