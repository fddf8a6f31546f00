"""diffpref sample: every picture is what its pipeline, prompt and seed make it, however the command was run."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from tiny_pipelines import tiny_sd, tiny_sd3, tiny_sdxl
from tiny_runs import ENV, ROOT

from diffpref.adapters import add_lora, save_lora
from diffpref.commands import sample as command
from diffpref.config import LoraSettings
from diffpref.families import family_of
from diffpref.synpic.draw import draw_batch, open_pipeline, pipeline_options
from diffpref.synpic.plan import Picture, Source, read_prompts, read_seeds

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a cat", "a dog, flat", "red"], [0, 1, 2], 2, 3.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline, a LoRA on it that changes something, and a file of prompts."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny_sd()
    pipe.save_pretrained(folder / "sd")
    family = family_of(pipe)
    add_lora(pipe.unet, family, LoraSettings(rank=2), seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, pipe.unet.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    save_lora(pipe, pipe.unet, folder / "run")
    (folder / "run" / "checkpoint-1").mkdir()  # as a run's folder has them
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "", PROMPTS[0], f"  {PROMPTS[2]} "]) + "\n")
    return folder


def arguments(world: Path, out: str, *more: str) -> list[str]:
    pipelines = ["--pipeline", f"base={world / 'sd'}", f"tuned={world / 'sd'}", "--lora", f"tuned={world / 'run'}"]
    wanted = ["--prompts", str(world / "prompts.txt"), "--seeds", "3", "--steps", "2", "--guidance", "3", "tuned=2"]
    how = ["--shard-size", "4", "--batch-size", "3", "--device", "cpu"]
    return [*pipelines, *wanted, *how, "--out", str(world / out), *more]


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """A folder whose pictures were drawn without interruption."""
    command.run(arguments(world, "whole"))
    return world / "whole"


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_one_picture_of_each_pipeline_for_each_prompt_and_seed(whole):
    found = rows(whole)
    wanted = [(name, prompt, seed) for name in ("base", "tuned") for prompt in PROMPTS for seed in SEEDS]
    assert [(row["pipeline"], row["prompt"], row["seed"]) for row in found] == wanted
    assert len({row["key"] for row in found}) == len(found)
    sizes = {path.name: pq.read_metadata(path).num_rows for path in sorted(whole.glob("*.parquet"))}
    assert sizes == {f"{name}-{i:05d}.parquet": (4, 4, 1)[i] for name in ("base", "tuned") for i in range(3)}


def test_pictures_are_those_of_stock_diffusers(world, whole):
    """Of the pipeline alone, and of the pipeline with load_lora_weights, to the rounding of other batches."""
    data = load_dataset("parquet", data_files=str(whole / "*.parquet"), split="train", cache_dir=str(world / "hf"))
    pipe, pictures = tiny_sd(), {}
    for name, guidance in (("base", 3.0), ("tuned", 2.0)):
        if name == "tuned":
            pipe.load_lora_weights(str(world / "run"))
        options = {"num_inference_steps": STEPS, "guidance_scale": guidance}
        for row in (row for row in data if row["pipeline"] == name):
            drawn = pipe(row["prompt"], generator=torch.Generator().manual_seed(row["seed"]), **options).images[0]
            assert abs(np.asarray(row["image"], dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1
            pictures[name, row["prompt"], row["seed"]] = np.asarray(drawn, dtype=int)
    differ = [abs(pictures["base", p, s] - pictures["tuned", p, s]).max() for p in PROMPTS for s in SEEDS]
    assert min(differ) > 10, "the LoRA is on"


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3], ids=["sdxl", "sd3"])
def test_other_families_in_a_size_and_dtype_of_their_own(tmp_path, make):
    make().save_pretrained(tmp_path / "pipe")
    line = ["--pipeline", f"p={tmp_path / 'pipe'}", "--prompts", "a cat", "--steps", "1", "--out", str(tmp_path / "o")]
    command.run([*line, "--width", "p=48", "--dtype", "bfloat16", "--device", "cpu"])
    (row,) = rows(tmp_path / "o")
    data = load_dataset("parquet", data_files=str(tmp_path / "o/*.parquet"), cache_dir=str(tmp_path / "hf"))
    assert row["seed"] == 0 and data["train"][0]["image"].size == (48, 32)


def test_what_is_not_said_is_the_pipelines_own():
    assert pipeline_options(Source("a", "a"), tiny_sd()) == {
        "num_inference_steps": 50, "guidance_scale": 7.5, "height": None, "width": None,
    }  # fmt: skip
    own = pipeline_options(Source("a", "a", guidance=0.0), tiny_sd3())
    assert (own["num_inference_steps"], own["guidance_scale"]) == (28, 0.0)


# --- stopped, shared, gone on with ------------------------------------------------------------------------------------


def test_what_is_there_is_not_drawn_again(world, whole, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    command.run(arguments(world, "whole"))
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert "0 pictures drawn, 18 were there" in capsys.readouterr().out


def test_ctrl_c_loses_at_most_one_shard(world, whole, monkeypatch):
    """Pressed as soon as the first shard has its name."""
    folder, rename = world / "stopped", Path.replace

    def press(path: Path, target: Path) -> Path:
        named = rename(path, target)
        if target.suffix == ".parquet":
            os.kill(os.getpid(), signal.SIGINT)
        return named

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", press)
        command.run(arguments(world, "stopped"))
    kept, all_of_it = files(folder), files(whole)
    assert 0 < len(kept) < len(all_of_it) and kept.items() <= all_of_it.items(), "whole shards, and no halves"
    command.run(arguments(world, "stopped"))
    assert files(folder) == all_of_it


KILL = """
import os, signal, sys
seen = []
def hook(event, args):
    if event == "os.rename" and ".parquet." in str(args[0]):
        seen.append(args)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from diffpref.commands.sample import run
