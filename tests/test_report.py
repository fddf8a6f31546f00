"""What a run leaves behind: pictures with the right pixels in the right place, strict JSON, a card that can be used."""

import json
import socket
from importlib.metadata import version

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffpref.config import Config, DataConfig, ModelConfig, SampleConfig, to_dict
from diffpref.figures import REJECTED, before_after, curves
from diffpref.report import environment, model_card, write_report
from diffpref.winrate import WinRate

# --- pictures ---------------------------------------------------------------------------------------------------------


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def opened(path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def area(sheet: Image.Image, colour) -> np.ndarray:
    """Mask [H,W] of the pixels of exactly one colour."""
    return (np.asarray(sheet) == np.array(colour)).all(-1)


def test_before_stands_left_of_after_at_the_same_height(tmp_path):
    before, after = [flat((200, 0, 0)), flat((201, 0, 0))], [flat((0, 200, 0)), flat((0, 201, 0))]
    before_after(before, after, ["cat", "dog"], tmp_path / "sheet.png", title="run", subtitle="win rate 0.5")
    sheet = opened(tmp_path / "sheet.png")
    for left, right in (((200, 0, 0), (0, 200, 0)), ((201, 0, 0), (0, 201, 0))):
        left_y, left_x = np.nonzero(area(sheet, left))
        right_y, right_x = np.nonzero(area(sheet, right))
        assert left_x.max() < right_x.min()
        assert set(left_y) == set(right_y)
        assert len(left_x) == len(right_x) == 128 * 128  # enlarged by a whole factor


def test_seeds_of_a_prompt_share_its_row(tmp_path):
    """Prompts come interleaved: a b a b. Row a holds items 0 and 2, row b items 1 and 3."""
    before = [flat((10 + i, 0, 0)) for i in range(4)]
    before_after(before, before, ["a", "b", "a", "b"], tmp_path / "sheet.png", labels=("1", "2"))
    sheet = opened(tmp_path / "sheet.png")
    rows = [tuple(sorted(set(np.nonzero(area(sheet, (10 + i, 0, 0)))[0]))) for i in range(4)]
    assert rows[0] == rows[2] and rows[1] == rows[3] and rows[0] != rows[1]


def test_marks_tell_better_from_worse(tmp_path):
    pictures, worse = [flat((9, 9, 9))] * 2, tuple(bytes.fromhex(REJECTED[1:]))
    before_after(pictures, pictures, ["a", "b"], tmp_path / "plain.png")
    before_after(pictures, pictures, ["a", "b"], tmp_path / "won.png", scores=(np.zeros(2), np.ones(2)))
    before_after(pictures, pictures, ["a", "b"], tmp_path / "lost.png", scores=(np.zeros(2), np.array([-1, 1])))
    plain, won, lost = (area(opened(tmp_path / f"{n}.png"), worse).sum() for n in ("plain", "won", "lost"))
    assert plain == 0
    assert lost - won == pytest.approx(4 * 3 * 128, rel=0.1)  # one frame of three pixels; the legend has one either way


def test_large_pictures_shrink_and_keep_their_shape(tmp_path):
    pictures = [flat((200, 0, 0), (512, 768))]
    before_after(pictures, [flat((0, 0, 0), (512, 768))], ["a long prompt, " * 30], tmp_path / "sheet.png")
    y, x = np.nonzero(area(opened(tmp_path / "sheet.png"), (200, 0, 0)))
    assert (np.ptp(x) + 1, np.ptp(y) + 1) == (256, 384)


def test_what_does_not_fit_is_left_out_in_order(tmp_path):
    before = [flat((i, 0, 99)) for i in range(20)]
    before_after(before, before, [f"p{i // 5}" for i in range(20)], tmp_path / "s.png", max_prompts=3, max_seeds=2)
    sheet = opened(tmp_path / "s.png")
    assert [i for i in range(20) if area(sheet, (i, 0, 99)).any()] == [0, 1, 5, 6, 10, 11]


def test_a_sheet_needs_pairs(tmp_path):
    with pytest.raises(ValueError, match="1 pictures before, 2 after and 1 prompts"):
        before_after([flat((0, 0, 0))], [flat((0, 0, 0))] * 2, ["a"], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="0 pictures"):
        before_after([], [], [], tmp_path / "sheet.png")


def metrics(tmp_path, lines: list[dict]):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("count", [1, 2, 100])
def test_curves_of_short_and_long_runs(tmp_path, count):
    full = {"loss": 0.7, "rewards/accuracies": 0.5, "rewards/chosen": 0.1, "drift/chosen": -1e-5, "learning_rate": 1e-4}
    lines = [{"step": i, **full} | ({"accuracies/t0": 0.5} if i % 2 else {}) for i in range(count)]
    curves(metrics(tmp_path, lines), tmp_path / "curves.png", title="run")
    assert opened(tmp_path / "curves.png").width > 1000


def test_curves_draw_whatever_there_is(tmp_path):
    curves(metrics(tmp_path, [{"step": 1, "loss": 1.0, "new/metric": 3}]), tmp_path / "curves.png")
    assert opened(tmp_path / "curves.png").width < 600
    with pytest.raises(ValueError, match="no metrics to draw"):
        curves(metrics(tmp_path, [{"step": 1, "seconds": 1.0}]), tmp_path / "curves.png")


# --- report.json ------------------------------------------------------------------------------------------------------

RATE = WinRate(0.74, 0.66, 0.81, 144, 3, 36, 0.95)


def test_report_holds_what_it_was_given(tmp_path):
    report = {"win_rate": RATE, "steps": np.int64(7), "scores": np.ones(2), "path": tmp_path, "none": None, "ok": True}
    write_report(tmp_path / "report.json", report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == {
        "win_rate": RATE.as_dict(), "steps": 7, "scores": [1.0, 1.0], "path": str(tmp_path), "none": None, "ok": True,
    }  # fmt: skip
    assert found["win_rate"]["low"] == 0.66


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, -np.inf])])
def test_report_refuses_what_is_not_finite_and_keeps_the_old_file(tmp_path, bad):
    write_report(tmp_path / "report.json", {"steps": 1})
    with pytest.raises(ValueError, match=r"measures\.recognition\.after"):
        write_report(tmp_path / "report.json", {"measures": {"recognition": {"after": bad}}})
    assert json.loads((tmp_path / "report.json").read_text()) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_report_refuses_what_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match=r"judge: a report cannot hold a function"):
        write_report(tmp_path / "report.json", {"judge": flat})


