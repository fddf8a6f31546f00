"""diffpref score: what it writes, what it says, and what becomes of a run that ends too early."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_scorers import pictures, tiny_scorer

from diffpref.commands.score import run
from diffpref.scorer.preference import PreferenceScorer
from diffpref.scoring.unfinished import Unfinished

MANY, BROKEN = 1000, 10
COMMAND = [sys.executable, "-m", "diffpref.cli", "score"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny scorers: two of pictures and prompts, one of pictures alone."""
    place = tmp_path_factory.mktemp("models")
    tiny_scorer(place / "one", seed=0, name="one")
    tiny_scorer(place / "two", seed=1, name="two")
    tiny_scorer(place / "alone", head="affine", seed=2, name="alone", needs_prompt=False)
    return {name: str(place / name) for name in ("one", "two", "alone")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures of several kinds, and a file that is none, in order of their names."""
    place = tmp_path / "pictures"
    place.mkdir()
    first, second, third, fourth, fifth = pictures(5)
    first.save(place / "1.png")
    second.convert("L").save(place / "2.jpg")
    third.convert("CMYK").save(place / "3.jpg")
    (place / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    fourth.save(place / "5.gif", save_all=True, append_images=[fifth])  # an animation: its first frame counts
    fifth.putalpha(100)
    fifth.save(place / "6.webp")
    return place


def read(path: Path) -> list[dict]:
    """The rows of an output."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    lines = path.read_text().splitlines()
    return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines]


def score(*arguments: object) -> None:
    """The command, here."""
    run([str(argument) for argument in arguments])


def expected(model: str, files: Sequence[Path], prompts: str | list[str]) -> list[float]:
    """What the scorer itself says, a picture at a time."""
    scorer = PreferenceScorer.from_pretrained(model)
    prompts = [prompts] * len(files) if isinstance(prompts, str) else prompts
    return [float(scorer.score(images=str(f), prompts=p)) for f, p in zip(files, prompts, strict=True)]


# --- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_each_model_is_a_column_and_what_cannot_be_read_has_its_reason(folder, models, tmp_path, suffix, capsys):
    out, files = tmp_path / f"scores{suffix}", sorted(folder.iterdir())
    score(folder, "--prompts", "a red apple", "--model", models["one"], f"second={models['two']}", "--out", out)
    rows, good = read(out), [file for file in files if file.name != "4.png"]
    assert list(rows[0]) == ["path", "prompt", "one", "second", "error"]
    assert [row["path"] for row in rows] == list(map(str, files))
    assert [row["error"] or None for row in rows] == [None] * 3 + ["not a picture: no format that PIL knows"] + [
        None
    ] * 2
    assert rows[3]["one"] in (None, "") and rows[3]["second"] in (None, "")
    for column, model in (("one", "one"), ("second", "two")):
        found = [float(row[column]) for row in rows if not row["error"]]
        torch.testing.assert_close(found, expected(models[model], good, "a red apple"), atol=1e-4, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("scores")] == [out.name]
    said = capsys.readouterr().out
    assert re.search(r"^5 of 6 pictures scored; [\d.]+ images/s; mean: one -?[\d.]+, second -?[\d.]+$", said, re.M)
    assert f"1 could not be scored:\n  {files[3]}: not a picture" in said


