"""Where the score command finds pictures and their prompts."""

import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_scorers import pictures

from diffpref.scoring.items import Item, called
from diffpref.scoring.lines import Lines
from diffpref.scoring.prompts import Lined, Named, Same, said, with_prompts
from diffpref.scoring.run import check
from diffpref.scoring.sources import Reading, Sources, sources


def found(*names: object, stdin: bytes = b"", **reading) -> list[Item]:
    """The items of what the command line names."""
    return list(sources([str(name) for name in names], Reading(**reading), stdin.splitlines(True)).items())


def named(items: list[Item], folder: Path) -> list[str]:
    """Their names, without the folder."""
    return [item.name.replace(f"{folder}/", "") for item in items]


def prompts(*names: object, given: str | None = None, **reading) -> list[str | None]:
    """The prompts of items."""
    return [item.prompt for item in with_prompts(found(*names, **reading), said(given) if given else None)]


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    pictures(1, seed=number)[0].save(file, kind)
    return file.getvalue()


def fill(folder: Path, *files: str) -> Path:
    """A folder with pictures of these names, and text in those that end with .txt."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(f"says {file}\n".encode() if file.endswith(".txt") else encoded())
    return folder


def shard(path: Path, files: dict[str, bytes | str]) -> Path:
    """A webdataset archive."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def written(target: Path, **columns: list) -> Path:
    """A parquet file."""
    pq.write_table(pa.table(columns), target)
    return target


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_the_folders_in_it_sorted(tmp_path):
    fill(tmp_path, "b.png", "a.PNG", "sub/c.jpeg", ".hidden.png", ".git/d.png", "x.csv.unfinished/e.png", "notes.md")
    assert named(found(tmp_path), tmp_path) == ["a.PNG", "b.png", "sub/c.jpeg"]


def test_globs_files_and_folders_together_are_each_picture_once(tmp_path):
    fill(tmp_path, "a.png", "b.png", "c.jpg", "odd")
    items = found(tmp_path / "odd", tmp_path / "?.png", tmp_path)  # a file that is named needs no suffix
    assert named(items, tmp_path) == ["odd", "a.png", "b.png", "c.jpg"]
    assert items[1].where == {"path": f"{tmp_path}/a.png"}


def test_a_folder_may_hold_tables_and_shards_but_not_the_output(tmp_path):
    fill(tmp_path, "a.png", "c.png")
    written(tmp_path / "b.parquet", image=[encoded()], prompt=["one"])
    shard(tmp_path / "d.tar", {"1.png": encoded(), "1.txt": "two"})
    written(tmp_path / "scores.parquet", path=["a.png"])
    items = found(tmp_path, apart=str(tmp_path / "scores.parquet"))
    assert named(items, tmp_path) == ["a.png", "b.parquet, row 0", "c.png", "d.tar, 1"]


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("none", FileNotFoundError, "there is no file or folder .*none"),
        ("*.webp", FileNotFoundError, "no file fits .*webp"),
        ("empty", FileNotFoundError, "no pictures, parquet files or shards in the folder .*empty"),
        ("list.csv", ValueError, "list.csv is no picture; a list of prompts goes to --prompts"),
        ("text.parquet", ValueError, "text.parquet cannot be read"),
        ("text.tar", ValueError, "text.tar cannot be read"),
    ],
)
def test_what_is_not_there_or_no_picture_is_said_at_once(tmp_path, name, kind, message):
    (tmp_path / "empty").mkdir()
    for file in ("list.csv", "text.parquet", "text.tar"):
        (tmp_path / file).write_text("file_name,prompt\n" * 40)
    with pytest.raises(kind, match=message):
        check(sources([str(tmp_path / name)], Reading()), None)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_brings_its_prompts_and_other_columns(tmp_path):
    picture = {"bytes": encoded(), "path": "x.png"}
    path = written(
        tmp_path / "t.parquet",
        prompt=["one", None],
        image=[picture, None],
        seed=pa.array([1, 2], pa.int32()),
        mask=[b"m", b"n"],
    )
    first, second = found(path)
    assert (first.where, first.prompt, first.picture) == ({"file": str(path), "row": 0}, "one", picture)
    assert first.columns == {"seed": 1}
    assert second.prompt is None and second.fault == "picture missing: the column image is empty"
    assert found(path, keep=True)[0].columns == {"seed": 1, "mask": b"m"}


