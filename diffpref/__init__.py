"""Preference fine-tuning for diffusers."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

# What most people need, imported when it is asked for: `import diffpref` loads no torch.
WHERE = {"encode_user": "diffpref.users.few_shot", "load_user_adapter": "diffpref.users.personalized"}
__all__ = ["encode_user", "load_user_adapter"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(WHERE[name]), name)
