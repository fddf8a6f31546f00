"""The denoisers that can hold a user adapter: the only table of them."""

from diffpref.users.formats.contract import UserFormat
from diffpref.users.formats.unet import UNetFormat

FORMATS: dict[str, UserFormat] = {"UNet2DConditionModel": UNetFormat()}
