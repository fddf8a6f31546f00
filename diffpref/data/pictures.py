"""Picture files of any kind -> upright RGB. What cannot be used is refused by a ValueError that says why.

Its message begins with the reason and a colon, then the details: checks.py counts by reason.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class ArrowFile(pa.BufferReader):
    """An arrow buffer as a file. PIL's plugins try what it is, and seek beyond the end, which files allow."""

    def seek(self, position: int, whence: int = 0) -> int:
        """As for files, but never beyond the end."""
        start = (0, self.tell(), self.size())[whence]
        return super().seek(max(0, min(start + position, self.size())))


class UnknownRange(ValueError):
    """A mode whose range is not known."""


def open_file(value: dict[str, Any]) -> IO[bytes]:
    """The file behind an undecoded picture {"bytes", "path"}; arrow buffers are not copied.

    Raises FileNotFoundError, or ValueError for one that cannot be read.
    """
    content, path = value["bytes"], value["path"]
    if content is not None:
        return ArrowFile(content) if isinstance(content, pa.Buffer) else BytesIO(content)
    if not path:
        raise ValueError("picture missing: neither bytes nor a path")
    try:
        return cast(IO[bytes], xopen(path, "rb"))  # datasets' open knows paths of this disk and those of the hub
    except FileNotFoundError:
        raise FileNotFoundError(f"picture missing: no file {path}") from None
    except OSError as error:
        raise ValueError(f"picture missing: {path} cannot be read ({error})") from error


def read_bytes(value: dict[str, Any]) -> bytes:
    """The whole file of an undecoded picture. Raises as `open_file`, and ValueError for an empty one."""
    with open_file(value) as file:
        content = file.read()
    if not content:
        raise ValueError(f"picture empty: {value['path'] or 'its bytes'} has length 0")
    return content


@contextmanager
def opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """A picture whose header is read and whose pixels are not. Whatever PIL raises, here or in the body, becomes a
    ValueError with the reason."""
    try:
        with warnings.catch_warnings():  # PIL only warns of a picture up to twice its limit
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.findall(r"\d+", str(error))[0]
        raise ValueError(
            f"too many pixels: {pixels}, the limit is {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError:
        raise ValueError("not a picture: no format that PIL knows") from None
    except UnknownRange:
        raise
    except Exception as error:  # PIL's decoders raise any kind for a damaged file: OSError, SyntaxError, struct.error
        raise ValueError(f"picture damaged: {error}") from error


def open_picture(value: dict[str, Any], convert: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    """An undecoded picture -> upright RGB, or what `convert` makes of it; of an animation the first frame. Raises
    ValueError or FileNotFoundError."""
    with opened(BytesIO(read_bytes(value))) as image:
        image.load()
        return (convert or to_rgb)(image)


def picture_size(value: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises ValueError or FileNotFoundError."""
    with open_file(value) as file:
        if not file.read(1):
            raise ValueError(f"picture empty: {value['path'] or 'its bytes'} has length 0")
        file.seek(0)
        with opened(file) as image:
            # Only where the header has it: PIL would decode a PNG to look for EXIF behind the pixels.
            orientation = image.getexif().get(ExifTags.Base.Orientation) if "exif" in image.info else None
            return (image.width, image.height) if orientation in SIDEWAYS else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says, 8 bits, otherwise as it is. Raises ValueError for a mode without a known range."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnknownRange(f"mode not known: a picture of mode {image.mode} has no known range; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, 8 bits, RGB, transparency on white."""
    image = upright(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3,H,W] in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)
