"""One pass and two give one gradient; held-out ranking by hand."""

import numpy as np
import pytest
import torch
from tiny_runs import distance, log, make_world, run, settings

from diffpref.config import load_config
from diffpref.heldout import Ranks, ideal, noise_scale, share
from diffpref.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("learner"), ("sd", "sd3"))


def gradients(world, name: str, base: str = "sd", **sections) -> tuple[torch.Tensor, float]:
    """The gradient of the first optimiser step after one step at a high rate, and the loss."""
    sections = {"train": {"max_train_steps": 2, "learning_rate": 1e-2}, "sample": {"prompts": []}} | sections
    sections["train"] = {"max_train_steps": 2, "learning_rate": 1e-2} | sections["train"]
    trainer = Trainer(load_config(settings(world, name, base, **sections, overwrite=True)))
    stepped = []
    step = trainer.loop.step

    def look() -> None:
        stepped.append(torch.cat([p.grad.flatten().clone() for p in trainer.denoiser.parameters() if p.requires_grad]))
        step()

    trainer.loop.step = look
    trainer.run()
    return stepped[-1], log(trainer.config.run_dir)[-1]["loss"]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "dpo", "beta": 500.0},
        {"name": "dpo", "beta": 500.0, "safeguard": 0.5, "sft_weight": 0.1, "drift_weight": 0.2},
        {"name": "dspo", "beta": 0.5},
        {"name": "kto", "beta": 500.0},
        {"name": "mapo", "beta": 8.0},
    ],
    ids=lambda o: "+".join([o["name"], *[k for k in o if k not in ("name", "beta")]]),
)
@pytest.mark.parametrize("items", [1, 3])
def test_two_passes_give_the_gradient_of_one(world, objective, items):
    """Chunks of 1 and 3 of the 4 items of a batch. The weights were moved by a step before, so the losses differ from
    those at policy = reference."""
    whole, loss = gradients(world, "whole", objective=objective)
    cached, same_loss = gradients(world, f"cached-{items}", objective=objective, train={"gradient_cache": items})
    assert whole.abs().max() > 0 and relative(cached, whole) < 1e-5
    assert same_loss == pytest.approx(loss, rel=1e-5)


def test_two_passes_on_a_flow_transformer(world):
    objective = {"name": "dpo", "beta": 500.0, "error_space": "epsilon"}
    whole, _ = gradients(world, "flow", "sd3", objective=objective)
    cached, _ = gradients(world, "flow-cached", "sd3", objective=objective, train={"gradient_cache": 1})
    assert relative(cached, whole) < 1e-5


@pytest.mark.parametrize("name", ["kto", "rpo"])
def test_a_coupled_objective_sees_all_accumulated_batches(world, name):
    """Four pairs at once, and one by one: the baseline and the losers of other prompts are those of the step."""
    objective = {"name": name, "beta": 500.0}
    at_once, loss = gradients(world, "at-once", objective=objective, train={"train_batch_size": 4})
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    apart, same_loss = gradients(world, "apart", objective=objective, train=split)
    assert relative(apart, at_once) < 1e-5 and same_loss == pytest.approx(loss, rel=1e-5)


def test_one_by_one_would_be_another_gradient(world, monkeypatch):
    """The test above can fail: with the baseline of each pair alone, it does."""
    objective = {"name": "kto", "beta": 500.0}
    at_once, _ = gradients(world, "at-once", objective=objective, train={"train_batch_size": 4})
    monkeypatch.setattr("diffpref.learner.is_coupled", lambda objective: False)
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    apart, _ = gradients(world, "alone", objective=objective, train=split)
    assert relative(apart, at_once) > 1e-3


def test_a_run_in_two_passes_ends_where_one_pass_does(world):
    train = {"adam_epsilon": 1e-4, "learning_rate": 1e-4, "gradient_accumulation_steps": 2}
    _, _, one = run(world, "one-pass", train=train)
    _, _, two = run(world, "two-passes", train=train | {"gradient_cache": 1})
    assert distance(one, two) < 1e-6


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"gradient_cache": 1}, "lora": {"dropout": 0.1}}, "lora.dropout would make the two differ"),
        (
            {
                "objective": {"name": "kto"},
                "train": {"gradient_accumulation_steps": 2},
                "lora": {"dropout": 0.1},
            },
            "objective.name kto, which couples the groups of all batches.*set it to 0",
        ),
    ],
)
def test_dropout_and_two_passes_are_refused(world, sections, message):
    sections["model"] = {"pretrained_model_name_or_path": "nowhere"}  # not looked for
    with pytest.raises(ValueError, match=message):
        Trainer(load_config(settings(world, "refused", **sections)))


