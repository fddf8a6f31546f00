"""The log's sums and the alarm for rising winners' error."""

import json
import math

import pytest
import torch

from diffpref.batch import Errors, Structure
from diffpref.metrics import Window, append_line, step_metrics, truncate_lines


def test_window_by_hand():
    """Values 1, 2, 6 in two steps: mean 3, variance (1+4+36)/3 − 9 = 14/3, standard error sqrt(14/9)."""
    window = Window()
    window.add({"a": torch.tensor([1.0, 2.0]), "empty": torch.tensor([])})
    window.add({"a": torch.tensor([6.0])})
    mean, error, count = window.close(lambda totals: totals)["a"]
    assert (mean, count) == (3.0, 3) and error == pytest.approx(math.sqrt(14 / 9))
    window.add({"a": torch.tensor([5.0])})
    assert window.close(lambda totals: totals) == {"a": (5.0, 0.0, 1)}


def test_window_over_ranks_is_the_window_of_all_values():
    """Two ranks: the reduction adds their sums."""
    ranks = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    windows = [Window() for _ in ranks]
    collected = []
    for window, values in zip(windows, ranks, strict=True):
        window.add({"a": values})
        window.close(lambda totals: (collected.append(totals), totals)[1])
    together = Window()
    together.add({"a": torch.cat(ranks)})
    windows[0].add({"a": ranks[0]})
    assert windows[0].close(lambda _: sum(collected))["a"] == pytest.approx(together.close(lambda t: t)["a"])


def test_accuracies_fall_into_quarters_of_the_schedule():
    structure = Structure(torch.tensor([0, 1, 0, 1]), torch.tensor([[0, 2], [1, 3]]), torch.ones(2))
    level = torch.tensor([0.1, 0.9, 0.1, 0.9])
    errors = Errors(torch.ones(4), torch.tensor([1.0, -1.0, 0.0, 0.0]))
    metrics = step_metrics(errors, level, structure, torch.zeros(2), beta=1.0)
    window = Window()
    window.add(metrics)
    bins = {key: found[::2] for key, found in window.close(lambda t: t).items() if key.startswith("accuracies/")}
    assert bins == {"accuracies/t0": (1.0, 1), "accuracies/t3": (0.0, 1)}, "mean and count; empty quarters are left out"


def test_lines_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    truncate_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]