def test_each_picture_has_its_own_prompt(folder, models, tmp_path):
    files = [folder / name for name in ("1.png", "2.jpg", "3.jpg")]
    prompts = ["a red apple", "two pears", "a boat, by night"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    score(*files, "--prompts", tmp_path / "prompts.txt", "--model", models["one"], "--out", tmp_path / "s.jsonl")
    rows = read(tmp_path / "s.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    torch.testing.assert_close([r["one"] for r in rows], expected(models["one"], files, prompts), atol=1e-4, rtol=1e-5)


def test_without_an_output_the_best_are_shown_first(folder, models, capsys):
    score(folder, "--prompts", "a red apple", "--model", models["one"], "--shown", 3)
    head, *best, summary, _, fault = capsys.readouterr().out.splitlines()
    files = [file for file in sorted(folder.iterdir()) if file.name != "4.png"]
    scores = expected(models["one"], files, "a red apple")
    ranked = sorted(zip(scores, files, strict=True), reverse=True)[:3]
    assert head.split() == ["one", "picture"]
    assert [line.split()[0] for line in best] == [f"{value:.4f}" for value, _ in ranked]
    assert all(
        f"{file.parent.name}/{file.name}  a red apple" in line for line, (_, file) in zip(best, ranked, strict=True)
    )
    assert summary.startswith("5 of 6 pictures scored") and "4.png" in fault


def test_tables_keep_their_columns_and_pictures_if_asked_for(folder, models, tmp_path):
    rows = {
        "prompt": ["a red apple", "", "two pears"],
        "image": [{"bytes": (folder / name).read_bytes(), "path": name} for name in ("1.png", "2.jpg", "6.webp")],
        "pipeline": ["base", "tuned", "base"],
        "seed": [1, 1, 2],
        "one": [0.0, 0.0, 0.0],  # of another run; taken the place of
    }
    kinds = {"image": datasets.Image(decode=False), "seed": datasets.Value("int32")}
    table = datasets.Dataset.from_dict(rows).cast_column("image", kinds["image"]).cast_column("seed", kinds["seed"])
    table.to_parquet(tmp_path / "drawn.parquet")
    score(tmp_path / "drawn.parquet", "--model", models["one"], "--keep-images", "--out", tmp_path / "s.parquet")
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "s.parquet"), cache_dir=str(tmp_path / "c"))[
        "train"
    ]
    assert found.column_names == ["file", "row", "prompt", "pipeline", "seed", "one", "error", "image"]
    assert found["pipeline"][:] == rows["pipeline"] and found["seed"][:] == [1, 1, 2] and found["row"][:] == [0, 1, 2]
    assert pq.read_schema(tmp_path / "s.parquet").metadata[b"diffpref_scores"] == b'["one"]'
    assert found[1]["one"] is None and found[1]["error"].startswith("prompt empty: ") and found[1]["image"] is None
    assert found[2]["image"].tobytes() == Image.open(folder / "6.webp").tobytes()
    values = expected(models["one"], [folder / "1.png", folder / "6.webp"], ["a red apple", "two pears"])
    torch.testing.assert_close([found[0]["one"], found[2]["one"]], values, atol=1e-4, rtol=1e-5)
    score(tmp_path / "drawn.parquet", "--model", models["two"], "--out", tmp_path / "lean.csv")
    assert list(read(tmp_path / "lean.csv")[0]) == ["file", "row", "prompt", "pipeline", "seed", "one", "two", "error"]


def test_scores_can_be_scored_again(folder, models, tmp_path):
    score(folder, "--prompts", "a red apple", "--model", models["one"], "--out", tmp_path / "first.parquet")
    score(tmp_path / "first.parquet", "--model", models["two"], "--out", tmp_path / "both.parquet")
    both, first = read(tmp_path / "both.parquet"), read(tmp_path / "first.parquet")
    assert [row["one"] for row in both] == [row["one"] for row in first]
    said = [
        json.loads(pq.read_schema(tmp_path / name).metadata[b"diffpref_scores"])
        for name in ("first.parquet", "both.parquet")
    ]
    assert said == [["one"], ["one", "two"]]
    assert [row["path"] for row in both] == [row["path"] for row in first]
    assert both[3]["error"] and [row["two"] is None for row in both] == [False] * 3 + [True] + [False] * 2


def test_columns_that_differ_in_kind_from_row_to_row_become_text(folder, models, tmp_path, monkeypatch):
    lines = [{"image": str(folder / "1.png"), "prompt": "p", "note": note} for note in (1, "x", True, None)]
    feed(monkeypatch, "\n".join(map(json.dumps, lines)).encode())
    score("-", "--model", models["one"], "--out", tmp_path / "s.parquet")
    assert [row["note"] for row in read(tmp_path / "s.parquet")] == ["1", "x", "true", None]


