"""diffpref user, and diffpref sample --user: from picture files to a taste, from a taste to pictures."""

import shutil
import sys

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd, tiny_sd3, tiny_sdxl
from tiny_runs import call
from tiny_users import embedding, some_pairs, tiny_encoder, trained, write_folder

import diffpref
from diffpref import cli
from diffpref.commands import sample as sample_command
from diffpref.commands import user as command
from diffpref.data.pictures import open_picture
from diffpref.sample import sample
from diffpref.synpic import plan
from diffpref.users import UserEmbedding, best_of_neighbours, encode_user, personalized
from diffpref.users.adapter import save_user_adapter
from diffpref.users.consensus import own_taste
from diffpref.users.vlm.states import Entry, write_states


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline; a run's folder with an encoder and an adapter; choices of a person, and their embedding."""
    folder = tmp_path_factory.mktemp("world")
    encoder = tiny_encoder(folder / "run")
    pipe = tiny_sd()
    pipe.save_pretrained(folder / "sd")
    trained(pipe)
    save_user_adapter(pipe.unet, folder / "run", {"encoder": encoder.id})
    write_folder(folder / "mine", some_pairs())
    encode_user(folder / "mine", encoder, name="me").save(folder / "me.safetensors")
    embedding(5, encoder=encoder.id).save(folder / "you.safetensors")
    return folder


# --- diffpref user ----------------------------------------------------------------------------------------------------


def test_a_newcomers_path(world, tmp_path):
    """Four pairs of files -> me.safetensors, by the real command -> my pictures."""
    me, run = tmp_path / "me.safetensors", str(world / "run")
    line = ["user", "embed", str(world / "mine"), "--encoder", run, "--out", str(me), "--name", "me"]
    done = forked.call([sys.executable, "-m", "diffpref.cli", *line])
    assert done.returncode == 0, done.stderr
    assert f"4 choices -> {me} (width 8, of " in done.stdout
    assert torch.equal(UserEmbedding.load(me).states, UserEmbedding.load(world / "me.safetensors").states)
    sample_command.run(arguments(world, tmp_path / "pictures", "--user", str(me), "--user-adapter", run))
    personal = diffpref.load_user_adapter(tiny_sd(), world / "run")
    mine = personal.bound(UserEmbedding.load(me))
    assert drawn(tmp_path / "pictures", "a") == pytest.approx(expected(mine), abs=1)


def test_mixing(world, tmp_path):
    first, second, out = world / "me.safetensors", world / "you.safetensors", tmp_path / "both.safetensors"
    command.run(["mix", str(first), str(second), "--amount", "0.25", "--out", str(out)])
    expected = UserEmbedding.load(first).mix(UserEmbedding.load(second), 0.25)
    assert torch.equal(load_file(out)["user"], expected.states)
    command.run(["mix", str(first), str(second), "--out", str(out), "--overwrite"])
    assert torch.equal(load_file(out)["user"], UserEmbedding.load(first).mix(UserEmbedding.load(second), 0.5).states)


def test_one_of_many_whom_a_model_has_described(tmp_path):
    states = [embedding(i, 3, width=5).states for i in range(3)]
    entries = [Entry(user, number, "x", (), "") for user, number in (("ann", 0), ("bob", 0), ("bob", 1))]
    write_states(tmp_path / "all.safetensors", {"id": "vlm"}, entries, states)
    for line, place in ((["--whose", "ann"], 0), (["--whose", "bob"], 1), (["--whose", "bob", "--set", "1"], 2)):
        out = tmp_path / f"{place}.safetensors"
        command.run(["pick", str(tmp_path / "all.safetensors"), *line, "--out", str(out)])
        user = UserEmbedding.load(out)
        assert torch.equal(user.states, states[place]) and user.encoder == "vlm"
    for line, message in (([], "holds 2 users; --whose says"), (["--whose", "cy"], "no user 'cy', but 2 others")):
        with pytest.raises(ValueError, match=message):
            command.run(["pick", str(tmp_path / "all.safetensors"), *line, "--out", str(tmp_path / "x.safetensors")])


