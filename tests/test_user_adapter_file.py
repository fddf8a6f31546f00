"""Files of user adapters: what stock diffusers draws with them, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import IMAGE_SIZE, tiny_flux, tiny_sd
from torch import Tensor, nn
from user_cases import CASES, Case, U, facts, lora

from diffpref.adapters import save_lora
from diffpref.users.adapter import (
    add_user_adapter,
    has_user_adapter,
    load_into,
    read_user_adapter,
    save_user_adapter,
)
from diffpref.users.files import ADAPTER


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(*CASES[request.param])


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_comes_back(case, tmp_path):
    trained = case.add().train().predict(case.users)
    path = save_user_adapter(case.denoiser, tmp_path / "run", {"encoder": "0f3a", "pairs": 4})
    assert [p.name for p in (tmp_path / "run").iterdir()] == [path.name] == [ADAPTER]
    state, said = read_user_adapter(tmp_path / "run")
    assert said == {"format": 1, "encoder": "0f3a", "pairs": 4} | facts(case)
    loaded = Case(case.make, case.sequence)
    load_into(loaded.denoiser, state, said)
    assert torch.equal(loaded.predict(case.users), trained)
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())
    load_into(loaded.denoiser, *read_user_adapter(path))  # again, in place of the first
    assert torch.equal(loaded.predict(case.users), trained)


STOCK = """
import sys
from pathlib import Path
import numpy as np
import torch
from diffusers import DiffusionPipeline

def draw(pipe, user):
    g, nobody, size = torch.Generator().manual_seed(0), torch.zeros_like(user), {"height": 32, "width": 32}
    if "Flux" in type(pipe).__name__:
        embeds = {"ip_adapter_image_embeds": [user], "negative_ip_adapter_image_embeds": [nobody]}
    else:
        embeds = {"ip_adapter_image_embeds": [torch.cat([nobody, user])]}
    steps = {"num_inference_steps": 2, "guidance_scale": 2.0}
    return pipe("a cat", generator=g, output_type="np", **steps, **embeds, **size).images

for folder in map(Path, sys.argv[1:]):
    users, drawn = torch.load(folder / "users.pt"), {}
    pipe = DiffusionPipeline.from_pretrained(folder / "base")
    pipe.set_progress_bar_config(disable=True)
    no_encoder = "image_encoder_pretrained_model_name_or_path" if "flux" in folder.name else "image_encoder_folder"
    file = {"subfolder": "", "weight_name": "user_adapter.safetensors", no_encoder: None}
    pipe.load_lora_weights(folder)
    pipe.load_ip_adapter(str(folder), **file)
    drawn = {"a": draw(pipe, users[:1]), "b": draw(pipe, users[1:2]), "lora": draw(pipe, 0 * users[:1])}
    pipe.unload_lora_weights()
    drawn["nobody"] = draw(pipe, 0 * users[:1])
    pipe.load_lora_weights(folder)  # now it comes second
    drawn["second"] = draw(pipe, users[:1])
    np.savez(folder / "stock.npz", **drawn)
