"""Preference fine-tuning for diffusers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpref.users import encode_user, load_user_adapter

__version__ = "0.1.0.dev0"
__all__ = ["encode_user", "load_user_adapter"]


def __getattr__(name: str) -> Any:
    """What most people need of diffpref.users, imported when it is asked for: `import diffpref` loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import diffpref.users as users

    return getattr(users, name)
