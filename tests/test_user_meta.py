"""An encoder of users is trained over people: through the real command, in one go or in pieces."""

import json
import math
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_people import EACH, PEOPLE, arguments, choices_of, make_people, stream

from diffpref.config import DataConfig
from diffpref.data import load_preferences
from diffpref.interrupt import Stopped
from diffpref.users.choices import Choices
from diffpref.users.encoder import UserEncoder
from diffpref.users.meta.config import load_encoder_config
from diffpref.users.meta.trainer import UserEncoderTrainer, split_persons

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def choices(world) -> Choices:
    """Of all people."""
    return choices_of(world)


def trainer_of(world: Path, name: str, *options: str, **sections: Any) -> UserEncoderTrainer:
    return UserEncoderTrainer(load_encoder_config([*arguments(world, name, **sections), *options]))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "user_encoder" / "user_encoder.safetensors")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_the_command_learns_to_read_tastes(world):
    """Of new people: half of them like what the others do not, so that four choices tell what none can."""
    options = {"train": {"max_train_steps": 40, "train_batch_size": 12, "learning_rate": 3e-2, "logging_steps": 5}}
    given = arguments(world, "command", **options, episodes={"held_out": 0.3, "support": [0, 4]})
    line = [sys.executable, "-m", "diffpref.cli", "user", "train", *given]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    run = world / "runs" / "command"
    report, log = json.loads((run / "report.json").read_text()), lines(run)
    seen = {int(n): found["value"] for n, found in report["accuracy_by_choices_seen"].items()}
    assert list(seen) == [0, 1, 2, 4, 8, 16] and seen[0] < 0.75 and seen[4] > 0.95 and seen[1] > seen[0] + 0.1
    assert report["users"] + report["users_held_out"] == PEOPLE and report["users_held_out"] >= 5
    assert report["choices"] == PEOPLE * EACH and report["steps"] == 40
    assert log[-1]["loss"] < math.log(2) / 2 and 0.75 < log[-1]["accuracy"] <= 1
    encoder = UserEncoder.from_pretrained(run / "user_encoder")
    assert encoder.id == report["encoder"] and "seen  4 choices of a new user: right in" in done.stdout
    assert encoder.scorer().embed(prompts=["red"]).prompts.shape == (1, encoder.settings["features"])


def test_going_on_after_ctrl_c_equals_not_stopping(world):
    """With an average, accumulation and dispersion, the log and the weights are the same to the bit."""
    steps = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "ema_decay": 0.9, "checkpointing_steps": 50}
    sections = {"train": steps, "episodes": {"dispersion": 0.3}}
    whole = trainer_of(world, "whole", **sections)
    whole.run()
    trainer, taken = trainer_of(world, "parts", **sections), []
    step = trainer.loop.step

    def interrupted() -> None:
        step()
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)

    trainer.loop.step = interrupted
    with pytest.raises(Stopped, match="stopped at step 3; --train.resume_from_checkpoint latest goes on from there"):
        trainer.run()
    folder = trainer.config.run_dir
    assert (folder / "checkpoint-3" / "user_encoder").is_dir() and not (folder / "report.json").exists()
    report = trainer_of(world, "parts", "--train.resume_from_checkpoint", "latest", **sections).run()
    one, other = weights(whole.config.run_dir), weights(folder)
    assert report["steps"] == 5 and all(torch.equal(one[key], other[key]) for key in one)
    assert UserEncoder.from_pretrained(folder / "user_encoder").id == report["encoder"]
    assert UserEncoder.from_pretrained(folder / "checkpoint-3" / "user_encoder").id != report["encoder"]
    assert [x["loss"] for x in lines(folder)] == [x["loss"] for x in lines(whole.config.run_dir)]


def test_accumulated_gradients_are_the_mean_of_the_batches(world, choices):
    steps = {"max_train_steps": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 1e9}
    trainer, found = trainer_of(world, "accumulate", train=steps), {}
    step, task = trainer.loop.step, trainer.loop.policy

    def watched() -> None:
        found.update({name: p.grad.clone() for name, p in task.named_parameters()})
        persons = split_persons(choices, 0.3)[0]
        batches = stream(choices, persons, batches=3, size=8, support=(0, 6), query=4)
        losses = [task(episodes)[0] for episodes in batches]
        names = dict(task.named_parameters())
        expected = torch.autograd.grad(sum(losses) / 3, list(names.values()))
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
        step()

    trainer.loop.step = watched
    trainer.run()
    assert len(found) == 3 and all(gradient.abs().max() > 0 for gradient in found.values())