run(sys.argv[1:])
"""


def test_killed_and_resumed_equals_uninterrupted(world, whole, monkeypatch, capsys):
    """Killed between writing the fourth shard and giving it its name; two processes draw what is left, each the shards
    that are its own by what a launcher tells it."""
    line = arguments(world, "killed")
    done = subprocess.run([sys.executable, "-c", KILL, *line], cwd=ROOT, env=ENV, capture_output=True, text=True)
    folder = world / "killed"
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.glob("*.parquet"))) == 3 and len(list(folder.glob(".*.tmp"))) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        command.run(line)
    said = [line.partition(";")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("process")]
    assert said == ["process 1: 5 pictures drawn, 4 were there", "process 0: 4 pictures drawn, 5 were there"]
    assert files(folder) == files(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [("torch.distributed.run", 2), ("accelerate.commands.launch", 1)])
def test_launched_equals_plain(world, whole, launcher, processes):
    """As a user gives it; on a CPU accelerate's own launcher starts one process only."""
    folder = f"launched-{processes}"
    options = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    options = options if processes == 1 else ["--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, "-m", launcher, *options, "-m", "diffpref.cli", "sample", *arguments(world, folder)]
    done = subprocess.run(line, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(world / folder) == files(whole)
    assert done.stdout.count("pictures drawn") == processes


def test_a_shard_that_is_damaged_is_drawn_again(world, whole):
    expected, path = files(whole), whole / "tuned-00002.parquet"
    path.write_bytes(expected[path.name][:-20])
    command.run(arguments(world, "whole"))
    assert files(whole) == expected


def test_a_full_disk_keeps_what_was_finished(world, whole):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the last shards, of one picture, would fit
    try:
        with pytest.raises(OSError, match=r"cannot write .*base-00000.parquet .*what was finished before is kept"):
            command.run(arguments(world, "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert set(files(world / "full")) == {"settings.json"}


# --- no others among them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        (["--steps", "tuned=5"], "pipelines.tuned.steps"),
        (["--dtype", "bfloat16"], "pipelines.base.dtype, pipelines.tuned.dtype"),
        (["--lora", "base={world}/run"], "pipelines.base.lora"),
    ],
)
def test_other_settings_are_refused_by_name(world, whole, more, keys):
    line = arguments(world, "whole", *[text.format(world=world) for text in more])
    with pytest.raises(ValueError, match=f"made with other settings \\({keys}, see .*settings.json\\)"):
        command.run(line)


def test_other_prompts_seeds_shards_and_weights_are_refused(world, whole, tmp_path):
    tiny_sd(seed=1).save_pretrained(tmp_path / "other")
    other = ["--pipeline", f"base={tmp_path / 'other'}", "--prompts", *PROMPTS, "red!"]
    with pytest.raises(ValueError) as refused:
        command.run([*other, "--steps", "2", "--guidance", "3", "--seeds", "2", "--out", str(whole)])
    keys = "pipelines.base.pipeline, prompts.count, prompts.sha256, seeds, shard_size"
    assert f"made with other settings ({keys}, see" in str(refused.value)


def test_another_scheduler_in_the_same_place_is_refused(world, whole, tmp_path):
    shutil.copytree(world / "sd", tmp_path / "sd")
    config = tmp_path / "sd/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"steps_offset": 1', '"steps_offset": 0'))
    line = ["--pipeline", f"base={tmp_path / 'sd'}", "--prompts", *PROMPTS, "--seeds", "3", "--shard-size", "4"]
    with pytest.raises(ValueError, match=r"other settings \(pipelines.base.pipeline, see"):
        command.run([*line, "--steps", "2", "--guidance", "3", "--out", str(whole)])


def test_a_folder_that_moved_is_the_same_and_pipelines_can_be_added(world, whole):
    """Weights are known by their contents, not by where they lie."""
    (world / "moved").symlink_to(world / "sd")
    expected, short = files(whole), ["--prompts", *PROMPTS, "--seeds", "0-2", "--shard-size", "4", "--guidance", "3"]
    line = ["--pipeline", f"base={world / 'moved'}", f"third={world / 'sd'}", "--steps", "2", "third=1", *short]
    command.run([*line, "--device", "cpu", "--out", str(whole)])
    now = files(whole)
    assert {name for name in now if now[name] != expected.get(name)} == {
        "settings.json", "third-00000.parquet", "third-00001.parquet", "third-00002.parquet",
    }  # fmt: skip
    assert list(json.loads(now["settings.json"])["pipelines"]) == ["base", "tuned", "third"]
    for number in range(3):
        (whole / f"third-{number:05d}.parquet").unlink()
    (whole / "settings.json").write_bytes(expected["settings.json"])


def test_a_folder_of_other_files_is_left_alone(tmp_path, world):
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="holds parquet files and no settings.json; give another --out"):
        command.run([*arguments(world, "x"), "--out", str(tmp_path)])


# --- mistakes ---------------------------------------------------------------------------------------------------------

PIPE = ["--pipeline", "a={world}/sd"]
MISTAKES = {
    "no name": (["--pipeline", "{world}/sd"], "say NAME=PATH"),
    "a name that is no file's": (["--pipeline", "a/b={world}/sd"], "--pipeline a/b: say NAME=PATH, the name of"),
    "a name twice": (["--pipeline", "a=x", "a=y"], "--pipeline is given twice for a"),
    "a name of none": ([*PIPE, "--lora", "b=x"], "--lora: no pipeline is called 'b'; there are a"),
    "two for all": ([*PIPE, "--steps", "2", "3"], "--steps is given twice for all pipelines"),
    "steps of none": ([*PIPE, "--steps", "a=0"], "argument --steps: must be a positive number"),
    "guidance of words": ([*PIPE, "--guidance", "high"], "invalid float value: 'high'"),
    "a dtype": ([*PIPE, "--dtype", "int8"], "must be float32, bfloat16 or float16, got 'int8'"),
    "no pipeline there": (["--pipeline", "a={world}/none"], "pipeline a: .*none"),
    "no hub id": (["--pipeline", "a=some/thing/else"], "there is nothing at some/thing/else, and a hub id it is not"),
    "no pipeline in it": (["--pipeline", "a={world}/run"], "pipeline a: .*model_index.json"),
    "the second one": ([*PIPE, "b={world}/none"], "pipeline b: .*none"),
    "no LoRA there": ([*PIPE, "--lora", "{world}/no.safetensors"], "pipeline a: there is nothing at .*no.safetensors"),
    "no file of prompts": ([*PIPE, "--prompts", "no.txt"], "there is no file no.txt"),
    "no prompt": ([*PIPE, "--prompts", " "], "there is no prompt among them"),
    "seeds": ([*PIPE, "--seeds", "5-3"], "'5-3' is neither a seed nor a range of seeds"),
    "no seeds": ([*PIPE, "--seeds", "0"], "give their number, or different seeds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_before_anything_is_drawn(world, tmp_path, mistake):
    given, message = MISTAKES[mistake]
    given = [text.format(world=world) for text in given]
    prompts = [] if "--prompts" in given else ["--prompts", "a cat"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run([*given, *prompts, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("*.parquet"))


def test_numbers_that_are_none_name_the_pipeline(world):
    pipe = open_pipeline(Source("sick", str(world / "sd")), torch.device("cpu"))
    torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.inf)
    with pytest.raises(ValueError, match="pipeline sick: sampling made NaN or infinite pixels"):
        draw_batch(pipe, Source("sick", ""), [Picture("a", 0, "")], {"num_inference_steps": 1, "guidance_scale": 1.0})


def test_prompts_and_seeds_as_they_can_be_given(world):
    assert read_prompts([str(world / "prompts.txt"), "red", "a bird. red"]) == (*PROMPTS, "a bird. red")
    (world / "odd.txt").write_bytes("one\u2028two\r\nthree\r\n".encode())
    assert read_prompts([str(world / "odd.txt")]) == ("one\u2028two", "three")
    assert read_seeds(["3"]) == (0, 1, 2) and read_seeds(["7-7"]) == (7,) and read_seeds(["9", "2-4"]) == (9, 2, 3, 4)
    with pytest.raises(ValueError, match="different seeds"):
        read_seeds(["3", "2-4"])