# --- held-out preferences -------------------------------------------------------------------------------------------


def test_held_out_numbers_by_hand():
    """β = 1000. Pair 1: A = (2e-3, 1e-3), e = (0.3, 0.4); pair 2: A = (-1e-3, 1e-3), e = (0.5, 0.2).

    Margins 500·(1e-3, -2e-3) = 0.5, -1. e_ref = e + A: (0.302, 0.401), (0.499, 0.201); in units of the logit
    500·(0.099, -0.298) = 49.5, -149. With p = (0.9, 1): logit p = 2.2, ∞: both are ranked right ideally."""
    ranks = Ranks(
        np.array([[0.3, 0.4], [0.5, 0.2]]),
        np.array([[2e-3, 1e-3], [-1e-3, 1e-3]]),
        np.array([0.9, 1.0]),
        ["a", "b"],
    )
    assert ranks.numbers(1000.0) == pytest.approx(
        {
            "validation/accuracies": 0.5,
            "validation/margins": -0.25,
            "validation/drift_chosen": -0.5e-3,
            "validation/drift_rejected": -1e-3,
            "validation/rankings": 0.5,
            "validation/rankings_reference": 0.5,
            "validation/rankings_ideal": 1.0,
        }
    )
    assert ranks.accuracy(0.95).value == 0.5


def test_without_probabilities_there_is_no_ideal():
    ranks = Ranks(np.array([[0.3, 0.4]]), np.array([[2e-3, 1e-3]]), None, ["a"])
    assert "validation/rankings_ideal" not in ranks.numbers(1000.0)


def test_a_strong_reference_bounds_the_ideal():
    """logit 0.9 = 2.197: a reference that prefers the loser by more than 2.197/(β/2) is not turned round."""
    reference = np.array([[0.3, 0.3 - 2.0 / 500], [0.3, 0.3 - 2.5 / 500]])
    assert ideal(reference, np.array([0.9, 0.9]), 1000.0) == 0.5
    assert share(np.array([1.0, 0.0, -2.0, 3.0])) == 0.625


def test_noise_scale_by_hand():
    """Gradients (3, 1), (1, 1): mean (2, 1), variances 2 and 0; |mean|² − 2/2 = 4."""
    found = noise_scale(torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert found == {"gradient/variance": 2.0, "gradient/squared": 4.0, "gradient/noise_scale": 0.5}
    assert "gradient/noise_scale" not in noise_scale(torch.tensor([[1.0], [-1.0]])), "JSON has no infinity"


def test_held_out_pairs_are_ranked_at_validation_and_in_the_report(world):
    """The training pairs as held-out ones. What is measured at the end is what the report has."""
    data = {"validation": str(world / "pairs.parquet"), "validation_groups": 5, "validation_draws": 3}
    sample = {"prompts": [], "validation_steps": 4}
    train = {"max_train_steps": 12, "learning_rate": 3e-3, "gradient_noise_draws": 3}
    report, lines, _ = run(world, "held-out", data=data, sample=sample, train=train, objective={"beta": 2000.0})
    noted = [line for line in lines if "validation/accuracies" in line]
    assert [line["step"] for line in noted] == [4, 8, 12]
    assert all(line["gradient/variance"] > 0 for line in noted)
    for name in ("accuracies", "margins", "drift_chosen", "rankings"):
        assert report["validation"][name] == noted[-1][f"validation/{name}"]
    assert len({line["validation/margins"] for line in noted}) == 3, "the policy moves"
    assert report["validation"]["pairs"] == 5


def test_held_out_numbers_do_not_disturb_the_training(world):
    data = {"validation": str(world / "pairs.parquet")}
    _, _, plain = run(world, "plain", sample={"prompts": []})
    _, _, watched = run(world, "watched", data=data, sample={"prompts": [], "validation_steps": 1})
    assert distance(plain, watched) == 0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("nowhere.parquet", FileNotFoundError, "data.validation: no data set at 'nowhere.parquet'"),
        ("a_folder", FileNotFoundError, "data.validation"),
    ],
)
def test_held_out_data_that_are_not_there(world, value, error, message):
    """Said before the model is looked for, which is not there either."""
    sections = {"data": {"validation": value}, "model": {"pretrained_model_name_or_path": "nowhere"}}
    with pytest.raises(error, match=message):
        Trainer(load_config(settings(world, "absent", **sections)))