print([name for name in sys.modules if name.startswith("diffpref")])
"""  # what someone has who never heard of diffpref


def prepare(folder: Path, case: Case) -> dict[str, np.ndarray]:
    """Base, LoRA, adapter and users in a folder; returns what they draw here."""
    case.pipe.save_pretrained(folder / "base")
    base = draw(case)
    lora(case)
    case.add().train()
    save_lora(case.pipe, case.denoiser, folder)
    save_user_adapter(case.denoiser, folder, {})
    torch.save(case.users, folder / "users.pt")
    drawn = {"a": draw(case, case.users[:1]), "b": draw(case, case.users[1:2]), "nobody": base}
    return drawn | {"second": drawn["a"], "lora": draw(case, torch.zeros_like(case.users[:1]))}


def draw(case: Case, user: Tensor | None = None) -> np.ndarray:
    """One picture of the stock pipeline, with guidance where the family has it."""
    size, g = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, torch.Generator().manual_seed(0)
    embeds = {} if user is None else arguments(case, user)
    return case.pipe(
        "a cat", num_inference_steps=2, guidance_scale=2.0, generator=g, output_type="np", **size, **embeds
    ).images


def arguments(case: Case, user: Tensor) -> dict:
    """A user [1,1,…] as the stock pipeline of the family takes it."""
    both = torch.cat([torch.zeros_like(user), user])
    if "Flux" in type(case.pipe).__name__:
        return {"ip_adapter_image_embeds": [user], "negative_ip_adapter_image_embeds": [torch.zeros_like(user)]}
    return {"ip_adapter_image_embeds": both if "Diffusion3" in type(case.pipe).__name__ else [both]}


def test_stock_diffusers_alone_draws_the_same_pictures(tmp_path):
    names = ["sd", "sd-sequence", "sdxl", "flux"]
    ours = {name: prepare(tmp_path / name, Case(*CASES[name])) for name in names}
    script = [sys.executable, "-c", STOCK, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    for name in names:
        stock = np.load(tmp_path / name / "stock.npz")
        for picture, pixels in ours[name].items():
            np.testing.assert_array_equal(stock[picture], pixels, err_msg=f"{name}: {picture}")
        for one, other in (("a", "b"), ("a", "lora"), ("lora", "nobody")):
            assert np.abs(stock[one] - stock[other]).max() > 1e-3, (name, one, other)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_two_users_mix_as_two_scaled_adapters(name, tmp_path):
    """The stock pipeline holds the file twice, and gives each its user and its scale."""
    case = Case(*CASES[name]).add().train()
    save_user_adapter(case.denoiser, tmp_path, {})
    pipe = case.make()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter([str(tmp_path)] * 2, subfolder=[""] * 2, weight_name=[ADAPTER] * 2, image_encoder_folder=None)
    a, b = (torch.cat([torch.zeros_like(user), user]) for user in case.users[:2, None])

    def mixed(*scales: float) -> np.ndarray:
        pipe.set_ip_adapter_scale(list(scales))
        g = torch.Generator().manual_seed(0)
        return pipe("a cat", ip_adapter_image_embeds=[a, b], num_inference_steps=2, guidance_scale=2.0, generator=g,
                    height=IMAGE_SIZE, width=IMAGE_SIZE, output_type="np").images  # fmt: skip

    alone = [draw(case, user) for user in case.users[:2, None]]
    np.testing.assert_array_equal(mixed(1.0, 0.0), alone[0])
    np.testing.assert_array_equal(mixed(0.0, 1.0), alone[1])
    half, apart = mixed(0.5, 0.5), np.abs(alone[0] - alone[1]).mean()
    assert all(1e-4 < np.abs(half - one).mean() < apart for one in alone)


@pytest.mark.parametrize("case", ["sd3", "sd3-sequence"], indirect=True)
def test_the_stock_sd3_pipeline_draws_with_ours(case, tmp_path):
    drawn = prepare(tmp_path, case)
    loaded = Case(case.make, case.sequence)
    load_into(loaded.denoiser, *read_user_adapter(tmp_path))
    np.testing.assert_array_equal(draw(loaded, torch.zeros_like(case.users[:1])), drawn["nobody"])
    np.testing.assert_array_equal(draw(loaded), drawn["nobody"])  # who forgets the user
    loaded.pipe.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(draw(loaded, case.users[:1]), drawn["a"])
    np.testing.assert_array_equal(draw(loaded, case.users[1:2]), drawn["b"])
    assert np.abs(drawn["a"] - drawn["b"]).max() > 1e-3 < np.abs(drawn["a"] - drawn["lora"]).max()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_hold_an_adapter_is_refused():
    with pytest.raises(ValueError, match="UNet2DModel cannot hold a user adapter; known denoisers: UNet2DCondition"):
        add_user_adapter(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                     up_block_types=("UpBlock2D",)), U)  # fmt: skip
    flux = Case(tiny_flux, True)
    with pytest.raises(ValueError, match="FluxTransformer2DModel takes one vector for a user, no sequence"):
        flux.add()
    sd = Case(tiny_sd, False)
    with pytest.raises(ValueError, match="a user has at least one number, got width 0"):
        add_user_adapter(sd.denoiser, 0)
    with pytest.raises(ValueError, match="this UNet2DConditionModel has a user adapter already"):
        sd.add().add()
    assert not has_user_adapter(flux.denoiser) and not has_user_adapter(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "source, target, message",
    [
        (
            "sd",
            "flux",
            "this user adapter is for a UNet2DConditionModel, and the pipeline has a FluxTransf",
        ),
        ("flux", "sd3", "this user adapter is for a FluxTransformer2DModel, and the pipeline has a SD3Transf"),
        (
            "sd",
            "sdxl",
            r"of other sizes: image_proj.norm.bias is \(16,\), and the model has room for \(40,\)",
        ),
    ],
)
def test_an_adapter_for_another_model_is_refused(source, target, message, tmp_path):
    save_user_adapter(Case(*CASES[source]).add().denoiser, tmp_path, {})
    other = Case(*CASES[target])
    before = other.predict()
    with pytest.raises(ValueError, match=message):
        load_into(other.denoiser, *read_user_adapter(tmp_path))
    assert torch.equal(other.predict(), before) and not has_user_adapter(other.denoiser)


def break_file(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Write the file again, changed."""
    tensors, metadata = load_file(path), {k: json.dumps(v) for k, v in read_user_adapter(path)[1].items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t, m: t["image_proj.norm.bias"].fill_(0.1),
            "image_proj.norm.bias is not zero, so that a user of",
        ),
        (lambda t, m: t["ip_adapter.1.to_k_ip.weight"].fill_(float("nan")), "NaN or infinite .ip_adapter.1.to_k_ip"),
        (lambda t, m: t.update({"unet.x": torch.zeros(1)}), "is no user adapter: it holds unet.x, and not only"),
        (
            lambda t, m: [t.pop(k) for k in [*t] if k.startswith("image")],
            "is no user adapter: it holds nothing named i",
        ),
        (lambda t, m: m.pop("family"), "is no user adapter of diffpref: its metadata lack family"),
        (lambda t, m: m.update(format="2"), "is of format 2, and this diffpref reads 1"),
        (lambda t, m: m.update(width="six"), "is no user adapter of diffpref: its metadata are not JSON"),
        (lambda t, m: m.update(width='"6"'), "is damaged: its metadata say width 6, sequence False"),
    ],
)
def test_a_bad_file_is_refused(change, message, tmp_path):
    path = save_user_adapter(Case(tiny_sd, False).add().denoiser, tmp_path, {})
    break_file(path, change)
    with pytest.raises(ValueError, match=message) as error:
        read_user_adapter(tmp_path)
    assert str(path) in str(error.value)


def test_a_file_whose_facts_are_not_its_own_is_refused(tmp_path):
    path = save_user_adapter(Case(tiny_sd, False).add().denoiser, tmp_path, {})
    break_file(path, lambda t, m: m.update(width="7"))
    with pytest.raises(ValueError, match=r"image_proj.proj.weight is \(64, 6\), and the model has room for \(64, 7\)"):
        load_into(Case(tiny_sd, False).denoiser, *read_user_adapter(path))


def test_no_file_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such user adapter; a run that trains one writes user_adapter.s"):
        read_user_adapter(tmp_path)
    (tmp_path / ADAPTER).write_bytes(b"not at all")
    with pytest.raises(ValueError, match="is not a safetensors file, or is damaged"):
        read_user_adapter(tmp_path)
    path = save_user_adapter(Case(tiny_sd, False).add().denoiser, tmp_path, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file, or is damaged"):
        read_user_adapter(tmp_path)
