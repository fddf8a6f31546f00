"""The reference's errors kept on disk, through the real runs: who asks the reference, and what it changes."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import CONTEXT, torchrun
from tiny_runs import PAIRS, command, distance, make_world, run, same, settings, train_and_die

from diffpref.config import load_config
from diffpref.data import training_loader
from diffpref.errors import item_errors
from diffpref.gradient_cache import Item
from diffpref.predict import Models
from diffpref.reference_cache.table import TableFiles
from diffpref.trainer import Trainer

STEPS = 8  # of two of seven pairs each: every pair twice, both of its draws
MOVING = {"center_crop": False, "random_flip": True}
SHORT = {  # timesteps in strata, and errors have weights
    "train": {"max_train_steps": STEPS, "train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3},
    "data": {"caption_dropout": 0.5},
    "noise": {"stratified": True},
    "objective": {"error_space": "sample"},
    "reference": {"draws": 2},
    "sample": {"prompts": []},
}


def kept(folder: Path, **sections) -> dict:
    """Sections of a run with two draws of each pair, their errors in a cache folder."""
    both = {key: SHORT.get(key, {}) | sections.get(key, {}) for key in SHORT | sections}
    return both | {"cache": sections.get("cache", {}) | {"folder": str(folder)}}


@pytest.fixture
def asked(monkeypatch) -> list:
    """A line for every pass of the reference."""
    passes, reference = [], Models.reference

    def counted(self, *inputs) -> torch.Tensor:
        passes.append(len(inputs[0]))
        return reference(self, *inputs)

    monkeypatch.setattr(Models, "reference", counted)
    return passes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("kept"), ("sd",))


@pytest.fixture(scope="module")
def trained(world) -> Trainer:
    """The trainer of the first run, which finds nothing, at its end."""
    trainer = Trainer(load_config(settings(world, "first", **kept(world / "shared"))))
    trainer.run()
    return trainer


def test_the_first_run_asks_once_for_each_draw(trained):
    """The eighth step is of the third epoch, whose draws are those of the first."""
    report = json.loads((trained.config.run_dir / "report.json").read_text())
    assert report["reference_draws"] == {"found": 0, "kept": 28, "passes_made": 7, "passes_saved": 1}


def test_another_run_asks_never_and_ends_with_the_same_weights(world, trained, asked, capfd):
    """Of another objective, β, error space and rate: with the table of the first run, and with one that it makes."""
    objective = {"name": "ipo", "beta": 100.0, "error_space": "model"}
    sections = {"train": SHORT["train"] | {"learning_rate": 3e-3}, "objective": objective}
    report, _, warm = run(world, "warm", **kept(world / "shared", **sections))
    assert report["reference_draws"] == {"found": 28, "kept": 28, "passes_made": 0, "passes_saved": STEPS}
    assert not asked and f"{STEPS} of {STEPS} passes of the reference saved; 28 errors" in capfd.readouterr().out
    report, _, cold = run(world, "cold", **kept(world / "fresh", **sections))
    assert report["reference_draws"]["found"] == 0 and asked == [4] * 7
    assert same(warm, cold) and not same(warm, trained.config.run_dir)


def test_a_run_with_cached_latents_and_text_finds_what_one_without_has_kept(world, trained, asked):
    report, _, _ = run(world, "cached", **kept(world / "shared", cache={"latents": True, "text": True}))
    assert report["reference_draws"]["passes_made"] == 0 and not asked


def test_a_killed_run_ends_as_one_that_was_not(world, trained):
    """Killed while it wrote the checkpoint of step 6; what the table has beyond step 3 is found again."""
    train = {"checkpointing_steps": 3}
    arguments = settings(world, "killed", **kept(world / "killed", train=train))
    process = CONTEXT.Process(target=train_and_die, args=(arguments, 25))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train["resume_from_checkpoint"] = "latest"
    report, _, folder = run(world, "killed", **kept(world / "killed", train=train))
    assert report["resumed_from_step"] == 3 and report["reference_draws"]["found"] > 12
    assert same(folder, trained.config.run_dir)


def test_two_processes_keep_what_each_has_found(world, trained):
    """Half of each batch for each of them, in two passes and the second item by item: the same errors in the end, and
    the same weights but for rounding."""
    train = {"train_batch_size": 1, "gradient_cache": 1}
    done = torchrun(2, command(*settings(world, "two", **kept(world / "two", train=train))))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"1 of {2 * STEPS} passes" in done.stdout or f"2 of {2 * STEPS} passes" in done.stdout
    place, ours = next((world / "two").glob("reference-*")), trained.learner.table
    found = TableFiles(place, len(ours.known)).read()
    torch.testing.assert_close(torch.from_numpy(found), ours.values, rtol=1e-6, atol=0)
    assert distance(world / "runs" / "two", trained.config.run_dir) < 1e-3  # Adam makes steps of rounding


def prepared(trainer: Trainer, seed: int, epochs: range, **cutting: bool) -> dict[int, Item]:
    """Key of a row's draw -> the row, ready for the models: some epochs in the order of a seed, one row a batch."""
    train = replace(trainer.config.train, train_batch_size=1, max_train_steps=PAIRS * epochs.stop)
    config = replace(trainer.config, train=train, data=replace(trainer.config.data, **cutting))
    place = {"start": PAIRS * epochs.start, "rank": 0, "world": 1}
    loader = training_loader(trainer.checked.rows, trainer.sizes, config, seed=seed, draws=2, **place)
    return {batch.keys[0]: trainer.learner.prepare(batch) for batch in loader}


