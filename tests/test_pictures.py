"""Picture files of any kind are read right, or refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preference_files import encoded, picture, value

from diffpref.config import DataConfig
from diffpref.data.pictures import open_picture, picture_size, to_rgb
from diffpref.data.views import View, cut, draw_view, enumerate_views


def opened(image: Image.Image, kind: str = "png", **settings) -> np.ndarray:
    return np.asarray(open_picture(value(encoded(image, kind, **settings))))


def test_eight_bits_pass_unchanged():
    assert np.array_equal(opened(picture()), picture())


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_keep_their_range(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(opened(Image.fromarray(ramp), kind)[..., 0], ramp >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_range_is_refused(mode):
    with pytest.raises(ValueError, match=f"^mode not known: a picture of mode {mode} has no known range"):
        open_picture(value(encoded(Image.new(mode, (4, 4)), "tiff")))


def test_cmyk_is_not_inverted():
    """PIL writes CMYK JPEGs as Adobe does, inverted; red must come back red."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    content = encoded(red, "jpeg", quality=95)
    assert b"Adobe" in content
    assert np.abs(np.asarray(open_picture(value(content)), dtype=int) - (255, 0, 0)).max() < 8


def test_palette_with_transparency_goes_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    pixels = opened(image, transparency=0)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 0, 255]
    pixels = opened(image, transparency=b"\x00\xff")  # bytes: PIL warns of these when they are turned into RGB
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 0, 255]


def test_alpha_goes_on_white():
    half = opened(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))
    assert half[0, 0].tolist() == [255, 127, 127]
    assert opened(Image.new("LA", (4, 4), (0, 0)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    pixels = opened(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels.shape == (8, 8, 3) and pixels[0, 0].tolist() == [255, 0, 0]


def test_one_bit_and_grey_become_rgb():
    assert opened(Image.new("1", (4, 4), 1))[0, 0].tolist() == [255, 255, 255]
    assert opened(Image.new("L", (4, 4), 7))[0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_exif_turns_the_picture(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    settings = {"lossless": True} if kind == "webp" else {}
    content = value(encoded(picture(40, 32), kind, exif=exif, **settings))
    upright = np.asarray(picture(40, 32).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(open_picture(content), upright)
    assert picture_size(content) == (40, 32) == upright.shape[:2]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


BROKEN = {
    "missing": (value(None, "/nowhere/at/all.png"), "^picture missing: no file /nowhere/at/all.png"),
    "a folder": (value(None, "/tmp"), "^picture missing: /tmp cannot be read"),
    "neither": (value(None, None), "^picture missing: neither bytes nor a path"),
    "zero bytes": (value(b"", "a.png"), "^picture empty: a.png has length 0"),
    "text": (value(b"<html>404</html>"), "^not a picture: no format that PIL knows"),
    "half a png": (value(half(encoded(picture(), "png"))), "^picture damaged: .*truncated"),
    "half a jpeg": (value(half(encoded(picture(), "jpeg"))), "^picture damaged: .*truncated"),
    "half a webp": (value(half(encoded(picture(), "webp"))), "^picture damaged: |^not a picture: "),
    "half a gif": (value(half(encoded(picture(), "gif"))), "^picture damaged: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_picture_says_what_is_wrong(case):
    content, message = BROKEN[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_picture(content)


@pytest.mark.parametrize("limit", [1000, 600])  # 1280 pixels: PIL warns up to twice its limit, and raises beyond
@pytest.mark.parametrize("read", [open_picture, picture_size])
def test_a_huge_picture_is_refused_by_its_header(read, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"^too many pixels: 1280, the limit is {limit} "):
        read(value(encoded(picture(40, 32))))


def test_the_size_comes_from_the_header_alone(tmp_path: Path):
    content = encoded(picture(31, 77), "jpeg")
    assert picture_size(value(half(content))) == (77, 31)
    (tmp_path / "a.jpg").write_bytes(content)
    assert picture_size(value(None, str(tmp_path / "a.jpg"))) == (77, 31)


def test_sides_too_unequal_are_refused_before_they_fill_the_memory():
    with pytest.raises(ValueError, match="^too unequal sides: 1x20000 would be 512x10240000 before the crop"):
        cut(to_rgb(Image.new("L", (1, 20000))), View((512, 512), (0.5, 0.5), False))


def test_a_mirrored_view_is_the_mirror_of_the_picture_then_cut():
    image = picture(64, 32)
    plain, *_ = cut(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), View((16, 16), (0.2, 0.3), False))
    mirrored, original, corner = cut(image, View((16, 16), (0.2, 0.3), True))
    assert np.array_equal(plain, mirrored) and original == (32, 64) and corner == (0, 5)


@pytest.mark.parametrize(("center", "flip", "count"), [(True, False, 1), (True, True, 2), (False, True, 6)])
def test_drawn_views_are_those_that_are_enumerated(center, flip, count):
    config = DataConfig(path="", center_crop=center, random_flip=flip)
    views = enumerate_views(3, (8, 8), config, crops=3)
    assert len(set(views)) == count and views == enumerate_views(3, (8, 8), config, crops=3)
    drawn = {draw_view(3, key, (8, 8), config, seed=0, crops=3) for key in range(100)}
    assert drawn == set(views)


def test_without_a_cache_places_are_free_and_depend_on_the_key():
    config = DataConfig(path="", center_crop=False)
    views = [draw_view(0, key, (8, 8), config, seed=0) for key in range(20)]
    assert len(set(views)) == 20 and views == [draw_view(1, key, (8, 8), config, seed=0) for key in range(20)]
    assert views[0] != draw_view(0, 0, (8, 8), config, seed=1)
