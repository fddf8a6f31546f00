"""A scorer is trained: through the real command, in one go or in pieces, whole or in part."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from safetensors.torch import load_file
from tiny_scorers import TINY, WIDTH, pictures, tiny_scorer

from diffpref.cache.team import Team
from diffpref.scorer import PreferenceScorer
from diffpref.scorer.config import load_scorer_config
from diffpref.scorer.features import open_features, view_of
from diffpref.scorer.heads import HEADS
from diffpref.scorer.towers import Towers
from diffpref.scorer.trainee import Trainee
from diffpref.scorer.trainer import ScorerTrainer

ROOT = Path(__file__).parents[1]
PAIRS, PROMPTS, USERS = 48, 12, 4
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny scorer, and pairs of which the brighter picture is preferred."""
    folder = tmp_path_factory.mktemp("scorer")
    tiny_scorer(folder / "tiny", temperature=2.0)
    images = pictures(2 * PAIRS, seed=3)
    light = [np.asarray(image).mean() for image in images]
    couples = [sorted((2 * i, 2 * i + 1), key=lambda j: -light[j]) for i in range(PAIRS)]
    rows = {
        "prompt": [f"thing {i % PROMPTS}" for i in range(PAIRS)],
        "chosen": [images[a] for a, _ in couples],
        "rejected": [images[b] for _, b in couples],
        "user_id": [i % USERS for i in range(PAIRS)],
        "bright": [1.0 if i % 3 else None for i in range(PAIRS)],
        "sharp": [float(i % 3 - 1) for i in range(PAIRS)],
        "weight": [1.0 + i % 2 for i in range(PAIRS)],
    }
    number = {name: Value("float32") for name in ("bright", "sharp", "weight")}
    shown = {"chosen": ImageFeature(), "rejected": ImageFeature()}
    features = Features({"prompt": Value("string"), **shown, "user_id": Value("int64"), **number})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "pairs.parquet")
    return folder