@pytest.mark.parametrize("cutting", [{}, MOVING], ids=["still", "moving"])
def test_a_draw_is_the_same_in_every_run_and_every_second_epoch(trained, asked, cutting):
    """Crop, mirroring, dropped caption, the VAE's draw, timestep and noise; and so its error is known."""
    one, other = prepared(trained, 0, range(2), **cutting), prepared(trained, 7, range(2, 4), **cutting)
    assert sorted(one) == sorted(other) == list(range(2 * PAIRS)) and not asked
    for key, (encoded, noised) in one.items():
        assert all(torch.equal(value, vars(other[key][1])[name]) for name, value in vars(noised).items())
        assert torch.equal(encoded.conditioning["prompt_embeds"], other[key][0].conditioning["prompt_embeds"])
    levels = [one[key][1].level[0].item() for key in range(2 * PAIRS)]
    assert len(set(levels)) == 2 * PAIRS  # other rows and draws have others
    strata = [{int(2 * level) for level in levels[row : row + 2]} for row in range(0, 2 * PAIRS, 2)]
    assert strata == [{0, 1}] * PAIRS  # a row's draws lie one in each half of the timesteps


def test_what_is_kept_is_the_references_error(trained):
    """mean (r − y)² in float64, without the timestep's weight, whatever the policy has become."""
    for encoded, noised in prepared(trained, 0, range(2)).values():
        base = trained.learner.models.reference(noised.x_t, noised.t, encoded.conditioning)
        expected = (base.double() - noised.target.double()).square().flatten(1).mean(1)
        torch.testing.assert_close(noised.reference_error.double(), expected, rtol=5e-7, atol=0)
        assert noised.reference_error.dtype == torch.float32 and noised.weight.min() != 1


def logits(advantage: torch.Tensor) -> torch.Tensor:
    """Of a pair, at β = 5000."""
    return 2500 * (advantage[0] - advantage[1])


@torch.no_grad()
def test_the_logit_is_that_of_both_predictions_to_three_digits(trained):
    """In the model's own space, beside float64: the difference of two fp32 means, and the fused difference, which is
    far closer. Mean over all draws."""
    learner, found = trained.learner, []
    for encoded, weighted in prepared(trained, 0, range(2)).values():
        noised = replace(weighted, weight=torch.ones(2))
        policy, base = learner.predictions((encoded, replace(noised, reference_error=None)))
        kept = learner.errors(noised, encoded.structure, policy, None).advantage
        fused = item_errors(policy, base, noised.target, noised.weight).advantage
        p, r, y = policy.double(), base.double(), noised.target.double()
        exact = logits(((r - p) * (p + r - 2 * y)).flatten(1).mean(1))
        found.append([abs(logits(kept.double()) - exact), abs(logits(fused.double()) - exact), abs(exact)])
    kept, fused, size = torch.tensor(found).mean(0).tolist()
    assert fused < kept < 1e-3 and size > 0.1