def test_paths_in_a_table_begin_in_its_folder_or_here(tmp_path, monkeypatch):
    fill(tmp_path / "data", "a.png")
    fill(tmp_path, "b.png")
    monkeypatch.chdir(tmp_path)
    items = found(written(tmp_path / "data" / "t.parquet", path=["a.png", "b.png"], caption=["one", "two"]))
    assert [item.picture["path"] for item in items] == [str(tmp_path / "data" / "a.png"), "b.png"]
    assert [item.prompt for item in items] == ["one", "two"]
    assert [item.columns for item in items] == [{"path": "a.png"}, {"path": "b.png"}]


def test_a_table_larger_than_one_batch_is_numbered_through(tmp_path):
    path = written(tmp_path / "t.parquet", image=[encoded()] * 70, text=[f"p{n}" for n in range(70)])
    items = found(path)
    assert [item.where["row"] for item in items] == list(range(70)) and items[69].prompt == "p69"
    assert sources([str(path)], Reading()).counts() == [70]


def test_a_table_whose_picture_is_not_clear_says_which_columns_there_are(tmp_path):
    two = written(tmp_path / "two.parquet", chosen=[encoded()], rejected=[encoded(1)], prompt=["p"])
    with pytest.raises(ValueError, match="several columns of pictures, chosen, rejected; --image-column says which"):
        found(two)
    assert found(two, picture="rejected", prompt="prompt")[0].picture["bytes"] == encoded(1)
    with pytest.raises(ValueError, match="no column of pictures; .*its columns: prompt"):
        found(written(tmp_path / "none.parquet", prompt=["p"]))
    with pytest.raises(ValueError, match="has no column 'picture'; its columns are chosen, rejected, prompt"):
        found(two, picture="picture")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_a_shard_brings_keys_prompts_and_other_columns(tmp_path):
    path = shard(
        tmp_path / "s.tar",
        {
            "a/17.png": encoded(),
            "a/17.txt": "one",
            "a/17.json": json.dumps({"seed": 3, "tags": ["x"]}),
            "a/18.jpg": encoded(1, "JPEG"),
            "a/18.json": json.dumps({"caption": "two"}),
            "a/18.npy": b"\x93NUMPY",
        },
    )
    first, second = found(path)
    assert first.where == {"file": str(path), "key": "a/17"} and first.prompt == "one"
    assert first.columns == {"seed": 3, "tags": '["x"]'}
    assert second.prompt == "two" and second.columns == {} and second.picture["bytes"] == encoded(1, "JPEG")
    assert found(path, keep=True)[1].columns == {"npy": b"\x93NUMPY"}
    assert sources([str(path)], Reading()).counts() == [2]


def test_samples_that_lack_something_do_not_stop_the_others(tmp_path):
    files = {"1.txt": "no picture", "2.png": encoded(), "2.json": "{", "3.gif": encoded(0, "GIF"), "3.txt": "three"}
    files |= {"4.left.png": encoded(), "4.right.png": encoded(), "5.png": encoded(), "5.txt": b"\xff"}
    items = found(shard(tmp_path / "s.tar", files))
    assert [item.fault and item.fault.partition(":")[0] for item in items] == [
        "picture missing",
        "sample damaged",
        None,
        "picture missing",
        "sample damaged",
    ]
    assert items[2].prompt == "three" and "its json file" in items[1].fault and "its txt file" in items[4].fault


def test_numbered_pictures_need_a_name(tmp_path):
    path = shard(tmp_path / "s.tar", {"1.jpg_0.png": encoded(), "1.jpg_1.png": encoded(1), "1.txt": "p"})
    assert found(path)[0].fault == "several pictures: jpg_0, jpg_1; --image-column says which is meant"
    assert found(path, picture="jpg_1")[0].picture["bytes"] == encoded(1)


def test_a_shard_that_breaks_off_is_scored_as_far_as_it_goes(tmp_path):
    path = shard(tmp_path / "s.tar", {f"{n}.{kind}": encoded(n) for n in range(4) for kind in ("png", "bmp")})
    path.write_bytes(path.read_bytes()[:-14_000])
    items = found(path)
    assert [item.where["key"] for item in items[:2]] == ["0", "1"] and items[0].fault is None
    assert items[-1].fault.startswith("shard damaged: unexpected end of data")


# --- standard input ---------------------------------------------------------------------------------------------------


