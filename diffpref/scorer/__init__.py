"""The CLIP preference scorer: which of these pictures is better?"""

import importlib
from typing import Any

# Loaded when asked for: the modules of training and measuring below need no CLIP.
EXPORTS = {
    "Embeddings": "preference",
    "PreferenceScorer": "preference",
    "CHECKPOINTS": "published",
    "load_scorer": "plugins",
    "Scorer": "contract",
    "Verdict": "score",
    "HEADS": "heads",
}

__all__ = list(EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
