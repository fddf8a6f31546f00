"""The denoisers that can hold a user adapter: the only table of them."""

from diffpref.users.formats.contract import UserFormat
from diffpref.users.formats.flux import FluxFormat
from diffpref.users.formats.sd3 import SD3Format
from diffpref.users.formats.unet import UNetFormat

FORMATS: dict[str, UserFormat] = {
    "UNet2DConditionModel": UNetFormat(),
    "SD3Transformer2DModel": SD3Format(),
    "FluxTransformer2DModel": FluxFormat(),
}
