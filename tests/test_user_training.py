"""Training for users, by the real trainer on a tiny pipeline: a taste from choices, a table, states, and rewards."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd
from tiny_runs import command, log, run, settings, weights
from tiny_users import tiny_encoder

from diffpref.batch import USERS as KNOWN
from diffpref.config import DataConfig, load_config
from diffpref.data import load_preferences
from diffpref.trainer import Trainer
from diffpref.users.adapter import load_into, read_user_adapter, user_adapter_off
from diffpref.users.embedding import UserEmbedding
from diffpref.users.sources.table import UserTable
from diffpref.users.vlm.pairs import row_digest
from diffpref.users.vlm.states import Entry, Pair, write_states

USERS = ["ann", "bob"] * 5
TUNING = {"encoder": "lora", "table": "user_adapter", "states": "user_adapter", "rewards": "lora"}
TUNING["tastes"] = "user_adapter"
WIDTHS = {"encoder": 8, "table": 6, "states": 8, "rewards": 2, "tastes": 8}
SOURCES = tuple(TUNING)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, ten pairs of two users, each on its own prompt and with two scorers' numbers, an encoder, and a file
    of states of two sets of each user's pairs."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sd().save_pretrained(folder / "sd")
    tiny_encoder(folder)
    pixels = np.random.default_rng(0)
    sides = {
        side: [Image.fromarray(pixels.integers(low, low + 128, (34, 40, 3), dtype=np.uint8)) for _ in USERS]
        for side, low in (("chosen", 128), ("rejected", 0))
    }
    numbers = {name: pixels.normal(size=(len(USERS), 2)).tolist() for name in ("sharp", "warm")}
    features = {"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()}
    features |= {"user_id": Value("string")} | dict.fromkeys(numbers, List(Value("float64")))
    table = {"prompt": [f"a cat {i}" for i in range(len(USERS))], **sides, "user_id": USERS, **numbers}
    Dataset.from_dict(table, features=Features(features)).to_parquet(folder / "pairs.parquet")
    write_some_states(folder)
    return folder


def write_some_states(folder: Path) -> None:
    """Two sets of two pairs of each user."""
    rows = load_preferences(DataConfig(str(folder / "pairs.parquet")))
    pairs = [Pair(number, rows[number]["prompt"], row_digest(rows[number])) for number in range(8)]
    sets = [(user, n, pairs[4 * n + i : 4 * n + 4 : 2]) for i, user in enumerate(("ann", "bob")) for n in (0, 1)]
    entries = [Entry(user, n, "", tuple(shown), "") for user, n, shown in sets]
    states = torch.randn(len(entries), 3, 8, generator=torch.manual_seed(0))
    write_states(folder / "states.safetensors", {"id": "vlm"}, entries, list(states))


def of(world: Path, source: str, tuning: str = "user_adapter", **sections: Any) -> dict[str, Any]:
    """A short run for users, without pictures."""
    paths = dict.fromkeys(("encoder", "tastes"), str(world / "user_encoder")) | {
        "states": str(world / "states.safetensors")
    }
    users = {"source": source, "dropout": 0.0, "support": [1, 3], "width": 6, "path": paths.get(source)}
    made = {"users": users, "model": {"tuning": tuning}, "sample": {"prompts": []}, "train": {"learning_rate": 1e-2}}
    made["data"] = {"scorers": ["sharp", "warm"]} if source == "rewards" else {}
    for key, section in sections.items():
        made[key] = made.get(key, {}) | section
    return made


def denoised(world: Path, folder: Path | None = None, user: torch.Tensor | None = None) -> torch.Tensor:
    """What the base's UNet says, or with a run's user adapter and a user [1,(L,)U]."""
    unet = UNet2DConditionModel.from_pretrained(world / "sd" / "unet").eval()
    if folder is not None:
        load_into(unet, *read_user_adapter(folder))
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 16, 16, generator=g)
    extra = {} if user is None else {"added_cond_kwargs": {"image_embeds": [user[None]]}}
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=words, **extra).sample


class Watched(Trainer):
    """A trainer that keeps what it encoded and noised."""

    def prepare_training(self) -> None:
        super().prepare_training()
        self.items, prepare = [], self.learner.prepare
        self.learner.prepare = lambda batch: self.items.append(prepare(batch)) or self.items[-1]

    def policy(self, encoded: Any, noised: Any, which: slice = slice(None), **known: torch.Tensor) -> torch.Tensor:
        """The policy's prediction of some items of a batch, with other things known of their users."""
        given = {name: value[which] for name, value in encoded.conditioning.items()}
        given |= {KNOWN + name: value for name, value in known.items()}
        with torch.no_grad():
            return self.learner.models.policy(noised.x_t[which], noised.t[which], given)