def test_an_address_that_cannot_be_opened_is_a_fault_of_its_row(folder, models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed
    feed(monkeypatch, f"s3://none/a.png\tp\n{folder}/1.png\tp\n".encode())
    score("-", "--model", models["one"], "--out", tmp_path / "s.jsonl")
    first, second = read(tmp_path / "s.jsonl")
    assert first["one"] is None and "s3fs" in first["error"] and second["one"] is not None
    first, second = PreferenceScorer.from_pretrained(models["one"]).stream(
        [("s3://none/a.png", "p"), (folder / "1.png", "p")]
    )
    assert first.score is None and "s3fs" in first.fault and second.fault is None


def test_scorers_of_the_picture_alone_need_no_prompt(folder, models, tmp_path):
    score(folder, "--model", models["alone"], "--out", tmp_path / "s.jsonl")
    rows = read(tmp_path / "s.jsonl")
    assert [row["alone"] is None for row in rows] == [False] * 3 + [True] + [False] * 2
    with pytest.raises(ValueError, match="no picture has a prompt; --help says where they come from"):
        score(folder, "--model", models["alone"], models["one"])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (["none"], FileNotFoundError, "there is no file or folder none"),
        (["PICS", "--out", "scores.txt"], ValueError, "scores.txt must end with one of .parquet, .csv, .jsonl"),
        (["PICS", "--out", "none/scores.csv"], FileNotFoundError, "there is no folder .*none to write scores.csv to"),
        (["PICS", "--out", "s.csv", "--keep-images"], ValueError, "only parquet files hold pictures"),
        (["PICS", "--prompts", "  "], ValueError, "--prompts: the prompt is empty"),
        (["PICS", "--prompts", "p", "--model", "no-such-model"], (ValueError, FileNotFoundError), "no-such-model"),
        (["PICS", "--model", "x", "x"], ValueError, "--model: x is there twice"),
        (["PICS", "--model", "x=a", "x=b"], ValueError, "--model: x is there twice"),
        (["PICS", "--prompts", "p", "--model", "prompt=ONE"], ValueError, "the column prompt is taken"),
        (["PICS", "--prompts", "p", "--model", "ONE", "one=TWO"], ValueError, "the column one is taken"),
        (["PICS", "--batch-size", "0"], ValueError, "must be a positive number"),
        (["PICS", "--workers", "-1"], ValueError, "expected one argument|must be a whole number"),
    ],
)
def test_mistakes_are_said_before_the_work(folder, models, arguments, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {"PICS": str(folder), "ONE": models["one"], "TWO": models["two"]}
    filled = [re.sub("PICS|ONE|TWO", lambda found: here[found[0]], argument) for argument in arguments]
    with pytest.raises(kind, match=message):
        run(filled)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_where_nothing_could_be_scored_the_reasons_are_kept_and_it_is_an_error(tmp_path, models):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "zero.png").touch()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "p" / "huge.png")
    Image.new("RGB", (4000, 2)).save(tmp_path / "p" / "thread.png")
    with pytest.raises(ValueError, match="none of 3 pictures could be scored"):
        score(tmp_path / "p", "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv")
    reasons = [row["error"] for row in read(tmp_path / "s.csv")]
    for reason, start in zip(
        reasons, ("too many pixels: 200000000", "too narrow: 4000 x 2", "picture empty"), strict=True
    ):
        assert start in reason


def test_only_some_of_many_faults_are_said(models, tmp_path, folder, capsys):
    for number in range(25):
        (folder / f"zero-{number:02d}.png").touch()
    score(folder, "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv")
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "26 could not be scored:" and len(said) == 2 + 20 + 1
    assert said[-1] == f"  and 6 more; the column error of {tmp_path / 's.csv'} has all"
    assert sum(bool(row["error"]) for row in read(tmp_path / "s.csv")) == 26


def test_no_pairs_at_all_are_an_error_and_leave_nothing(models, tmp_path, monkeypatch):
    feed(monkeypatch, b"\n")
    with pytest.raises(ValueError, match="none of 0 pictures could be scored"):
        score("-", "--model", models["one"], "--out", tmp_path / "s.parquet")
    assert not list(tmp_path.iterdir())


