"""How each denoiser holds a user adapter, and what its file looks like."""

from diffpref.users.formats.contract import State, UserFormat
from diffpref.users.formats.table import FORMATS

__all__ = ["FORMATS", "State", "UserFormat"]