def watched(world: Path, name: str, source: str, tuning: str = "user_adapter", **sections: Any) -> Watched:
    """A run to its end, watched."""
    trainer = Watched(load_config(settings(world, name, **of(world, source, tuning, **sections))))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def runs(world: Path) -> dict[str, Watched]:
    """A run with each source, two of them with a LoRA beside the adapter."""
    return {source: watched(world, source, source, TUNING[source]) for source in SOURCES}


# --- what a run trains and writes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_starts_at_the_reference_and_nobody_stays_at_the_base(world, runs, source):
    """Step 0 is exactly ln 2. Afterwards the adapter alone gives the base for a user of zeros, to the bit, and for
    another one something else."""
    folder = runs[source].config.run_dir
    first, *_, last = log(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["rewards/margins"] == 0
    assert last["rewards/margins"] != 0
    beside = {"pytorch_lora_weights.safetensors": TUNING[source] == "lora", "user_adapter.safetensors": True}
    beside |= {"user_table.safetensors": source == "table", "user_encoder": source in ("encoder", "tastes")}
    assert {name: (folder / name).exists() for name in beside} == beside
    _, facts = read_user_adapter(folder)
    shape = (1, *((3,) if source == "states" else ()), WIDTHS[source])
    assert (facts["width"], facts["sequence"]) == (shape[-1], source == "states")
    assert facts["encoder"] == runs[source].personal.module.id
    base = denoised(world)
    assert torch.equal(denoised(world, folder, torch.zeros(shape)), base)
    assert not torch.equal(denoised(world, folder, torch.randn(shape, generator=torch.manual_seed(0))), base)


@pytest.mark.parametrize("source", ["table", "encoder"])
def test_the_reference_knows_no_users_and_a_policy_for_nobody_has_the_lora_alone(world, runs, source):
    """Whoever it is asked for, the reference is the base to the bit; nothing is left switched off."""
    trainer, models = runs[source], runs[source].learner.models
    encoded, noised = trainer.items[-1]
    unet = UNet2DConditionModel.from_pretrained(world / "sd" / "unet")
    policy = trainer.policy(encoded, noised)
    with torch.no_grad():
        base = unet(noised.x_t, noised.t, encoder_hidden_states=encoded.conditioning["prompt_embeds"]).sample
    assert torch.equal(models.reference(noised.x_t, noised.t, encoded.conditioning), base)
    assert torch.equal(trainer.policy(encoded, noised), policy) and not torch.equal(policy, base)
    nobody = trainer.policy(encoded, noised, present=torch.zeros(len(base)))
    with user_adapter_off(trainer.denoiser):
        assert torch.equal(trainer.policy(encoded, noised), nobody)
    assert torch.equal(nobody, base) == (TUNING[source] == "user_adapter") and not torch.equal(nobody, policy)


@pytest.mark.parametrize("source", SOURCES)
def test_users_of_one_batch_have_tokens_of_their_own(runs, source):
    """Both items of a group have its user; another group's user is another."""
    different = 0
    for encoded, _ in runs[source].items:
        known = {k.removeprefix(KNOWN): v for k, v in encoded.conditioning.items() if k.startswith(KNOWN)}
        users = runs[source].learner.models.users(known)
        assert len(users) == 4 and users.flatten(1).norm(dim=1).min() > 0
        assert torch.equal(users[0], users[1]) and torch.equal(users[2], users[3])
        different += not torch.equal(users[0], users[2])
    assert different


def test_each_item_is_denoised_for_its_own_user(runs):
    """The batch at once, and item by item; another user would have been something else."""
    trainer, (encoded, noised) = runs["rewards"], runs["rewards"].items[-1]
    whole, directions = trainer.policy(encoded, noised), encoded.conditioning[KNOWN + "user"]
    for i in range(len(whole)):
        alone = trainer.policy(encoded, noised, slice(i, i + 1))
        other = trainer.policy(encoded, noised, slice(i, i + 1), user=directions[i : i + 1] * torch.tensor([1, -1]))
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-4)
        assert (other[0] - whole[i]).abs().max() > 1e-3


