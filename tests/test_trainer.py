"""The loop, through the real command in a subprocess and in process, on tiny pipelines of every family."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from tiny_runs import PIPELINES, command, distance, launch, make_world, run, settings, weights

STOCK = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
base, run, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(run)
g = [torch.Generator().manual_seed(s) for s in (0, 1, 0, 1)]
prompts = ["a cat", "a cat", "a dog", "a dog"]
numpy.save(out, pipe(prompts, num_inference_steps=2, guidance_scale=2.0, generator=g, output_type="np").images)
assert not [name for name in sys.modules if name.startswith("diffpref")]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("family", PIPELINES)
def test_the_command_trains_every_family_and_stock_diffusers_draws_the_same(world, family, tmp_path):
    judge = {"judge": "tiny_runs.brightness", "measures": {"light": "tiny_runs.brightness"}}
    sections = {"sample": {"validation_steps": 2}, "train": {"checkpointing_steps": 2}, "judge": judge}
    done = launch(*settings(world, f"launch-{family}", family, **sections))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"win rate vs base [01]\.\d\d \[[01]\.\d\d, [01]\.\d\d\], n=4", done.stdout)
    folder = world / "runs" / f"launch-{family}"
    made = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors", "README.md", "report.json"}
    expected |= {"before_after.png", "curves.png", "validation/step-000002.png", "checkpoint-2/trainable.safetensors"}
    assert expected <= made
    report = json.loads((folder / "report.json").read_text())
    assert set(report["win_rate"]) >= {"value", "low", "high", "n", "ties"} and report["win_rate"]["n"] == 4
    assert set(report["measures"]) == {"light"} and report["groups_seen"] == 8
    subprocess.run([sys.executable, "-c", STOCK, world / family, folder, tmp_path / "stock.npy"], check=True)
    stock = np.load(tmp_path / "stock.npy")
    assert abs(255 * float(stock.mean()) - report["measures"]["light"]["after"]) < 0.5  # ours went through bytes
    assert report["measures"]["light"]["after"] != report["measures"]["light"]["before"]


@pytest.mark.parametrize("family", PIPELINES)
def test_the_first_step_is_exactly_at_the_reference(world, family):
    _, lines, _ = run(world, f"first-{family}", model={"pretrained_model_name_or_path": str(world / family)})
    first = lines[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["drift/chosen"] == first["drift/rejected"] == 0
    assert first["rewards/accuracies"] == 0.5 and lines[-1]["rewards/margins"] != 0


def test_sft_needs_no_reference_and_its_loss_is_the_winners_error(world):
    _, lines, folder = run(world, "sft", objective={"name": "sft"})
    assert all(line["loss"] == pytest.approx(line["errors/chosen"]) for line in lines)
    assert not [key for key in lines[0] if key.startswith("rewards")]
    assert any(w.abs().max() > 0 for key, w in weights(folder).items() if "lora_B" in key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_against_a_frozen_copy(world, dtype):
    sections = {"model": {"tuning": "full", "dtype": dtype}, "reference": {"kind": "frozen_copy"}}
    _, lines, folder = run(world, f"full-{dtype}", **sections)
    # Not to the bit as with an adapter: on the CPU, weights that need gradients take other kernels than weights
    # that do not.
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(lines[-1]["rewards/margins"]) > 1e-3
    from diffusers import DiffusionPipeline

    tuned = DiffusionPipeline.from_pretrained(folder / "pipeline").unet.state_dict()
    base = DiffusionPipeline.from_pretrained(world / "sd").unet.state_dict()
    assert tuned.keys() == base.keys() and any(not torch.equal(tuned[k], base[k]) for k in base)


@pytest.mark.parametrize("base", ["sd", "sd3"])
def test_a_half_precision_base_trains_fp32_masters(world, base):
    sections = {"model": {"pretrained_model_name_or_path": str(world / base), "dtype": "bfloat16"}}
    _, lines, folder = run(world, f"half-{base}", **sections)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert {w.dtype for w in weights(folder).values()} == {torch.float32}


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"use_rslora": True, "alpha": 8.0}, {"target_modules": ["to_q", "conv1"]}]
)
def test_kinds_of_adapter(world, lora):
    _, lines, folder = run(world, f"lora-{'-'.join(lora)}", lora=lora)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert any("magnitude" in key for key in weights(folder)) == bool(lora.get("use_dora"))
    assert any("resnets" in key for key in weights(folder)) == ("target_modules" in lora)


def test_resuming_equals_not_stopping(world):
    sections = {
        "train": {"checkpointing_steps": 2},
        "data": {"caption_dropout": 0.3, "center_crop": False, "random_flip": True},
    }
    _, whole_log, whole = run(world, "whole", **sections)
    part = world / "runs" / "part"
    part.mkdir()
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    sections["train"]["resume_from_checkpoint"] = "latest"
    report, lines, _ = run(world, "part", **sections)
    assert report["resumed_from_step"] == 2 and [line["step"] for line in lines] == [3, 4]
    assert all(a["loss"] == b["loss"] for a, b in zip(lines, whole_log[2:], strict=True))
    assert all(torch.equal(w, weights(whole)[key]) for key, w in weights(part).items())


def test_resuming_from_what_is_no_checkpoint_is_refused(world):
    with pytest.raises(ValueError, match="is not a checkpoint; give 'latest' or a folder checkpoint-<step>"):
        run(world, "lost", train={"resume_from_checkpoint": str(world / "sd")})


def test_accumulation_equals_a_larger_batch(world):
    even = {
        "adam_epsilon": 1e-2
    }  # Adam turns the rounding of a near-zero gradient into a whole step; a large epsilon does not
    _, _, once = run(world, "once", train={"train_batch_size": 4} | even)
    _, _, split = run(world, "split", train={"train_batch_size": 1, "gradient_accumulation_steps": 4} | even)
    for key, w in weights(once).items():
        torch.testing.assert_close(weights(split)[key], w, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_stops_the_run(world):
    with pytest.raises(FloatingPointError, match="the loss is nan at step .: lower train.learning_rate"):
        run(world, "wild", train={"learning_rate": 1e30, "max_train_steps": 8}, sample={"prompts": []})


def test_a_run_is_not_buried_under_another(world):
    run(world, "twice")
    with pytest.raises(ValueError, match="holds a run already; go on with .* latest; give another --name, or"):
        run(world, "twice")
    from diffpref.config import load_config
    from diffpref.trainer import Trainer

    (world / "runs" / "twice" / "checkpoint-9").mkdir()
    Trainer(load_config([*settings(world, "twice"), "--overwrite", "true"])).run()
    assert not (world / "runs" / "twice" / "checkpoint-9").exists()


@pytest.mark.parametrize(
    ("train", "lora", "message"),
    [
        ({"max_train_steps": 3}, {}, "is past train.max_train_steps 3"),
        ({"max_train_steps": 3, "lr_scheduler": "cosine"}, {}, "is past train.max_train_steps 3"),
        ({"seed": 1}, {"rank": 4}, r"lora.rank: 2 there, 4 here\n  train.seed: 0 there, 1 here"),
        ({"train_batch_size": 1}, {}, "was made with 2 pairs or lists a step, this run has 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(world, train, lora, message):
    if not (world / "runs" / "mine").exists():
        run(world, "mine", train={"checkpointing_steps": 4}, lora={"rank": 2})
    latest = {"resume_from_checkpoint": "latest", "max_train_steps": 5}
    with pytest.raises(ValueError, match=message):
        run(world, "mine", train=latest | train, lora={"rank": 2} | lora)


def nothing(images, prompts) -> np.ndarray:
    """A judge that fails."""
    return np.full(len(images), np.nan)


def test_a_judge_that_fails_fails_before_training(world):
    with pytest.raises(ValueError, match="judge nothing gave 4 scores that are NaN"):
        run(world, "nan", judge={"judge": "test_trainer.nothing"})
    assert not (world / "runs" / "nan" / "metrics.jsonl").exists()


def test_one_prompt_is_too_few_for_a_judge(world):
    (world / "one.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="judge.judge needs two or more prompts"):
        run(world, "one", judge={"judge": "tiny_runs.brightness"}, sample={"prompts": str(world / "one.txt")})


def test_an_unavailable_tracker_is_refused(world):
    with pytest.raises(ValueError, match="train.report_to: dvclive is not to be had here"):
        run(world, "tracked", train={"report_to": ["dvclive"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {"learning_rat": 1}},
            "error: unknown configuration key 'train.learning_rat'; did you mean 'train.learning_rate'?",
        ),
        ({"lora": {"rank": "big"}}, 'error: Parser key "lora.rank"'),
        ({"objective": {"beta": 0.0}}, "error: objective.beta must be positive, got 0.0"),
        ({"data": {"path": "nowhere.parquet"}}, "error: data.path: no data set at 'nowhere.parquet'"),
        (
            {"model": {"pretrained_model_name_or_path": "tests"}},
            "error: model.pretrained_model_name_or_path: tests is not a diffusers",
        ),
        ({"sample": {"prompts": "nowhere.txt"}}, "error: sample.prompts: no file nowhere.txt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_clear_line(world, change, message):
    arguments = settings(world, "mistake", **change)
    done = forked.call(command(*arguments))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr and not (world / "runs" / "mistake").exists()


@pytest.mark.parametrize("family", PIPELINES)
def test_a_cached_run_is_the_same_run_and_draws_after_its_encoders_have_left(world, family):
    """Encoding in other batches rounds otherwise; Adam's epsilon is put above that rounding."""
    calm = {"adam_epsilon": 1e-2, "max_train_steps": 6}
    judge = {"judge": {"judge": "tiny_runs.brightness"}, "sample": {"validation_steps": 3}}
    _, lines, plain = run(world, f"plain-{family}", family, train=calm, **judge)
    cache = {"latents": True, "text": True, "folder": str(world / "runs" / f"cache-{family}")}
    report, cached_lines, cached = run(world, f"cached-{family}", family, train=calm, cache=cache, **judge)
    assert distance(cached, plain) < 1e-6
    assert cached_lines[0]["errors/chosen"] == pytest.approx(lines[0]["errors/chosen"], rel=1e-5)
    assert report["win_rate"]["n"] == 4 and (cached / "validation" / "step-000003.png").exists()


def test_gradient_checkpointing_changes_memory_and_nothing_else(world):
    calm = {"adam_epsilon": 1e-2}
    _, _, plain = run(world, "kept", train=calm)
    _, _, recomputed = run(world, "recomputed", train=calm | {"gradient_checkpointing": True})
    assert distance(recomputed, plain) < 1e-6


def test_the_rate_warms_up_and_falls(world):
    train = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "learning_rate": 1e-3, "max_train_steps": 6}
    _, lines, _ = run(world, "cosine", train=train, sample={"prompts": []})
    rates = [line["learning_rate"] for line in lines]
    assert rates[:2] == pytest.approx([5e-4, 1e-3]) and rates[-1] == 0
    assert rates[1:] == sorted(rates[1:], reverse=True)