def test_lines_are_tabs_json_or_paths_alone():
    lines = b'a.png\tone\r\n\n{"image": "b.png", "caption": "two", "seed": 1, "tags": [1]}\nc.png\nd.png\t\n'
    items = found("-", stdin=lines)
    assert [(item.where["path"], item.prompt) for item in items] == [
        ("a.png", "one"),
        ("b.png", "two"),
        ("c.png", None),
        ("d.png", ""),
    ]
    assert items[1].columns == {"seed": 1, "tags": "[1]"}


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"image": "a.png"', "line damaged: "),
        (b'{"prompt": "p"}', "picture missing: the line names none of file_name, path, image, file"),
        (b'{"image": 3}', "picture missing"),
        (b"\xff\xfe.png\tp", "line damaged: .*utf-8"),
    ],
)
def test_a_line_that_says_nothing_is_a_fault_of_its_own(line, message):
    first, second = Lines([b"\n", line, b"b.png\tp\n"]).items()
    assert first.name == "standard input, row 2" and second.fault is None
    assert re.match(message, first.fault)


def test_standard_input_comes_alone():
    with pytest.raises(ValueError, match='"-" reads all pairs from standard input; leave the other pictures out'):
        found("-", "a.png")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_text_or_a_file_of_them(tmp_path):
    assert said("a red apple, 3.5 inches") == Same("a red apple, 3.5 inches")
    (tmp_path / "p.txt").write_text("one\ntwo \n")
    assert said(str(tmp_path / "p.txt")) == Lined(["one", "two"])
    (tmp_path / "one.txt").write_text("\ufeffthe only one")
    assert said(str(tmp_path / "one.txt")) == Same("the only one")
    (tmp_path / "p.csv").write_text('file_name,text\na.png,"one, two"\nsub/./b.png,three\n')
    assert said(str(tmp_path / "p.csv")) == Named({"a.png": "one, two", "sub/b.png": "three"}, str(tmp_path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("", "", "--prompts: the prompt is empty"),
        ("p.txt", "", "p.txt is empty"),
        ("p.txt", "one\n\ntwo\n", "p.txt, line 2: the prompt is empty"),
        ("p.txt", b"\xff\xfe", "p.txt is no UTF-8 text"),
        ("p.csv", "name,prompt\na.png,one\n", "p.csv, row 1: a picture's file .* it has name, prompt"),
        ("p.jsonl", '{"file_name": "a.png", "prompt": 3}\n', "p.jsonl, row 1: a picture's file"),
        ("p.jsonl", '{"file_name": "a.png", "prompt": "one"}\n[1]\n', "p.jsonl, line 2 is no JSON object"),
        ("p.csv", "file_name,prompt\na.png,one\na.png,two\n", "row 2: another prompt of a.png stands in a row above"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        said(str(tmp_path / name) if name else content)


def test_prompts_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path):
    odd = "one\u2028two\x85three\x0cfour"
    (tmp_path / "p.txt").write_bytes(f"{odd}\r\nlast\r\n".encode())
    assert said(str(tmp_path / "p.txt")) == Lined([odd, "last"])
    (tmp_path / "p.csv").write_text(f'file_name,prompt\na.png,{odd}\nb.png,"two\nlines"\n')
    assert said(str(tmp_path / "p.csv")).prompts == {"a.png": odd, "b.png": "two\nlines"}
    line = json.dumps({"file_name": "a.png", "prompt": odd}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(f"{line}\n\n")
    assert said(str(tmp_path / "p.jsonl")).prompts == {"a.png": odd}
    assert found("-", stdin=f"{line}\n".encode())[0].prompt == odd


def test_a_file_of_prompts_that_is_not_there_is_no_prompt():
    with pytest.raises(FileNotFoundError, match="--prompts: there is no file none.txt"):
        said("none.txt")


def test_a_line_each_goes_in_the_order_of_the_pictures_and_numbers_must_agree(tmp_path):
    fill(tmp_path / "p", "b.png", "a.png")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    assert prompts(tmp_path / "p", given=str(tmp_path / "two.txt")) == ["one", "two"]
    (tmp_path / "three.txt").write_text("one\ntwo\nthree\n")
    three = said(str(tmp_path / "three.txt"))
    with pytest.raises(ValueError, match="--prompts: 3 lines for 2 pictures; give one for each, or one for all"):
        check(sources([str(tmp_path / "p")], Reading()), three)
    with pytest.raises(ValueError, match="3 lines for pairs from standard input"):
        check(Sources((Lines([]),)), three)


def test_a_line_each_is_refused_where_numbers_in_names_leave_the_order_open(tmp_path):
    fill(tmp_path / "p", *(f"{number}.png" for number in range(1, 11)))
    lines = tmp_path / "ten.txt"
    lines.write_text("\n".join(f"prompt {number}" for number in range(1, 11)))
    with pytest.raises(ValueError, match=r"but is .*/10.png before .*/2.png, or after it\? Give a list with the names"):
        check(sources([str(tmp_path / "p")], Reading()), said(str(lines)))
    (tmp_path / "p" / "10.png").rename(tmp_path / "p" / "x10.png")
    assert check(sources([str(tmp_path / "p")], Reading()), said(str(lines))) == (10, True)


def test_a_list_names_pictures_from_its_folder_from_theirs_or_by_their_names(tmp_path):
    fill(tmp_path / "pics", "sub/a.png", "b.png", "c.png", "d.png")
    rows = [("pics/sub/a.png", "one"), ("c.png", "three"), (str(tmp_path / "pics" / "b.png"), "two")]
    lines = "".join(json.dumps({"file_name": name, "prompt": prompt}) + "\n" for name, prompt in rows)
    (tmp_path / "list.jsonl").write_text(lines)
    assert prompts(tmp_path / "pics", given=str(tmp_path / "list.jsonl")) == ["two", "three", None, "one"]


def test_a_bare_name_is_no_picture_of_a_folder_below(tmp_path):
    fill(tmp_path / "p", "a.png", "sub/a.png", "sub/b.png")
    (tmp_path / "p" / "metadata.csv").write_text("file_name,prompt\na.png,one\nb.png,two\n")
    assert prompts(tmp_path / "p") == ["one", None, None]
    elsewhere = (tmp_path / "p" / "metadata.csv").rename(tmp_path / "list.csv")
    assert prompts(tmp_path / "p", given=str(elsewhere)) == ["one", None, None]
    assert prompts(tmp_path / "p" / "**" / "*.png", given=str(elsewhere)) == ["one", None, None]
    assert prompts(tmp_path / "p" / "sub" / "?.png", given=str(elsewhere)) == ["one", "two"]
    assert prompts(tmp_path / "p" / "sub" / "b.png", given=str(elsewhere)) == ["two"]


def test_prompts_beside_pictures(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "sub/b.png", "c.png", "d.png", "d.txt")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\nsub/b.png,listed\na.png,says a.txt\n")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    assert prompts(tmp_path) == ["says a.txt", None, None, "listed"]
    assert prompts(tmp_path, sidecars=False) == [None] * 4
    assert [item.fault for item in found(tmp_path)][2].startswith("prompt damaged: ")


def test_two_prompts_of_one_picture_are_refused(tmp_path):
    fill(tmp_path, "a.png", "b.png", "b.txt")
    (tmp_path / "b.txt").write_text("a pear\n")
    everything = sources([str(tmp_path)], Reading())
    assert check(everything, said("a pear")) == (2, True)
    with pytest.raises(ValueError, match=r"b.png has two prompts: .*'a pear'; --prompts says 'x'.*--no-sidecars"):
        check(everything, said("x"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "prompt": "y"}\n')
    with pytest.raises(ValueError, match=r"b.txt says 'a pear'; .*metadata.jsonl says 'y'"):
        check(everything, None)
    (tmp_path / "metadata.jsonl").write_text('{"chosen_file_name": "b.png"}\n')
    with pytest.raises(ValueError, match=r"row 1: .* it has chosen_file_name \(--no-sidecars does not"):
        check(everything, None)
    (tmp_path / "metadata.csv").write_text("file_name,prompt\nb.png,y\n")
    with pytest.raises(ValueError, match="both give prompts"):
        check(everything, None)


def test_prompts_beside_those_of_a_table_are_refused_before_it_is_read(tmp_path):
    path = written(tmp_path / "t.parquet", image=[encoded()], prompt=["one"])
    with pytest.raises(ValueError, match="row 0 has two prompts: its own place says 'one'; --prompts says 'two'"):
        check(sources([str(path)], Reading()), said("two"))


def test_whether_any_prompt_is_there(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    assert check(sources([str(tmp_path)], Reading()), None) == (2, False)
    assert check(Sources((Lines([]),)), None) == (None, True)


def test_names_of_items():
    assert called({"path": "a.png"}) == "a.png"
    assert called({"file": "t.parquet", "row": 3, "path": "a.png"}) == "t.parquet, row 3"
    assert called({"file": "s.tar", "key": "17", "row": None}) == "s.tar, 17"