# --- runs that end too early ------------------------------------------------------------------------------------------


def feed(monkeypatch, content: bytes) -> None:
    """Standard input of this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def pairs(folder: Path, number: int) -> bytes:
    """Lines of paths and prompts: the same few pictures again and again."""
    return b"".join(
        f"{folder}/{1 + n % 4}.{'png' if n % 4 in (0, 3) else 'jpg'}\tp{n % 7}\n".encode() for n in range(number)
    )


def test_an_interrupted_run_keeps_its_rows_and_goes_on(folder, models, tmp_path, monkeypatch, capsys):
    options = ["--model", models["one"], "--out", tmp_path / "scores.parquet", "--batch-size", 8]
    process = subprocess.Popen(
        [*COMMAND, "-", *map(str, options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(pairs(folder, 300))
    process.stdin.flush()
    part = tmp_path / "scores.parquet.unfinished" / "0000000000.parquet"
    while not part.exists() and process.poll() is None:  # it waits for more lines, with some of these on disk
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    kept = int(
        re.search(rb"^(\d+) rows are kept in .*scores.parquet.unfinished; the same command goes on", said, re.M)[1]
    )
    assert 256 <= kept < 500 and not (tmp_path / "scores.parquet").exists()
    assert sum(pq.read_metadata(file).num_rows for file in part.parent.glob("*.parquet")) == kept

    with pytest.raises(ValueError, match="holds a run that was not finished, with other models"):
        score("-", *[models["two"] if option == models["one"] else option for option in options])
    feed(monkeypatch, pairs(folder, 300).replace(b"p3", b"a boat"))
    with pytest.raises(ValueError, match="rows of other pictures or prompts than those that are there now; --fresh"):
        score("-", *options)
    feed(monkeypatch, pairs(folder, 10))
    with pytest.raises(ValueError, match="rows of other pictures or prompts"):
        score("-", *options)

    feed(monkeypatch, pairs(folder, 320))
    capsys.readouterr()
    score("-", *options)
    assert f"240 of 320 pictures scored, {kept} of them before" in capsys.readouterr().out
    assert not part.parent.exists()
    feed(monkeypatch, pairs(folder, 320))
    score("-", *options[:2], "--out", tmp_path / "whole.parquet", "--batch-size", 8)
    went_on, whole = read(tmp_path / "scores.parquet"), read(tmp_path / "whole.parquet")
    for one, other in zip(went_on, whole, strict=True):
        assert {**one, "one": None} == {**other, "one": None}
        assert one["one"] == pytest.approx(other["one"], abs=1e-4)


def test_fresh_begins_anew_and_half_a_file_is_no_file(folder, models, tmp_path):
    left = tmp_path / "s.csv.unfinished"
    score(folder, "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv")
    whole = (tmp_path / "s.csv").read_bytes()
    left.mkdir()
    (left / "0000000000.half").write_bytes(b"PAR1")  # of a process that was killed while it wrote
    (left / "_request.json").write_text('{"models": []}')
    score(folder, "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv", "--overwrite")
    assert (tmp_path / "s.csv").read_bytes() == whole
    left.mkdir()
    pq.write_table(pq.read_table(io.BytesIO(parquet_of(whole))), left / "0000000000.parquet")
    (left / "_request.json").write_text('{"models": []}')
    score(folder, "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv", "--fresh", "--overwrite")
    assert (tmp_path / "s.csv").read_bytes() == whole and not left.exists()


def test_a_finished_file_is_replaced_only_if_asked_to(folder, models, tmp_path):
    line = [folder, "--prompts", "p", "--model", models["one"], "--out", tmp_path / "s.csv"]
    (tmp_path / "s.csv").write_text("mine")
    for more in ([], ["--fresh"]):
        with pytest.raises(ValueError, match="s.csv is there already; --overwrite replaces it"):
            score(*line, *more)
    assert (tmp_path / "s.csv").read_text() == "mine" and not (tmp_path / "s.csv.unfinished").exists()
    score(*line, "--overwrite")
    assert len(read(tmp_path / "s.csv")) == 6


def test_two_runs_do_not_write_to_one_file(folder, models, tmp_path, monkeypatch):
    """Nor does the second one throw away what the first has, or replace what it wrote."""
    options = ["-", "--model", models["one"], "--out", str(tmp_path / "s.jsonl"), "--batch-size", "8"]
    process = subprocess.Popen([*COMMAND, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(pairs(folder, 300))
    process.stdin.flush()
    part = tmp_path / "s.jsonl.unfinished" / "0000000000.parquet"
    while not part.exists() and process.poll() is None:  # it waits for more lines
        time.sleep(0.05)
    for more in ([], ["--fresh"]):
        feed(monkeypatch, pairs(folder, 3))
        with pytest.raises(ValueError, match="s.jsonl.unfinished is in use by another run; wait for it, or give anoth"):
            score(*options, *more)
    assert part.exists()
    process.communicate()
    assert process.returncode == 0 and len(read(tmp_path / "s.jsonl")) == 300


def test_a_run_is_held_until_it_is_closed(tmp_path):
    first = Unfinished(tmp_path / "s.csv", {}, {})
    with pytest.raises(ValueError, match="s.csv.unfinished is in use by another run"):
        Unfinished(tmp_path / "s.csv", {}, {}, fresh=True)
    first.remove()
    second = Unfinished(tmp_path / "s.csv", {}, {})  # the folder is another one
    first.close()
    with pytest.raises(ValueError, match="is in use by another run"):
        Unfinished(tmp_path / "s.csv", {}, {})
    second.close()
    Unfinished(tmp_path / "s.csv", {}, {}).close()


def parquet_of(content: bytes) -> bytes:
    """A CSV file as a parquet file."""
    file = io.BytesIO()
    datasets.Dataset.from_list(list(csv.DictReader(io.StringIO(content.decode())))).to_parquet(file)
    return file.getvalue()


# --- many -------------------------------------------------------------------------------------------------------------


def test_a_thousand_pictures_of_which_one_percent_is_broken(models, tmp_path, capsys):
    place = tmp_path / "pictures"
    place.mkdir()
    good = [picture.resize((24, 24)) for picture in pictures(20)]
    for number in range(MANY):
        good[number % 20].save(place / f"{number:04d}.png")
    broken = [place / f"{number:04d}.png" for number in range(50, MANY, MANY // BROKEN)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:100])
    score(place, "--prompts", "a red apple", "--model", models["one"], "--out", tmp_path / "s.jsonl")
    said = capsys.readouterr().out
    assert said.startswith(f"{MANY - BROKEN} of {MANY} pictures scored; ")
    assert [line.split(":")[0].strip() for line in said.splitlines()[2:]] == list(map(str, broken))
    rows = read(tmp_path / "s.jsonl")
    assert len(rows) == MANY and [row["path"] for row in rows if row["error"]] == list(map(str, broken))
    assert all((row["one"] is None) == bool(row["error"]) for row in rows)


MEASURE = """
import resource, sys
from diffpref.commands.score import run
peaks = []
for folder in sys.argv[2:]:
    out = ["--out", folder + ".parquet", "--overwrite"]
    run([folder, "--prompts", "a red apple", "--model", sys.argv[1], "--workers", "2", *out])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[-1] - peaks[-2])
"""


def test_memory_does_not_grow_with_the_folder(models, tmp_path):
    """Decoded, the pictures that the larger folder has more weigh 118 MB; prepared for the model, 7.4 MB."""
    few, many, drawn = tmp_path / "few", tmp_path / "many", tmp_path / "drawn.png"
    Image.new("RGB", (256, 256), "red").save(drawn)
    for place, number in ((few, 150), (many, 750)):
        place.mkdir()
        for one in range(number):
            os.link(drawn, place / f"{one}.png")
    # The first run is for what a process takes only once.
    command = [sys.executable, "-c", MEASURE, models["one"], str(few), str(few), str(many)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 6  # MB
