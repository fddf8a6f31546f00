"""Whatever people hold pictures and prompts in becomes the same pictures and prompts, or is refused with the mend."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scorers import CONTEXT, TINY, pictures, tiny_scorer, tiny_towers

from diffpref.scorer.inputs import files, known_length, one_by_one, open_any, paired
from diffpref.scorer.tokens import count, make_tokenizer


@pytest.fixture
def three() -> list[Image.Image]:
    return pictures(3, size=(24, 16))


def opened(images) -> np.ndarray:
    """All pictures [N,H,W,3]."""
    return np.stack([np.asarray(open_any(value)) for value in one_by_one(images)])


def as_files(folder: Path, images: list[Image.Image]) -> list[Path]:
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return sorted(folder.iterdir())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_every_way_to_hold_pictures_gives_the_same_pictures(three, tmp_path):
    array = np.stack([np.asarray(image) for image in three])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    paths = as_files(tmp_path, three)
    ways = {
        "pictures": three,
        "generator": (image for image in three),
        "array": array,
        "arrays": list(array),
        "floats": array / 255,
        "half floats": (array / 255).astype(np.float16),
        "tensor": tensor,
        "tensors": list(tensor),
        "float tensor": tensor / 255,
        "paths": paths,
        "strings": [str(path) for path in paths],
        "folder": tmp_path,
        "glob": f"{tmp_path}/*.png",
        "globs and files": [f"{tmp_path}/[01].png", paths[2]],
        "bytes": [path.read_bytes() for path in paths],
        "undecoded": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "undecoded paths": [{"path": str(path)} for path in paths],
        "mixed": [three[0], array[1:2], paths[2]],
    }
    for way, images in ways.items():
        assert np.array_equal(opened(images), array), way


def test_one_picture_is_one(three, tmp_path):
    array = np.array(three[0])
    (path,) = as_files(tmp_path, three[:1])
    for one in (three[0], array, torch.from_numpy(array).permute(2, 0, 1), path, str(path), path.read_bytes()):
        assert np.array_equal(opened(one), array[None])


def test_grey_arrays_and_tensors():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for held in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert np.array_equal(opened(held), np.repeat(grey[None, ..., None], 3, axis=3))


def test_transparency_goes_on_white_and_pictures_stand_upright(three):
    clear = np.dstack([np.asarray(three[0]), np.zeros((16, 24), dtype=np.uint8)])
    assert (opened(clear) == 255).all()
    assert open_any(Image.fromarray(clear), rgb=False).mode == "RGBA"
    three[0].getexif()[0x0112] = 6
    assert open_any(three[0]).size == (16, 24)


def test_floats_are_rounded_as_if_saved():
    assert opened(np.full((2, 2, 3), 0.5)).tolist() == [[[[128] * 3] * 2] * 2]
    assert opened(torch.full((3, 2, 2), 1.4 / 255, dtype=torch.bfloat16)).max() == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.full((4, 4, 3), -0.5),
            r"floats from -0.5 to -0.5; give floats in \[0,1\]: \(x \+ 1\) / 2 maps \[-1,1\] there",
        ),
        (torch.linspace(-1, 1, 48).reshape(3, 4, 4), r"floats from -1 to 1; .* \(x \+ 1\) / 2"),
        (np.full((4, 4, 3), 255.0), r"floats from 255 to 255; .* x / 255 maps \[0,255\] there"),
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (np.zeros((4, 4, 3), dtype=np.int64), r"int64; give uint8 in \[0,255\] or floats in \[0,1\]"),
        (np.zeros((4, 4, 3), dtype=bool), "bool; give uint8"),
        (np.zeros((3, 32, 32), dtype=np.uint8), r"an array \[3, 32, 32\]; pictures are \[H,W,3\], batches \[N,H,W,3\]"),
        (torch.zeros(32, 32, 3), r"a tensor \[32, 32, 3\]; pictures are \[3,H,W\], batches \[N,3,H,W\]"),
        (torch.zeros(32, 32), r"a tensor \[32, 32\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"an array \[0, 4, 3\]"),
        (b"", "picture empty: its bytes has length 0"),
        (b"plain text", "not a picture: no format that PIL knows"),
        ({"bytes": None, "path": None}, "picture missing: neither bytes nor a path"),
        (Image.new("F", (4, 4)), "mode not known: a picture of mode F"),
    ],
)
def test_a_picture_that_is_none_says_why(value, message):
    with pytest.raises(ValueError, match=message):
        opened([value])


def test_a_picture_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="picture missing: no file .*gone.png"):
        opened([tmp_path / "gone.png"])


def test_a_damaged_picture_that_somebody_opened(three, tmp_path):
    (path,) = as_files(tmp_path, three[:1])
    path.write_bytes(path.read_bytes()[:200])
    with Image.open(path) as image, pytest.raises(ValueError, match="^picture damaged: "):
        open_any(image)


@pytest.mark.parametrize("value", [3, None, [[1]], object()])
def test_what_is_no_picture_at_all_is_a_type_error(value):
    with pytest.raises(TypeError, match="is no picture: give PIL images, arrays, tensors, paths or a list"):
        opened([value])


def test_a_folder_gives_its_pictures_sorted_without_the_rest(tmp_path):
    for name in ("b.JPG", "a.png", "10.webp", "9.webp"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.png").touch()  # a picture by its name: its fault is shown, not hidden
    (tmp_path / "inner").mkdir()
    assert [Path(file).name for file in files(tmp_path)] == ["10.webp", "9.webp", "a.png", "b.JPG", "empty.png"]


def test_a_folder_or_glob_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pictures in the folder .*\.avif.*subfolders: .*/\*\*/\*\.png"):
        files(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file fits .*/\*\.png"):
        files(f"{tmp_path}/*.png")


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a[1].png")
    assert files(tmp_path / "a[1].png") == [str(tmp_path / "a[1].png")]
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "inner" / "b.png")
    assert len(files(f"{tmp_path}/**/*.png")) == 2


def test_an_iterator_is_read_as_it_is_used(three):
    def endless():
        while True:
            yield from three

    assert [next(images := one_by_one(endless())) for _ in range(4)] == [three[0]] * 4 and next(images) is three[1]


# --- pictures with prompts --------------------------------------------------------------------------------------------


def test_one_prompt_is_for_all(three):
    assert [prompt for _, prompt in paired(three, "x")] == ["x"] * 3
    assert [prompt for _, prompt in paired(iter(three), iter(["a", "b", "c"]))] == ["a", "b", "c"]
    assert [prompt for _, prompt in paired(three, None, needed=False)] == [""] * 3


@pytest.mark.parametrize("given", [["a", "b"], ["a", "b", "c", "d"]])
def test_another_number_of_prompts_is_refused(given, three):
    with pytest.raises(ValueError, match=f"^{len(given)} prompts for 3 pictures: give one for each, or one for all"):
        paired(three, given)
    with pytest.raises(ValueError, match=r"prompts for 3 pictures( or more)?: give one for each"):
        list(paired(iter(three), given))


@pytest.mark.parametrize("given", [["a", "b"], ["a", "b", "c", "d"]])
def test_another_number_of_prompts_than_of_files_is_refused_before_one_is_opened(given, three, tmp_path):
    paths = as_files(tmp_path, three)
    for images in (
        paths,
        [str(path) for path in paths],
        [paths[0], "none.png", "http://none/a?b.png"],
        [three[0], *paths[:2]],
    ):
        with pytest.raises(
            ValueError, match=f"^{len(given)} prompts for 3 pictures: give one for each, or one for all"
        ):
            paired(images, given)
    assert known_length(tmp_path) is known_length([paths[0], f"{tmp_path}/?.png"]) is known_length([tmp_path]) is None
    assert [prompt for _, prompt in paired([f"{tmp_path}/[01].png", paths[2]], ["a", "b", "c"])] == ["a", "b", "c"]


@pytest.mark.parametrize("prompt", ["", " \n", ["a", "", "c"], None])
def test_an_empty_prompt_is_refused(prompt, three):
    with pytest.raises(ValueError, match="prompt empty: this scorer judges how well a picture fits its prompt"):
        paired(three, prompt)


def test_a_prompt_that_is_no_text(three):
    with pytest.raises(TypeError, match="a prompt is a string, not int"):
        paired(three, [1, 2, 3])


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["<end_of_text>", "<start_of_text>", "<END_of_Text>", "&lt;end_of_text&gt;"])
@pytest.mark.parametrize("clean", ["open_clip", "processor"])
def test_a_special_token_in_a_prompt_is_text(special, clean):
    """Read as the token, it would end the prompt: what follows would not count."""
    towers = tiny_towers(tokens=clean)
    first, second = (towers.tokenize([f"a {special} {word}"]) for word in ("cat", "dog"))
    assert (first == 49407).sum() == 1 and (first == 49406).sum() == 1
    with torch.inference_mode():
        assert not torch.allclose(towers.texts(first), towers.texts(second), atol=1e-3)


def test_a_special_token_becomes_the_tokens_of_its_characters():
    """The other tokens are what they are without it."""
    tokenizer = make_tokenizer(TINY["text_cfg"])
    words = ["a", "<", "end", "_", "of", "_", "text", ">", "cat"]
    assert tokenizer.encode("a <end_of_text> cat") == [i for word in words for i in tokenizer.encode(word)]
    assert tokenizer.encode("!!<end_of_text>") == tokenizer.encode("!!<") + tokenizer.encode("end_of_text>")


def test_a_long_prompt_is_cut_before_its_end_and_that_is_said_once():
    towers = tiny_towers()
    prompts = ["word " * 30, "short", "exactly " * (CONTEXT - 2), "other " * 15]
    assert [count(towers.tokenizer, prompt) for prompt in prompts] == [32, 3, 16, 17]
    with pytest.warns(UserWarning, match="^2 of 4 prompts are longer than the 16 tokens that this scorer reads"):
        tokens = towers.tokenize(prompts)
    assert tokens.shape == (4, CONTEXT) and tokens.argmax(1).tolist() == [15, 2, 15, 15]
    assert torch.equal(towers.tokenize(prompts), tokens)  # no second warning: it would fail here


def test_another_tokenizer_than_the_towers_were_made_for_is_refused():
    config = TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 1000}}
    with pytest.raises(ValueError, match="the tokenizer has 49408 tokens, the text tower 1000"):
        tiny_towers(model_cfg=config)


def test_scores_do_not_depend_on_how_pictures_are_held(three, tmp_path):
    scorer, array = tiny_scorer(), np.stack([np.asarray(image) for image in three])
    as_files(tmp_path, three)
    exact = scorer.score(images=three, prompts="a cat")
    for images in (array, array / 255, torch.from_numpy(array).permute(0, 3, 1, 2), tmp_path):
        assert torch.equal(scorer.score(images=images, prompts="a cat"), exact)