RUN, OUT = ["--encoder", "{world}/run"], ["--out", "{tmp}/u.safetensors"]
MISTAKES = {
    "no action": (["paint"], "diffpref user has no 'paint'; there are embed, mix, describe, pick, train"),
    "no pairs there": (["embed", "{world}/none", *RUN, *OUT], "no data set at .*none"),
    "no encoder": (["embed", "{world}/mine", "--encoder", "{world}/sd", *OUT], "sd holds no encoder of users"),
    "no safetensors": (["embed", "x", *RUN, "--out", "{tmp}/u.pt"], "u.pt must end with one of .safetensors"),
    "no folder": (["embed", "x", *RUN, "--out", "{tmp}/a/u.safetensors"], "there is no folder .*a to write"),
    "no users": (["embed", "{world}/mine", *RUN, "--whose", "7", *OUT], "no column user_id, so that '7'"),
    "is there": (["mix", "x", "y", "--out", "{world}/me.safetensors"], "me.safetensors is there already; --overwrite"),
    "amount": (["mix", *["{world}/me.safetensors"] * 2, "--amount", "2", *OUT], "amount is 2.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(world, tmp_path, mistake):
    given, message = MISTAKES[mistake]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run([text.format(world=world, tmp=tmp_path) for text in given])
    assert not list(tmp_path.iterdir())


def test_a_broken_picture_is_named_in_one_line(world, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mine", some_pairs())
    (folder / "2-other.png").write_bytes((folder / "2-other.png").read_bytes()[:400])
    line = ["user", "embed", str(folder), "--encoder", str(world / "run"), "--out", str(tmp_path / "u.safetensors")]
    monkeypatch.setattr(sys, "argv", ["diffpref", *line])
    named = "error: pair 3 .row 2 of .*: the rejected picture .*2-other.png cannot be used .picture damaged"
    with pytest.raises(SystemExit, match=named):
        cli.main()
    assert not (tmp_path / "u.safetensors").exists()


@pytest.mark.parametrize("action", ["", "embed", "mix", "describe", "pick"])
def test_help(action, capsys):
    if action:
        with pytest.raises(SystemExit, match="0"):
            command.run([action, "--help"])
    else:
        command.run([])
    assert f"usage: diffpref user {action}" in capsys.readouterr().out


def test_importing_diffpref_is_light():
    line = "import sys, diffpref, diffpref.users, diffpref.commands.user; assert 'torch' not in sys.modules"
    done = call([sys.executable, "-c", line])
    assert done.returncode == 0, done.stderr
    assert diffpref.load_user_adapter is personalized.load_user_adapter
    for package in (diffpref, diffpref.users):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no_such_name'"):
            _ = package.no_such_name
        assert all(getattr(package, name) is not None for name in package.__all__)


# --- diffpref sample --user -------------------------------------------------------------------------------------------

PROMPTS, SEEDS = ["a cat", "red"], [0, 1]
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0}


def arguments(world, out, *more: str) -> list[str]:
    """Of diffpref sample, for a pipeline `a`."""
    wanted = ["--prompts", *PROMPTS, "--seeds", "2", "--steps", "2", "--guidance", "2", "--device", "cpu"]
    return ["--pipeline", f"a={world / 'sd'}", *wanted, "--out", str(out), *more]


def files(folder) -> dict[str, bytes]:
    """Everything in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawn(folder, name: str) -> np.ndarray:
    """The pictures of a pipeline, as they were written."""
    found = [row for path in sorted(folder.glob(f"{name}-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [(row["prompt"], row["seed"]) for row in found] == [(p, s) for p in PROMPTS for s in SEEDS]
    return np.stack([np.asarray(open_picture(row["image"]), dtype=float) for row in found])


def expected(pipe) -> np.ndarray:
    """The same pictures, drawn here."""
    images = sample(pipe, [p for p in PROMPTS for _ in SEEDS], SEEDS * len(PROMPTS), **OPTIONS)
    return np.stack([np.asarray(image, dtype=float) for image in images])


@pytest.fixture(scope="module")
def of_users(world):
    """Pictures of the base, of nobody, of two users and two scales, and of a neighbourhood."""
    pipe, run, me = str(world / "sd"), str(world / "run"), str(world / "me.safetensors")
    line = ["--pipeline", *(f"{name}={pipe}" for name in ("nobody", "me", "weak", "you", "near"))]
    line += ["--user-adapter", *(f"{name}={run}" for name in ("nobody", "me", "weak", "you", "near"))]
    line += ["--user", f"me={me}", f"weak={me}", f"you={world / 'you.safetensors'}", f"near={me}"]
    line += ["--user-scale", "weak=0.3", "--consensus", "near=3"]
    sample_command.run(arguments(world, world / "users", *line))
    return world / "users"


def test_pictures_are_those_of_the_user(world, of_users):
    personal = diffpref.load_user_adapter(tiny_sd(), world / "run")
    me, you = (UserEmbedding.load(world / f"{name}.safetensors") for name in ("me", "you"))
    found = {name: drawn(of_users, name) for name in ("a", "nobody", "me", "weak", "you", "near")}
    wanted = {
        "a": tiny_sd(),
        "nobody": tiny_sd(),
        "me": personal.bound(me),
        "weak": personal.bound(me, 0.3),
        "you": personal.bound(you),
    }
    for name, pipe in wanted.items():
        assert abs(found[name] - expected(pipe)).max() <= 1, name
    assert np.array_equal(found["a"], found["nobody"])
    names = ["a", "me", "weak", "you"]
    assert min(abs(found[x] - found[y]).max() for x in names for y in names if x < y) > 1
    likes = own_taste(diffpref.users.UserEncoder.from_pretrained(world / "run" / "user_encoder"), me)
    prompts, seeds = [p for p in PROMPTS for _ in SEEDS], SEEDS * 2
    best = best_of_neighbours(personal, me, likes, prompts, seeds, k=3, **OPTIONS)
    assert abs(found["near"] - np.stack([np.asarray(x, dtype=float) for x in best])).max() <= 1
    assert abs(found["near"] - found["me"]).max() > 1


def test_the_same_command_draws_nothing_again_and_another_user_is_refused(world, tmp_path):
    whose = ["--user-adapter", str(world / "run"), "--user", str(world / "me.safetensors")]
    sample_command.run(arguments(world, tmp_path, *whose))
    before = files(tmp_path)
    sample_command.run(arguments(world, tmp_path, *whose, "--user-scale", "1"))
    assert files(tmp_path) == before
    other = [*whose[:3], str(world / "you.safetensors")]
    settings = {"user": other, "user_scale": [*whose, "--user-scale", "0.5"], "consensus": [*whose, "--consensus", "2"]}
    settings["user_adapter"] = []
    for name, line in settings.items():
        with pytest.raises(ValueError, match=rf"made with other settings \(.*pipelines.a.{name}[,)]? ?"):
            sample_command.run(arguments(world, tmp_path, *line))
    assert files(tmp_path) == before


def test_pictures_without_users_keep_their_keys(world):
    """Folders that were drawn before there were users go on."""
    source = plan.Source("a", str(world / "sd"), steps=2)
    assert set(source.settings) == {"pipeline", "lora", "steps", "guidance", "height", "width", "dtype", "variant"}


READ, ME = ["--user-adapter", "{world}/run"], ["--user", "{world}/me.safetensors"]
WRONG = {
    "a user alone": (ME, "--user needs --user-adapter"),
    "a scale alone": (["--user-scale", "1"], "--user-scale needs --user-adapter"),
    "a consensus of nobody": ([*READ, "--consensus", "2"], "--consensus needs --user"),
    "no scale": ([*READ, *ME, "--user-scale", "nan"], "--user-scale is nan; it must be a finite number"),
    "an endless scale": ([*READ, *ME, "--user-scale", "a=inf"], "--user-scale is inf"),
    "no adapter there": (["--user-adapter", "{world}/none", *ME], "none: no such user adapter"),
    "no adapter in it": (["--user-adapter", "{world}/sd", *ME], "user_adapter.safetensors: no such user adapter"),
    "no user there": ([*READ, "--user", "{tmp}/x.safetensors"], "no file .*x.safetensors"),
    "no user in it": ([*READ, "--user", "{world}/run/user_adapter.safetensors"], "holds no user of format 1"),
    "another encoder": ([*READ, "--user", "{tmp}/other.safetensors"], "tuned with the encoder .*: make the embed"),
    "another width": ([*READ, "--user", "{tmp}/wide.safetensors"], "which takes vectors of width 8"),
    "another family": (["--user-adapter", "{tmp}", *ME], "for a SD3Transformer2DModel, which the pipeline does not"),
    "a name of none": (["--user", "b=x"], "--user: no pipeline is called 'b'"),
    "no encoder": (["--user-adapter", "{tmp}/alone", *ME, "--consensus", "2"], "holds no encoder of users"),
}


@pytest.fixture(scope="module")
def wrong(world, tmp_path_factory):
    """Users and adapters that do not fit."""
    folder = tmp_path_factory.mktemp("wrong")
    encoder = UserEmbedding.load(world / "me.safetensors").encoder
    embedding(1, encoder="other").save(folder / "other.safetensors")
    embedding(1, width=6, encoder=encoder).save(folder / "wide.safetensors")
    pipe = tiny_sd3()
    trained(pipe)
    save_user_adapter(pipe.transformer, folder, {"encoder": encoder})
    (folder / "alone").mkdir()
    shutil.copy(world / "run" / "user_adapter.safetensors", folder / "alone")
    return folder


def test_an_adapter_of_other_sizes_names_the_pipeline(world, tmp_path):
    """Same family, another model: seen when the pipeline is there."""
    pipe = tiny_sdxl()
    trained(pipe)
    save_user_adapter(pipe.unet, tmp_path / "run", {})
    with pytest.raises(ValueError, match="pipeline a: this user adapter is for a model of other sizes"):
        sample_command.run(arguments(world, tmp_path / "out", "--user-adapter", str(tmp_path / "run")))
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_said_before_anything_is_drawn(world, wrong, tmp_path, mistake):
    given, message = WRONG[mistake]
    line = [text.format(world=world, tmp=wrong) for text in given]
    with pytest.raises(ValueError, match=message):
        sample_command.run(arguments(world, tmp_path / "out", *line))
    assert not (tmp_path / "out").exists()
