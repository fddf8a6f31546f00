"""Optimiser states by name, through files; names of checkpoints; nothing half written is taken for whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffpref.checkpoint import checkpoints, discard, find_checkpoint, load_optimizer, optimizer_tensors, sweep


class Nested(torch.optim.AdamW):
    """Keeps its state as bitsandbytes does: a whole number, and tensors one level down, some shared."""

    table = torch.arange(4.0)

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            moment = state.get("inner", {}).get("moment", torch.zeros_like(p))
            state["inner"] = {"moment": 0.9 * moment + p.grad, "table": self.table}
            p.data.sub_(0.1 * state["inner"]["moment"] * state["step"])


def three(optimizer: type) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 2), "b.weight": (2, 5), "never.stepped": (1,)}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return parameters, optimizer(parameters.values(), lr=0.1)


def steps(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        for name, p in parameters.items():
            p.grad = None if name == "never.stepped" and isinstance(optimizer, torch.optim.SGD) else p.detach().sin()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Nested, torch.optim.SGD])
def test_optimiser_states_go_through_a_file(optimizer, tmp_path):
    parameters, whole = three(optimizer)
    steps(parameters, whole, 3)
    tensors = optimizer_tensors(whole, list(parameters))
    save_file(tensors, tmp_path / "optimizer.safetensors")
    fresh, part = three(optimizer)
    for name, p in parameters.items():
        fresh[name].data.copy_(p)
    load_optimizer(part, fresh, load_file(tmp_path / "optimizer.safetensors"))
    steps(parameters, whole, 3), steps(fresh, part, 3)
    assert all(torch.equal(p, fresh[name]) for name, p in parameters.items())


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "state.json").write_text("{}")
    return path


def test_the_newest_is_by_number_and_what_is_none_is_passed_over(tmp_path):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # without a state: not one of ours
    (tmp_path / ".checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None


@pytest.mark.parametrize("name", ["checkpoint-11", "checkpoint-best", "other"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is not a checkpoint; give 'latest' or a folder checkpoint-<step>"):
        find_checkpoint(tmp_path, str(tmp_path / name))


def test_what_a_kill_left_is_swept(tmp_path):
    kept = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6).rename(tmp_path / ".checkpoint-6")
    checkpoint(tmp_path, 2).rename(tmp_path / ".discarded-checkpoint-2")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    discard(kept)
    assert not list(tmp_path.iterdir())
