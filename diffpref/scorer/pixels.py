"""Upright pictures of any mode -> [3,S,S], what a tower of pictures takes.

How a picture is made small, in which order it is made RGB, and what becomes of its transparency is part of a
checkpoint: with the wrong way of resizing, a portrait's pixels are off by 0.95 of their standard deviation. The
published scorers drop transparency, as their original code does (`convert("RGB")` shows the colour that the file has
below it). Ours put it on white, as the trainer does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torchvision.transforms.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from diffpref.data.pictures import to_rgb

Transform = Callable[[Image.Image], Tensor]


def open_clip_transform(cfg: PreprocessCfg) -> Transform:
    """open_clip's own, and with it that of OpenAI's CLIP and of LAION: resized as it is, then made RGB."""
    return cast(Transform, image_transform_v2(cfg, is_train=False))


def white_transform(cfg: PreprocessCfg) -> Transform:
    """Transparency on white and RGB first, then open_clip's own."""
    return partial(on_white, transform=open_clip_transform(cfg))


def on_white(picture: Image.Image, transform: Transform) -> Tensor:
    return transform(to_rgb(picture))


def side(cfg: PreprocessCfg) -> int:
    """The side S of a square input. Raises ValueError where it is none."""
    height, width = (cfg.size, cfg.size) if isinstance(cfg.size, int) else cfg.size
    if height != width:
        raise ValueError(f"this way of preparing pictures makes squares; the towers take {height} x {width}")
    return height


def normalised(pixels: Tensor, cfg: PreprocessCfg) -> Tensor:
    return F.normalize(pixels, list(cfg.mean), list(cfg.std))


def processor_transform(cfg: PreprocessCfg) -> Transform:
    """transformers' CLIPImageProcessor, as PickScore used it."""
    return partial(processor, size=side(cfg), cfg=cfg)


def processor(picture: Image.Image, size: int, cfg: PreprocessCfg) -> Tensor:
    # RGB first; PIL's bicubic on the shortest side; the crop's corner is rounded down, where torchvision's is to even.
    small: Any = F.resize(picture.convert("RGB"), [size], InterpolationMode.BICUBIC)
    top, left = (small.height - size) // 2, (small.width - size) // 2
    return normalised(F.to_tensor(small.crop((left, top, left + size, top + size))), cfg)


def letterbox_transform(cfg: PreprocessCfg) -> Transform:
    """That of the hpsv2 package."""
    return partial(letterbox, size=side(cfg), cfg=cfg)


def letterbox(picture: Image.Image, size: int, cfg: PreprocessCfg) -> Tensor:
    # The longest side to `size`, on floats, which bicubic takes beyond [0,1]; antialias is torchvision's default since
    # 0.17. Where no side needs resizing the original does not pad either, and its model fails; here it is padded.
    pixels = F.to_tensor(picture.convert("RGB"))
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    if scale != 1:
        pixels = F.resize(pixels, [max(height, 1), max(width, 1)], InterpolationMode.BICUBIC, antialias=True)
    high, wide = size - pixels.shape[1], size - pixels.shape[2]
    pixels = F.pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=cfg.fill_color)
    return normalised(pixels, cfg)


PIXELS: dict[str, Callable[[PreprocessCfg], Transform]] = {
    "white": white_transform,
    "open_clip": open_clip_transform,
    "processor": processor_transform,
    "letterbox": letterbox_transform,
}
