"""Two and four processes, DDP and FSDP2, on the CPU: the same groups, so the same weights."""

import subprocess
from pathlib import Path

import pytest
from forked import torchrun as as_torchrun
from tiny_runs import command, distance, log, make_world, run, settings, torchrun, weights

STEPS = 20
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
# Adam turns the rounding of a gradient near zero into a whole step; with an epsilon above the rounding it does not.
EVEN = {"adam_epsilon": 1e-4, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), ("sd",))


def split(processes: int, accumulation: int = 1) -> dict:
    """Four pairs a step, however they are split; pictures at the end, and a checkpoint on the way."""
    return {
        "train": {
            "max_train_steps": STEPS,
            "checkpointing_steps": 10,
            "train_batch_size": 4 // processes // accumulation,
            "gradient_accumulation_steps": accumulation,
            "ema_decay": 0.9,
        }
        | EVEN,
        "judge": {"judge": "tiny_runs.brightness"},
    }


def forked(processes: int, *arguments: str, **engine: str) -> subprocess.CompletedProcess:
    """As torchrun starts them, without its seconds of imports."""
    return as_torchrun(processes, command(*arguments), **engine)


@pytest.fixture(scope="module")
def alone(world) -> Path:
    """The folder of the run in one process."""
    return run(world, "alone", **split(1))[2]


def test_accumulation_equals_a_larger_batch(world, alone):
    _, _, folder = run(world, "accumulated", **split(1, 4))
    assert distance(folder, alone) < 1e-6


@pytest.mark.parametrize(
    ("start", "processes", "engine"),
    [(torchrun, 2, {}), (forked, 4, {}), (forked, 2, FSDP2)],
    ids=["ddp-2", "ddp-4", "fsdp2-2"],
)
def test_processes_equal_one(world, alone, start, processes, engine):
    name = f"{'fsdp' if engine else 'ddp'}-{processes}"
    done = start(processes, *settings(world, name, **split(processes)), **engine)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = world / "runs" / name
    assert distance(folder, alone) < 1e-6
    assert done.stdout.count("win rate vs base") == 1, "one process judges"
    lines, expected = log(folder), log(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-3), "reduced over all processes"
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert (folder / "checkpoint-10" / "random_1.safetensors").exists(), "every process writes its part"
    assert weights(folder / "checkpoint-10").keys() == weights(folder).keys()


@pytest.mark.slow
def test_a_run_goes_on_with_another_engine(world, alone):
    """Checkpoints hold whole weights: begun with two sharded processes, finished with one, and the other way round."""
    short = split(2)
    short["train"]["max_train_steps"] = 10
    done = forked(2, *settings(world, "moved", **short), **FSDP2)
    assert done.returncode == 0, done.stderr[-3000:]
    latest = {"resume_from_checkpoint": "latest"}
    _, _, folder = run(world, "moved", **(split(1) | {"train": split(1)["train"] | latest}))
    assert distance(folder, alone) < 1e-6


@pytest.mark.parametrize(("objective", "engine"), [("kto", FSDP2), ("rpo", {})], ids=["kto-fsdp2", "rpo-ddp"])
def test_a_coupled_objective_sees_the_groups_of_all_processes(world, objective, engine):
    """Baseline of the mean advantage (kto), losers of other prompts (rpo): those of the whole step, however it is
    split: over two processes, each with two batches and one item at a time."""
    settings_of = {"objective": {"name": objective, "beta": 500.0}, "sample": {"prompts": []}, "judge": {"judge": None}}
    whole, few = split(1) | settings_of, {"max_train_steps": 6, "checkpointing_steps": 0}
    whole["train"] |= few
    name = f"{objective}-{'fsdp' if engine else 'ddp'}"
    _, _, expected = run(world, f"{name}-alone", **whole)
    parts = split(2, 2) | settings_of
    parts["train"] |= few | {"gradient_cache": 1}
    done = forked(2, *settings(world, name, **parts), **engine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(world / "runs" / name, expected) < 1e-6
    assert log(world / "runs" / name)[-1]["loss"] == pytest.approx(log(expected)[-1]["loss"], rel=1e-5)


def test_held_out_pairs_and_gradient_noise_beside_two_processes(world, alone):
    """Measured in the middle of training, they leave it as it was."""
    watched = split(2)
    watched["train"] |= {"gradient_noise_draws": 2}
    watched |= {"data": {"validation": str(world / "pairs.parquet")}, "sample": {"validation_steps": 10}}
    done = forked(2, *settings(world, "watched", **watched))
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(world / "runs" / "watched", alone) < 1e-6
    noted = [line for line in log(world / "runs" / "watched") if "gradient/variance" in line]
    assert [line["step"] for line in noted] == [10, STEPS] and all(line["gradient/variance"] > 0 for line in noted)
    assert done.stdout.count("held-out accuracy") == 0, "one prompt has no interval"


def test_gradient_noise_is_refused_where_weights_are_sharded(world):
    noisy = split(2) | {"data": {"validation": str(world / "pairs.parquet")}}
    noisy["train"] |= {"gradient_noise_draws": 2}
    done = forked(2, *settings(world, "noisy", **noisy), **FSDP2)
    assert done.returncode != 0
    assert "train.gradient_noise_draws needs whole weights in each process" in done.stderr


def test_a_fault_of_one_process_ends_all(world):
    lost = settings(world, "lost", data={"path": "nowhere.parquet"})
    done = forked(2, *lost)
    assert done.returncode != 0
    assert "process 0: error: data.path: no data set at 'nowhere.parquet'" in done.stderr