def arguments(world: Path, name: str, **sections) -> list[str]:
    """A short run; sections are laid over its configuration."""
    config = {
        "name": name,
        "output_dir": str(world / "runs"),
        "model": {"pretrained_model_name_or_path": str(world / "tiny")},
        "data": {"path": str(world / "pairs.parquet"), "num_workers": 0},
        "train": {"max_train_steps": 6, "train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1},
        "validation": {"share": 0.3, "steps": 3},
    }
    for key, section in sections.items():
        config[key] = config.get(key, {}) | section if isinstance(section, dict) else section
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def train(world: Path, name: str, **sections) -> tuple[Path, dict]:
    """Run in this process -> the run's folder, the report."""
    config = load_scorer_config([*arguments(world, name, **sections)])
    return config.run_dir, ScorerTrainer(config).run()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Towers and head of a run's result."""
    towers = load_file(run / "scorer" / "open_clip_model.safetensors")
    return towers | {f"head.{k}": v for k, v in load_file(run / "scorer" / "head.safetensors").items()}


def test_the_command_trains_a_scorer_that_loads_and_judges(world):
    options = {"train": {"max_train_steps": 40, "learning_rate": 3e-3}, "validation": {"share": 0.3, "steps": 20}}
    given = arguments(world, "command", model={"image_groups": -1, "text_layers": -1}, **options)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "diffpref/scorer/train.py"]
    done = subprocess.run([*launch, *given], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    run = world / "runs" / "command"
    report = json.loads((run / "report.json").read_text())
    log = lines(run)
    assert log[-2]["accuracy"] > 0.9 and log[-2]["loss"] < 0.5 * log[0]["loss"]  # it learns what is to be learned
    assert report["after"]["log_loss"]["value"] < report["before"]["log_loss"]["value"]
    assert "held-out accuracy" in done.stdout and (run / "curves.png").stat().st_size > 5000
    scorer = PreferenceScorer.from_pretrained(run / "scorer")
    assert scorer.temperature == pytest.approx(report["temperature"]) and scorer.measured["held_out_pairs"] > 0
    scores = scorer.score(images=pictures(3), prompts="thing 1")
    assert scores.shape == (3,) and scores.isfinite().all()


def test_margins_before_are_those_of_the_scorer_itself(world):
    """Cached embeddings, batches, tables of users: none of them changes what the scorer says."""
    _, report = train(world, "before", train={"max_train_steps": 1})
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    config = load_scorer_config(["--config", str(world / "before.yaml"), "--name", "again"])
    held = ScorerTrainer(config).held_rows["prompt"]
    shown = rows.filter(lambda row: row["prompt"] in set(held))
    scorer = PreferenceScorer.from_pretrained(world / "tiny")
    chosen, rejected = (scorer.score(images=list(shown[side]), prompts=list(shown["prompt"])) for side in SIDES)
    logit = (chosen - rejected).double() / scorer.temperature
    assert report["held_out_pairs"] == len(shown) > 5
    expected = torch.nn.functional.softplus(-logit).mean().item()
    assert report["before"]["log_loss"]["value"] == pytest.approx(expected, rel=1e-4)
    assert report["before"]["accuracy"]["value"] == pytest.approx((logit > 0).double().mean().item())


@pytest.mark.parametrize(
    "head, loss",
    [
        ({"name": "taste"}, {"name": "soft_label"}),
        ({"name": "taste"}, {"name": "rao_kupper"}),
        ({"name": "gaussian"}, {"name": "gaussian"}),
        ({"name": "gpm", "dim": 4}, {"name": "gpm"}),
        ({"name": "pal", "prototypes": 3}, {"name": "bradley_terry"}),
        ({"name": "micro", "tastes": 3}, {"name": "mixture"}),
        ({"name": "aspects", "names": ["bright", "sharp"]}, {"name": "aspects"}),
    ],
    ids=lambda section: section["name"],
)
def test_every_head_trains_on_cached_embeddings(world, head, loss):
    name = f"{head['name']}-{loss['name']}"
    data = {"aspects": head.get("names", []), "ties": "half"}
    run, report = train(world, name, head=head, loss=loss, data=data, train={"max_train_steps": 40})
    log = [line for line in lines(run) if "loss" in line]
    assert np.mean([x["loss"] for x in log[-5:]]) < np.mean([x["loss"] for x in log[:5]])
    scorer = PreferenceScorer.from_pretrained(run / "scorer")
    assert scorer.users == (list(range(USERS)) if head["name"] == "pal" else None)
    before, after = load_file(world / "tiny" / "open_clip_model.safetensors"), weights(run)
    assert all(torch.equal(before[key], after[key]) for key in before)  # the towers did not train
    first = scorer.compare(first=pictures(2), second=pictures(2, seed=1), prompts="thing 1")
    second = scorer.compare(first=pictures(2, seed=1), second=pictures(2), prompts="thing 1")
    assert torch.allclose(first + second, torch.ones(2), atol=1e-5)
    assert report["after"]["accuracy"]["n"] > 5


def test_only_the_layers_that_are_let_train_do(world):
    run, _ = train(world, "partly", model={"image_groups": 2, "text_layers": 2}, train={"max_train_steps": 3})
    before, after = load_file(world / "tiny" / "open_clip_model.safetensors"), weights(run)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("visual.transformer.resblocks.1." in key for key in changed)
    assert any(key.startswith("transformer.resblocks.1.") for key in changed)
    assert not any("resblocks.0." in key or "conv1" in key or "token_embedding" in key for key in changed)


def test_the_head_computes_in_fp32_whatever_the_towers_do():
    scorer = tiny_scorer()
    trainee = Trainee(scorer.towers, scorer.head)
    pixels = torch.stack([scorer.towers.preprocess(picture) for picture in pictures(3)])
    tokens, which = scorer.towers.tokenize(["thing 1"]), torch.zeros(3, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        judged, image, text = trainee(pixels, tokens, torch.arange(3), which, None)
    assert judged.scores.dtype == image.dtype == torch.float32
    assert torch.equal(judged.scores, scorer.head(image, text).scores)


def test_a_stream_trains_where_others_are_held_out(world):
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    rows.select(range(8)).to_parquet(world / "held.parquet")
    data = {"streaming": True, "validation": str(world / "held.parquet")}
    run, report = train(world, "stream", data=data, model={"image_groups": 1}, train={"max_train_steps": 3})
    assert report["held_out_pairs"] == 8 and report["groups_in_set"] is None
    assert len([line for line in lines(run) if "loss" in line]) == 3


def test_statistics_of_batches_stay_as_they_are(world):
    """Of towers with batch normalisation: a picture's score must not depend on its neighbours."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    towers = Towers(TINY | {"vision_cfg": vision}).eval()
    PreferenceScorer(towers, HEADS["cosine"](width=WIDTH), name="resnet").save_pretrained(world / "resnet")
    model = {"pretrained_model_name_or_path": str(world / "resnet"), "image_groups": -1}
    run, _ = train(world, "statistics", model=model, head={"name": "taste"}, train={"max_train_steps": 2})
    before, after = load_file(world / "resnet" / "open_clip_model.safetensors"), weights(run)
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert all(key in kept for key in before if "running" in key or "num_batches" in key)
    assert "visual.layer4.0.conv1.weight" not in kept and "visual.bn1.weight" not in kept
    assert PreferenceScorer.from_pretrained(run / "scorer").score(images=pictures(2), prompts="thing").isfinite().all()


@pytest.mark.parametrize("towers", [0, -1], ids=["cached", "towers"])
def test_going_on_equals_not_stopping(world, towers):
    """Also what a head notes of its batches: that of cycles has a mean vector."""
    model, head = {"image_groups": towers, "text_layers": towers}, {} if towers else {"name": "gpm"}
    settings = {"model": model, "validation": {"steps": 4, "keep_best": False}, "data": {"random_flip": True}}
    settings |= {"head": head, "loss": {"name": "gpm" if head else "bradley_terry"}}
    steps = {"max_train_steps": 8, "checkpointing_steps": 4, "ema_decay": 0.9}
    whole, _ = train(world, f"whole{towers}", train=steps, **settings)
    # the loop of a run that is killed after step 4 leaves this folder
    given = arguments(world, f"parts{towers}", train=steps, **settings)
    config = load_scorer_config(given)
    trainer = ScorerTrainer(config)
    original = trainer.loop.checkpoints.save

    def save_and_die(step: int, state: dict):
        original(step, state)
        raise KeyboardInterrupt

    trainer.loop.checkpoints.save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    ScorerTrainer(load_scorer_config([*given, "--train.resume_from_checkpoint", "latest"])).run()
    one, other = weights(whole), weights(config.run_dir)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [x["loss"] for x in lines(whole) if "loss" in x] == [x["loss"] for x in lines(config.run_dir) if "loss" in x]


def test_the_best_state_is_kept(world):
    """At a rate that ruins the head, the best one is not the last."""
    model = {"image_groups": -1, "text_layers": -1}
    steps = {"max_train_steps": 12, "learning_rate": 0.3, "lr_scheduler": "linear", "lr_warmup_steps": 12}
    run, report = train(world, "best", model=model, train=steps, validation={"share": 0.3, "steps": 1})
    measured = {line["step"]: line["validation/log_loss"] for line in lines(run) if "validation/log_loss" in line}
    best = min(measured, key=measured.get)
    assert report["kept_step"] == best < 12
    last, _ = train(world, "last", model=model, train=steps, validation={"steps": 1, "keep_best": False})
    assert any(not torch.equal(weights(run)[key], weights(last)[key]) for key in weights(run))


def test_contrast_keeps_prompts_apart(world):
    options = {"model": {"image_groups": -1, "text_layers": -1}, "train": {"max_train_steps": 30}}
    with_it, _ = train(world, "contrast", contrast_weight=1.0, **options)
    numbers = [line["contrast"] for line in lines(with_it) if "contrast" in line]
    assert numbers[-1] < numbers[0] - 0.1


def test_embeddings_are_made_once(world, capfd):
    train(world, "once", train={"max_train_steps": 1})
    capfd.readouterr()
    train(world, "twice", train={"max_train_steps": 1})
    assert "encoding" not in capfd.readouterr().err


def test_other_towers_find_no_embeddings_of_these(world):
    trainer = ScorerTrainer(load_scorer_config([*arguments(world, "one")]))
    team_of_one = trainer.features(trainer.held_rows)
    other = tiny_scorer(world / "other", seed=1)
    again = open_features(trainer.held_rows, trainer.config, other.towers, Team())
    view = view_of(trainer.scorer.towers)
    one, two = team_of_one.latents(0, view)[0]["moments"], again.latents(0, view)[0]["moments"]
    assert not torch.allclose(one, two) and one.norm().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": {"name": "gaussian"}}, "loss.name gaussian reads spread, which head.name taste does not give"),
        ({"loss": {"name": "aspects"}, "head": {"name": "aspects", "names": ["bright"]}}, "needs aspects of the data"),
        ({"loss": {"name": "hps", "hinge_margin": 3.0}}, "loss.hinge_margin is not used by loss.name hps"),
        ({"head": {"name": "taste", "dim": 8}}, "head.dim is not used by head.name taste"),
        (
            {"head": {"name": "cosine"}},
            "head.name cosine has nothing but its scale to train where the towers are locked",
        ),
        ({"data": {"resolution": 64}}, "a scorer prepares pictures in its own way"),
        ({"data": {"streaming": True}}, "data.streaming cannot hold prompts out; give data.validation"),
        ({"data": {"aspects": ["dull"]}}, r"data.aspects: .* lacks the column\(s\) \['dull'\]"),
        ({"validation": {"share": 0.001}}, "validation.share: 0.001 of the prompts leaves none held out"),
        ({"validation": {"share": 1.5}}, r"validation.share must lie in \(0, 1\), got 1.5"),
        ({"data": {"validation": "nowhere.parquet"}}, "data.validation: .*nowhere.parquet"),
        ({"model": {"pretrained_model_name_or_path": "nobody"}}, "nobody"),
        ({"model": {"image_groups": -2}}, r"model.image_groups must be -1 \(all\) or more, got -2"),
    ],
)
def test_a_mistake_is_named_before_the_training(world, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ScorerTrainer(load_scorer_config(arguments(world, "mistake", **sections)))


def test_an_unknown_key_names_the_nearest(world):
    with pytest.raises(ValueError, match="did you mean 'loss.label_smoothing'"):
        load_scorer_config([*arguments(world, "key"), "--loss.label_smooting", "0.1"])


def test_users_are_needed_by_heads_that_learn_them(world):
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    rows.remove_columns("user_id").to_parquet(world / "nameless.parquet")
    sections = {"data": {"path": str(world / "nameless.parquet")}, "head": {"name": "pal"}}
    with pytest.raises(ValueError, match="head.name pal learns users, and .* has no column user_id"):
        ScorerTrainer(load_scorer_config(arguments(world, "nameless", **sections)))


def test_a_head_goes_on_with_its_temperature_and_its_users(world):
    """Of another set's users, those with the same names keep their tastes."""
    pal = {"name": "pal", "prototypes": 3}
    first, _ = train(world, "pal-first", head=pal, train={"max_train_steps": 30})
    scorer = PreferenceScorer.from_pretrained(first / "scorer")
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    rows = rows.map(lambda row: {"user_id": row["user_id"] + 2})
    rows.to_parquet(world / "others.parquet")
    sections = {"data": {"path": str(world / "others.parquet")}, "head": pal}
    sections["model"] = {"pretrained_model_name_or_path": str(first / "scorer")}
    trainer = ScorerTrainer(load_scorer_config(arguments(world, "pal-second", **sections)))
    new, old = trainer.trainee.head, scorer.head
    assert trainer.users == [2, 3, 4, 5]
    assert torch.equal(new.users.weight[:2], old.users.weight[2:4])
    assert torch.allclose(new.users.weight[2:], old.users.weight.mean(0).expand(2, -1))
    assert new.logit_scale.item() == pytest.approx(old.logit_scale.item() - math.log(scorer.temperature), abs=1e-5)


def test_rows_without_a_user_are_nobodys(world):
    """They do not take the users of their batch away, and no two of them are one user."""
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    rows = rows.map(lambda row, i: {"user_id": row["user_id"] if i % 3 else None}, with_indices=True)
    rows.to_parquet(world / "some.parquet")
    data, loss = {"path": str(world / "some.parquet")}, {"name": "mixture", "one_taste": "user"}
    _, report = train(world, "some", data=data, head={"name": "micro", "tastes": 2}, loss=loss)
    assert report["steps"] == 6
    run, _ = train(world, "some-pal", data=data, head={"name": "pal"})
    assert PreferenceScorer.from_pretrained(run / "scorer").users == list(range(USERS))


def test_a_training_that_only_harms_leaves_the_start(world, capfd):
    """Where people who are held out want the contrary, every step is one away from them."""
    rows = Dataset.from_parquet(str(world / "pairs.parquet"), cache_dir=str(world / "cache"))
    rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}).to_parquet(world / "contrary.parquet")
    steps, data = {"max_train_steps": 9, "learning_rate": 1e-2}, {"validation": str(world / "contrary.parquet")}
    _, report = train(world, "harm", train=steps, data=data, validation={"steps": 3})
    assert report["kept_step"] == 0 and "no state was better" in capfd.readouterr().out
    assert report["after"]["accuracy"]["value"] == report["before"]["accuracy"]["value"]


@pytest.mark.slow
def test_two_processes_equal_one(world):
    steps = {"max_train_steps": 6, "learning_rate": 1e-4, "adam_epsilon": 1e-4}
    settings = {"model": {"image_groups": -1, "text_layers": -1}, "validation": {"keep_best": False}}
    one, _ = train(world, "alone", train=steps | {"train_batch_size": 8}, **settings)
    given = arguments(world, "two", train=steps | {"train_batch_size": 4}, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "diffpref/scorer/train.py"]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = weights(one), weights(world / "runs" / "two")
    assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-6) for key in first)