def test_autocast_does_not_reach_the_steps(world, choices):
    """Features are rounded as everywhere; the equations are solved as without it."""
    trainer = trainer_of(world, "half")
    episodes = next(iter(stream(choices, list(choices.of), size=8)))
    whole, _ = trainer.loop.policy(episodes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = trainer.loop.policy(episodes)
    half.backward()
    assert half.item() == pytest.approx(whole.item(), rel=0.05) and half.item() != whole.item()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trainer.encoder.parameters())


def test_people_are_held_out_by_their_names(choices):
    kept, out = split_persons(choices, 0.3)
    assert sorted(kept + out) == sorted(choices.of) and 5 <= len(out) <= 15
    fewer = pickle.loads(pickle.dumps(choices))
    del fewer.of[kept[0]]
    assert split_persons(fewer, 0.3) == (kept[1:], out)
    fewer.of[kept[1]] = fewer.of[kept[1]][:1]  # one choice says nothing of others
    assert split_persons(fewer, 0.3)[0] == kept[2:]
    fewer.of = {person: choices.of[person] for person in (*out, kept[0])}
    with pytest.raises(ValueError, match=f"1 users with choices on two prompts or more .* {len(out)} held out"):
        split_persons(fewer, 0.3)


def test_a_feature_that_never_changes_keeps_its_unit(world, choices):
    """A channel that is dead in training pictures must not be blown up when it wakes."""
    trainer, dead = trainer_of(world, "dead"), pickle.loads(pickle.dumps(choices))
    dead.table[:, 3] = 0.25
    trainer.standardise(dead, list(dead.of))
    pictures = dead.table[np.unique(dead.index[:, 1:])]
    torch.testing.assert_close(trainer.encoder.mean, pictures.mean(0))
    assert trainer.encoder.deviation[3] == 1
    others = torch.arange(dead.width) != 3
    torch.testing.assert_close(trainer.encoder.deviation[others], pictures.std(0)[others])


MISTAKES = [
    ({"encoder": {"levels": -1}}, "encoder.levels"),
    ({"encoder": {"rank": 0}}, "encoder.rank must be positive"),
    ({"encoder": {"levels": 9}}, "the image tower has 2 levels of features, not 9"),
    ({"encoder": {"towers": "nowhere"}}, "nowhere"),
    ({"episodes": {"support": [3, 1]}}, "episodes.support must be fewest and most, none negative"),
    ({"episodes": {"support": [0, 0]}}, "episodes.support must be fewest and most, none negative"),
    ({"episodes": {"query": 0}}, "episodes.query must be positive"),
    ({"episodes": {"dispersion": -1.0}}, "episodes.dispersion"),
    ({"episodes": {"temperature": 0.0}}, "episodes.temperature must be positive"),
    ({"episodes": {"held_out": 1.5}}, "episodes.held_out"),
    ({"episodes": {"held": 0.5}}, "held_out"),
    ({"data": {"resolution": 64}}, "an encoder's towers prepare pictures in their own way"),
    ({"data": {"streaming": True}}, "data.streaming passes rows once; an encoder of users needs all choices"),
    ({"data": {"random_flip": True}}, "data.random_flip: a choice is read as it was made"),
    ({"data": {"path": "nowhere.parquet"}}, "nowhere.parquet"),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES)
def test_a_mistake_is_named(world, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer_of(world, "mistake", **sections)


def test_data_without_people_are_refused(world):
    rows = load_preferences(DataConfig(str(world / "pairs.parquet")))
    rows.remove_columns("user_id").to_parquet(world / "nameless.parquet")
    with pytest.raises(ValueError, match="data.path: there is no column user_id .*; add it"):
        trainer_of(world, "nameless", data={"path": str(world / "nameless.parquet")}).run()
    rows.select(range(EACH)).to_parquet(world / "one.parquet")
    with pytest.raises(ValueError, match=r"1 users with choices on two prompts .*\(1 are named, 0 held out\)"):
        trainer_of(world, "one", data={"path": str(world / "one.parquet")}, episodes={"held_out": 0.0}).run()
