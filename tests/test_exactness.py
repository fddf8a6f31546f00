"""A run that is killed and resumed ends as one that was not: to the bit, wherever the kill fell."""

import random
import signal
import subprocess
import time
from itertools import cycle
from pathlib import Path

import pytest
from forked import CONTEXT
from tiny_runs import ENV, ROOT, command, log, make_world, same, settings, train_and_die, train_process

from diffpref.checkpoint import checkpoints

LATEST = ["--train.resume_from_checkpoint", "latest"]

GRID = {
    "plain": {},
    "accumulating": {"train": {"gradient_accumulation_steps": 2}},
    "dropout, average, spikes": {
        "lora": {"dropout": 0.3},
        "train": {"ema_decay": 0.9, "skip_grad_norm": 1.5, "logging_steps": 3},
    },
    "augmenting workers": {
        "data": {"num_workers": 2, "center_crop": False, "random_flip": True, "caption_dropout": 0.3}
    },
    "cached": {"cache": {"latents": True, "text": True}, "data": {"random_flip": True}},
    "streaming": {"data": {"streaming": True, "shuffle_buffer": 4, "num_workers": 2}},
    "buckets": {"data": {"buckets": [[32, 32], [16, 64]]}, "train": {"lr_scheduler": "cosine"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), ("sd", "sd3"))


def arguments(world: Path, name: str, base: str, sections: dict) -> list[str]:
    """A run of eight steps with a checkpoint after each, and no pictures."""
    train = {"max_train_steps": 8, "checkpointing_steps": 1} | sections.get("train", {})
    return settings(world, name, base, **(sections | {"train": train, "sample": {"prompts": []}}))


def finish(line: list[str]) -> float:
    """Run to the end; returns the seconds it took."""
    process, started = CONTEXT.Process(target=train_process, args=(line,)), time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def kill_after(line: list[str], seconds: float) -> None:
    """Run, and SIGKILL it at that time."""
    process = CONTEXT.Process(target=train_process, args=(line,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()


def kill_in_a_checkpoint(line: list[str], folder: Path, moment: int) -> bool:
    """Run, and SIGKILL it at a moment of its writing checkpoints; whether one was left half written or removed."""
    process = CONTEXT.Process(target=train_and_die, args=(line, moment))
    process.start()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    return any(folder.glob(".*checkpoint-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("base", "name"), list(zip(cycle(("sd3", "sd")), GRID, strict=False)))
def test_killed_and_resumed_equals_uninterrupted(world, base, name):
    sections, slug = GRID[name], name.replace(", ", "-").replace(" ", "-")
    whole, part = f"{slug}-whole", f"{slug}-part"
    seconds = finish(arguments(world, whole, base, sections))
    line, folder = arguments(world, part, base, sections), world / "runs" / part
    kill_in_a_checkpoint([*line, *LATEST], folder, 45)
    assert len(checkpoints(folder)) in range(1, 6), "a later run goes on from the middle"
    delay, moment = random.uniform(0.2, seconds), random.randint(1, 30)
    story = f"killed again after {delay} s and at moment {moment} of writing"
    kill_after([*line, *LATEST], delay)
    kill_in_a_checkpoint([*line, *LATEST], folder, moment)
    finish([*line, *LATEST])
    assert same(folder, world / "runs" / whole), story
    for key in ("loss", "learning_rate"):
        assert [a[key] for a in log(folder)] == [b[key] for b in log(world / "runs" / whole)], story
    assert not list(folder.glob(".*-*")), "what a kill left half written is swept away"


@pytest.mark.parametrize("base", ["sd", "sd3"])
def test_a_resumed_run_goes_on_at_its_learning_rate(world, base):
    train = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    finish(arguments(world, f"rate-{base}-whole", base, {"train": train}))
    line, folder = arguments(world, f"rate-{base}-part", base, {"train": train}), world / "runs" / f"rate-{base}-part"
    kill_in_a_checkpoint(line, folder, 30)  # while it warms up
    assert len(checkpoints(folder)) in (1, 2)
    finish([*line, *LATEST])
    assert same(folder, world / "runs" / f"rate-{base}-whole")


def test_the_command_killed_between_and_in_checkpoints(world):
    sections = GRID["dropout, average, spikes"]
    finish(arguments(world, "whole", "sd", sections))
    line, folder = arguments(world, "part", "sd", sections), world / "runs" / "part"
    process = subprocess.Popen(command(*line), cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "checkpoint-2").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before the kill"
    assert kill_in_a_checkpoint([*line, *LATEST], folder, 6), "the kill left something half written"
    finish([*line, *LATEST])
    assert same(folder, world / "runs" / "whole")
    assert [line["step"] for line in log(folder)] == list(range(1, 9))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_from_there(world, signum, code):
    name = f"signal-{code}"
    sections = {"train": {"max_train_steps": 400, "checkpointing_steps": 0, "logging_steps": 50}}
    line, folder = arguments(world, name, "sd", sections), world / "runs" / name
    process = subprocess.Popen(command(*line), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    _, said = process.communicate()
    assert process.returncode == code and "Traceback" not in said
    (saved,) = folder.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert f"stopped at step {step}; --train.resume_from_checkpoint latest goes on from there" in said
    sections["train"]["max_train_steps"] = step + 2
    finish([*arguments(world, name, "sd", sections), *LATEST])
    sections["train"]["resume_from_checkpoint"] = None
    finish(arguments(world, f"{name}-whole", "sd", sections))
    assert same(folder, world / "runs" / f"{name}-whole")