def test_the_table_learns(runs):
    """Its users turn while the adapter trains, and the file has them by name, apart from the adapter."""
    table = UserTable.load(runs["table"].config.run_dir)
    assert list(table.names) == ["ann", "bob"]
    turned = (table.vectors() * UserTable(["ann", "bob"], 6).vectors()).sum(1)
    assert (turned < 0.999).all() and (turned > -1).all()
    assert runs["table"].personal.module.id == table.id == table.embedding("ann").encoder
    assert not any("users" in name for name in load_file(runs["table"].config.run_dir / "user_adapter.safetensors"))


def test_dropped_users_train_nothing_but_the_lora(world):
    """Where all are dropped, the values stay where they began: zeros have no gradient."""
    trainer = watched(world, "dropped", "table", "lora", users={"dropout": 0.99}, train={"seed": 1})
    present = torch.cat([encoded.conditioning[KNOWN + "present"] for encoded, _ in trainer.items])
    assert present.shape == (16,) and not present.any()
    state, _ = read_user_adapter(trainer.config.run_dir)
    assert not any(value.any() for name, value in state["ip_adapter"].items() if "to_v_ip" in name)
    assert any(value.any() for name, value in weights(trainer.config.run_dir).items() if "lora_B" in name)


def test_a_lora_that_is_there_is_part_of_the_base(world, runs):
    """On for the reference and for nobody, untouched, and written beside the adapter: what began as its equal."""
    lora = runs["encoder"].config.run_dir
    trainer = watched(world, "on-a-lora", "tastes", model={"lora": str(lora)}, users={"labels": "difference"})
    folder, (encoded, noised) = trainer.config.run_dir, trainer.items[-1]
    name = "pytorch_lora_weights.safetensors"
    assert (folder / name).read_bytes() == (lora / name).read_bytes()
    assert log(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    pipe = StableDiffusionPipeline.from_pretrained(world / "sd")
    pipe.load_lora_weights(lora / name)
    with torch.no_grad():
        base = pipe.unet(noised.x_t, noised.t, encoder_hidden_states=encoded.conditioning["prompt_embeds"]).sample
    assert torch.equal(trainer.learner.models.reference(noised.x_t, noised.t, encoded.conditioning), base)
    assert torch.equal(trainer.policy(encoded, noised, present=torch.zeros(len(base))), base)
    assert not torch.equal(trainer.policy(encoded, noised), base)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"lora": "nowhere"}}, "model.lora: there is nothing at nowhere"),
        ({"model": {"lora": "a", "tuning": "lora"}}, "model.lora is a part of the base"),
        ({"model": {"tuning": "full"}}, "model.tuning full moves the weights"),
        ({"users": {"source": "none"}}, "model.tuning user_adapter needs to know whose pairs"),
        ({"users": {"labels": "difference"}}, "users.labels is about made-up tastes"),
        ({"users": {"source": "tastes", "path": "a", "labels": "difference"}}, "name its LoRA in model.lora"),
        ({"data": {"joint": True}, "users": {"source": "encoder", "path": "a"}}, "data.joint makes pairs of two"),
        ({"users": {"source": "encoder"}}, "need users.path"),
        ({"users": {"path": "nowhere", "source": "encoder"}}, "nowhere holds no encoder of users"),
        ({"data": {"streaming": True}, "users": {"source": "encoder", "path": "a"}}, "data.streaming does not keep"),
    ],
)
def test_what_cannot_be_is_said(world, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        watched(world, "not-run", "table", **sections)


# --- support pairs ----------------------------------------------------------------------------------------------------


def test_support_never_holds_the_pair_that_is_trained_on(runs):
    """Every row, at many positions: drawn anew, from the same user's other rows, never the row itself."""
    source, sizes = runs["encoder"].personal.source, set()
    for row, user in enumerate(USERS):
        drawn = [tuple(source.drawn(row, key, user).tolist()) for key in range(20)]
        sizes |= {len(rows) for rows in drawn}
        assert len(set(drawn)) > 5
        assert all(row not in rows and len(set(rows)) == len(rows) for rows in drawn)
        assert {USERS[other] for rows in drawn for other in rows} == {user}
        query = source.choices.look(np.array([row]))[0]
        for key in range(5):
            shown = source.choices.look(source.drawn(row, key, user))
            assert not any(torch.equal(pair[side], query[side]) for pair in shown for side in (1, 2))
    assert sizes == {1, 2, 3}


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "tuning"), [("encoder", "lora"), ("table", "user_adapter")])
def test_resuming_equals_not_stopping(world, source, tuning):
    """Users are dropped and drawn as they would have been, and the table goes on where it was."""
    sections = {"train": {"checkpointing_steps": 2}, "users": {"dropout": 0.3}, "data": {"caption_dropout": 0.3}}
    whole = watched(world, f"whole-{source}", source, tuning, **sections).config.run_dir
    part = world / "runs" / f"part-{source}"
    part.mkdir()
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    sections["train"]["resume_from_checkpoint"] = "latest"
    report, lines, _ = run(world, f"part-{source}", **of(world, source, tuning, **sections))
    assert report["resumed_from_step"] == 2 and [line["step"] for line in lines] == [3, 4]
    assert all(a["loss"] == b["loss"] for a, b in zip(lines, log(whole)[2:], strict=True))
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) == 2 and sorted(path.name for path in part.glob("*.safetensors")) == files
    for name in files:
        one, other = load_file(whole / name), load_file(part / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("source", ["encoder", "tastes", "table"])
def test_workers_caches_and_two_passes_make_the_same_run(world, runs, source):
    """Sources live in the loader's processes, users reach the second pass over items; held-out pairs have users too."""
    data = {"num_workers": 1, "validation": str(world / "pairs.parquet"), "validation_draws": 1}
    sections = {"data": data, "cache": {"latents": True, "text": True}, "train": {"gradient_cache": 1}}
    report, lines, _ = run(world, f"other-{source}", **of(world, source, TUNING[source], **sections))
    for a, b in zip(log(runs[source].config.run_dir), (line for line in lines if "loss" in line), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
        assert b["rewards/margins"] == pytest.approx(a["rewards/margins"], rel=2e-2, abs=2e-3)
    assert report["validation"]["pairs"] == len(USERS)


def test_lists_are_ranked_by_made_up_users(world):
    """Four pictures of each prompt, ranked anew for every group."""
    rows = load_preferences(DataConfig(str(world / "pairs.parquet")))
    images = [[rows[i][side] for i in (k, (k + 1) % 10) for side in ("chosen", "rejected")] for k in range(6)]
    numbers = np.random.default_rng(1).normal(size=(2, 6, 4)).tolist()
    features = {"prompt": Value("string"), "images": List(ImageFeature(decode=False))}
    features |= dict.fromkeys(("sharp", "warm"), List(Value("float64")))
    table = {"prompt": ["a cat"] * 6, "images": images, "sharp": numbers[0], "warm": numbers[1]}
    Dataset.from_dict(table, features=Features(features)).to_parquet(world / "lists.parquet")
    data = {"path": str(world / "lists.parquet")}
    trainer = watched(world, "lists", "rewards", data=data, objective={"name": "diffusion_lpo"})
    scores = torch.cat([encoded.structure.scores for encoded, _ in trainer.items]).reshape(-1, 4)
    assert all(sorted(line) == pytest.approx([0, 1 / 3, 2 / 3, 1]) for line in scores.tolist())
    assert log(trainer.config.run_dir)[0]["loss"] == pytest.approx(math.log(24) / 3, abs=1e-6)


@pytest.mark.parametrize("source", ["encoder", "table"])
def test_data_without_users_are_refused(world, source, tmp_path):
    rows = load_preferences(DataConfig(str(world / "pairs.parquet"))).remove_columns("user_id")
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column user_id"):
        watched(world, f"refused-{source}", source, data={"path": str(tmp_path / "a.parquet")})


def test_the_command_draws_for_the_user_it_is_given(world):
    """Somebody who only looks at sharpness: the pictures at the end are theirs, and those before the base's."""
    UserEmbedding(torch.tensor([1.0, 0.0]), "rewards: sharp, warm").save(world / "me.safetensors")
    sample = {"prompts": ["a cat", "a dog"], "images_per_prompt": 1, "user": str(world / "me.safetensors")}
    judge = {"measures": {"light": "tiny_runs.brightness"}}
    done = forked.call(command(*settings(world, "drawn", **of(world, "rewards", sample=sample, judge=judge))))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = world / "runs" / "drawn"
    light = json.loads((folder / "report.json").read_text())["measures"]["light"]
    assert light["before"] != light["after"] and (folder / "before_after.png").is_file()
    UserEmbedding(torch.tensor([1.0, 0.0]), "rewards: warm, sharp").save(world / "other.safetensors")
    sample["user"] = str(world / "other.safetensors")
    with pytest.raises(ValueError, match="rewards: warm, sharp"):
        watched(world, "not-drawn", "rewards", sample=sample)
