"""Whatever people hold pictures and prompts in -> one picture at a time, and prompts that fit them.

Pictures are PIL images of any mode; files, folders (their pictures, sorted, without subfolders) and globs; undecoded
files {"bytes", "path"} or bytes; arrays [H,W], [H,W,3] or [N,H,W,3]; tensors [3,H,W] or [N,3,H,W]; or an iterable of
such. Arrays and tensors hold uint8, or floats in [0,1], which are rounded to 8 bits, as if saved. Pictures are turned
as their EXIF data says; of an animation the first frame counts.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffpref.data.pictures import open_picture, to_rgb, upright

Convert = Callable[[Image.Image], Image.Image]

LOADING = Lock()
MISSING = object()
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))


def one_by_one(images: Any, inner: bool = False) -> Iterator[Any]:
    """Every picture, still undecoded: PIL image, path, {"bytes", "path"}, array [H,W,…] or tensor [C,H,W].

    Raises ValueError or FileNotFoundError for a folder or a glob without pictures, TypeError for what is none of these.
    """
    if isinstance(images, str | Path):
        yield from files(images)
    elif isinstance(images, Image.Image | dict | bytes):
        yield images
    elif isinstance(images, np.ndarray | Tensor):
        yield from images if images.ndim == 4 else [images]
    elif isinstance(images, Iterable) and not inner:
        for item in images:
            yield from one_by_one(item, inner=True)
    else:
        raise TypeError(f"{type(images).__name__} is no picture: give PIL images, arrays, tensors, paths or a list")


def files(path: str | Path) -> list[str]:
    """A file, the pictures of a folder, or what a glob finds, sorted. Raises FileNotFoundError where there is none."""
    path = str(path)
    if "://" in path or Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES)
        mend = f"no pictures in the folder {path} ({', '.join(sorted(SUFFIXES))}); subfolders: {path}/**/*.png"
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        mend = f"no file fits {path}"
    else:
        found, mend = [path], ""  # opened, it is a fault of its own: the others are still scored
    if not found:
        raise FileNotFoundError(mend)
    return found


def open_any(value: Any, rgb: bool = True) -> Image.Image:
    """One picture of `one_by_one` -> upright and 8 bits, RGB with transparency on white, or with `rgb` off of its own
    mode. Raises ValueError with the reason, or FileNotFoundError."""
    convert = to_rgb if rgb else upright
    if isinstance(value, str | Path):
        value = {"bytes": None, "path": str(value)}
    elif isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if isinstance(value, dict):
        return open_picture({"bytes": None, "path": None} | value, convert)
    if isinstance(value, Image.Image):
        return from_pil(value, convert)
    return convert(from_array(from_tensor(value) if isinstance(value, Tensor) else value))


def from_pil(image: Image.Image, convert: Convert) -> Image.Image:
    """A picture somebody opened. Raises ValueError if its file, read only now, is damaged."""
    with LOADING:  # the same picture may stand in a list twice, and PIL reads its file and its EXIF only once
        try:
            image.load()
        except Exception as error:  # PIL's decoders raise any kind
            raise ValueError(f"picture damaged: {error}") from error
        return convert(image)


def from_tensor(value: Tensor) -> np.ndarray:
    """[3,H,W] or [1,H,W] -> array [H,W,3] or [H,W]. Raises ValueError for other shapes."""
    if value.ndim != 3 or value.shape[0] not in (1, 3):
        raise ValueError(f"shape not known: a tensor {list(value.shape)}; pictures are [3,H,W], batches [N,3,H,W]")
    value = value.detach().cpu()
    value = value.float() if value.is_floating_point() else value  # numpy knows no bf16
    return value.permute(1, 2, 0).numpy() if value.shape[0] == 3 else value[0].numpy()


def from_array(value: Any) -> Image.Image:
    """[H,W], [H,W,1], [H,W,3] or [H,W,4] of uint8 or floats in [0,1] -> picture. Raises ValueError for what is none."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"not a picture: {type(value).__name__}")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[..., 0]
    if value.size == 0 or value.ndim not in (2, 3) or value.ndim == 3 and value.shape[2] not in (3, 4):
        raise ValueError(f"shape not known: an array {list(value.shape)}; pictures are [H,W,3], batches [N,H,W,3]")
    return Image.fromarray(value if value.dtype == np.uint8 else to_bytes(value))


def to_bytes(value: np.ndarray) -> np.ndarray:
    """Floats in [0,1] -> uint8. Raises ValueError for another range, with the mend."""
    if not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"range not known: {value.dtype}; give uint8 in [0,255] or floats in [0,1]")
    low, high = float(value.min()), float(value.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("range not known: the picture has NaN or infinite values")
    if low < 0 or high > 1:
        mend = "(x + 1) / 2 maps [-1,1] there" if low >= -1 and high <= 1 else "x / 255 maps [0,255] there"
        raise ValueError(f"range not known: floats from {low:.3g} to {high:.3g}; give floats in [0,1]: {mend}")
    return np.rint(value.astype(np.float64) * 255).astype(np.uint8)


def check_prompt(prompt: Any, needed: bool) -> str:
    """The prompt, or "" for none. Raises ValueError for an empty one if it is needed, TypeError for what is no text."""
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, not {type(prompt).__name__}")
    if needed and not (prompt or "").strip():
        raise ValueError("prompt empty: this scorer judges how well a picture fits its prompt")
    return prompt or ""


def known_length(images: Any) -> int | None:
    """How many pictures there are, if that is known without reading: what an iterator, a folder or a glob holds is
    not."""
    if isinstance(images, np.ndarray | Tensor):
        return len(images) if images.ndim == 4 else 1
    if isinstance(images, str | Path):
        path = str(images)
        several = Path(path).is_dir() or glob.has_magic(path) and not Path(path).is_file()
        return None if several and "://" not in path else 1
    if isinstance(images, list | tuple):
        groups = str | Path | np.ndarray | Tensor
        numbers = [known_length(one) if isinstance(one, groups) else 1 for one in images]
        return None if None in numbers else sum(numbers)
    return None


def paired(images: Any, prompts: Any, needed: bool = True) -> Iterator[tuple[Any, str]]:
    """Every picture with its prompt; one prompt is for all. Raises ValueError for a different number of prompts and
    for an empty one, in every case before the first picture where the numbers are known."""
    if prompts is None or isinstance(prompts, str):
        prompt = check_prompt(prompts, needed)
        return ((image, prompt) for image in one_by_one(images))
    prompts = [check_prompt(prompt, needed) for prompt in prompts]
    number = known_length(images)
    if number not in (None, len(prompts)):
        raise ValueError(f"{len(prompts)} prompts for {number} pictures: give one for each, or one for all")
    return in_step(one_by_one(images), prompts)


def in_step(images: Iterator[Any], others: Iterable[Any], what: str = "prompts") -> Iterator[tuple[Any, Any]]:
    """zip(…, strict=True), with an error that says what was counted."""
    rest, number = iter(others), 0
    for number, image in enumerate(images, 1):
        other = next(rest, MISSING)
        if other is MISSING:
            raise ValueError(f"{number - 1} {what} for {number} pictures or more: give one for each")
        yield image, other
    if next(rest, MISSING) is not MISSING:
        raise ValueError(f"more than {number} {what} for {number} pictures: give one for each")