def test_environment_names_versions_and_machine():
    found = environment()
    assert found["torch"] == version("torch") and found["diffpref"]
    assert "core" in found["hardware"] or " x " in found["hardware"]


# --- model card -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model card reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def settings(base: str, tuning: str = "lora", prompts=("red cat",)) -> dict:
    model = ModelConfig(base, tuning=tuning)
    data, sample = DataConfig("pairs"), SampleConfig(prompts=list(prompts))
    return to_dict(Config(name="night-owl", model=model, data=data, sample=sample))


def test_card_says_what_it_is_and_what_it_won(tmp_path, no_network):
    flat((0, 0, 0)).save(tmp_path / "before_after.png")
    measures = {"recognition": {"before": 0.9, "after": 0.875}}
    report = {"win_rate": RATE.as_dict(), "judge": "a.b", "measures": measures, "groups_seen": 800}
    model_card(tmp_path, settings("someone/model"), report | {"environment": environment()})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == "someone/model"
    assert card.data.tags == ["text-to-image", "diffusers", "diffusers-training", "lora", "dpo"]
    for text in (
        "0.74 [0.66, 0.81], n=144, 3 ties", "| recognition | 0.900 | 0.875 |", "5000", "(β/2)·(A_chosen − A_rejected)",
        "](before_after.png)", 'pipe.load_lora_weights("path/to/this/folder")', "`a.b`", f"torch {version('torch')}",
    ):  # fmt: skip
        assert text in card.text
    assert "curves.png" not in card.text and "TODO" not in card.text and "None" not in card.text


def test_card_of_a_run_without_judge_or_lora(tmp_path, no_network):
    """A base on this disk is no hub id; a prompt may hold quotation marks; the card can be written again."""
    config = settings(str(tmp_path), "full", ['a "quoted" cat'])
    model_card(tmp_path, config, {})
    model_card(tmp_path, config, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and "lora" not in card.data.tags
    assert "folder/pipeline" in card.text and "load_lora_weights" not in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert r"a \"quoted\" cat" in snippet
