"""Checkpoints that are damaged, of another model, dangerous or out of reach are refused, with the mend."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scorers import TINY, tiny_hf_clip, tiny_towers

from diffpref.scorer import PreferenceScorer
from diffpref.scorer.weights import checked_device

load = PreferenceScorer.from_pretrained


class Trap:
    """What a pickle can do."""

    def __reduce__(self):
        return (print, ("the pickle ran code",))


def test_a_pickle_never_runs_code(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is refused: damaged, or with more than weights, and a pickle can run"):
        load("hpsv2.1", file=tmp_path / "x.pt")  # before the large towers are made
    with pytest.raises(ValueError, match=r'is a pickle, which can run code .* from_pretrained\("hpsv2.1", file="'):
        load(tmp_path / "x.pt")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "visual.proj"}, r"\(missing: visual\.proj\)$"),
        (lambda state: state | {"extra": torch.zeros(1)}, r"\(unexpected: extra\)$"),
        (lambda state: state | {"visual.proj": torch.zeros(3, 3)}, r"\(of another shape: visual\.proj\)$"),
        (lambda state: state | {"ln_final.bias": torch.full((32,), math.inf)}, "weights are NaN or infinite: ln_final"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, tmp_path):
    torch.save({"state_dict": change(tiny_towers().model.state_dict())}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load("hpsv2.1", file=tmp_path / "x.pt", architecture=TINY)


def test_pickscore_weights_with_a_missing_part_are_refused(tmp_path):
    tiny_hf_clip(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: transformer\.resblocks\.1\.attn\.in_proj_weight"):
        load("pickscore", file=tmp_path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not weights")
    (tmp_path / "x.safetensors").write_bytes(b"not weights")
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is (refused: damaged|damaged)"):
            load("hpsv2", file=tmp_path / name, architecture=TINY)
        with pytest.raises(ValueError, match=f"{name} is (refused: damaged|damaged)"):
            load("clip:ViT-B-32", file=tmp_path / name, architecture=TINY)
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.pt"):
        load("hpsv2", file=tmp_path / "nowhere.pt", architecture=TINY)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "hpsv2.1",
            {},
            FileNotFoundError,
            "download HPS_v2.1_compressed.pt of xswu/HPSv2 .* and pass file=PATH; it",
        ),
        (
            "pickscore",
            {},
            FileNotFoundError,
            "pickscore: download model.safetensors of yuvalkirstain/PickScore_v1",
        ),
        ("laion-aesthetic", {}, FileNotFoundError, "download aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor"),
        ("laion-aesthetic-v1", {}, FileNotFoundError, "is not on the hub: download https://github.com/LAION-AI/"),
        ("clip:ViT-B-32/laion2b_s34b_b79k", {}, FileNotFoundError, "clip:ViT-B-32/laion2b_s34b_b79k: download the wei"),
        ("somebody/scorer", {}, FileNotFoundError, "somebody/scorer is no folder here; as a hub id: download it"),
        (
            "clip:ViT-B-32/none",
            {},
            ValueError,
            "open_clip has no weights 'none' of ViT-B-32, but openai, ",
        ),
        ("clip:ViT-Z", {}, ValueError, "open_clip has no architecture 'ViT-Z'; open_clip.list_models"),
        ("hpsv9", {}, ValueError, "'hpsv9' is no checkpoint's name .bundled, hpsv2, hpsv2.1, .*clip:ARCHITECTURE/TAG"),
        ("imagereward", {}, ValueError, r"packages and plug-ins are loaded by load_scorer\('imagereward'\)"),
        ("", {}, ValueError, "the name of a scorer is empty; needed is"),
        ("hpsv2", {"towers": "x"}, ValueError, "hpsv2 takes no towers, only file and architecture"),
        ("bundled", {"file": "x"}, ValueError, "bundled takes no file"),
        (
            "laion-aesthetic",
            {"architecture": "x"},
            ValueError,
            "laion-aesthetic takes no architecture, only file",
        ),
    ],
)
def test_what_cannot_be_had_says_what_to_do(name, options, error, message):
    with pytest.raises(error, match=message):
        load(name, **options)


@pytest.mark.parametrize("device", ["nonsense", "cuda:4096", "meta", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not to be had here: .+; cpu is always there"):
        checked_device(device)


def test_a_device_that_is_there():
    assert checked_device("cpu") == checked_device(torch.device("cpu")) == torch.device("cpu")
