"""Users as a vision-language model sees them: its hidden states after it was shown a few pairs of theirs.

As in PPD (Dang et al., CVPR 2025, arXiv 2501.06655), with any model that transformers' AutoModelForImageTextToText and
AutoProcessor load.

    pairs.py      which pairs stand for a user
    prompt.py     the words around them, and where the pictures go
    describer.py  the model: pairs -> hidden states [L,U] and the profile it writes
    states.py     the file of many users
    run.py        from a set of pairs to that file, a user at a time
    command.py    diffpref user describe
"""

from importlib import import_module
from typing import Any

WHERE = {"describe": "command", "read_states": "states", "as_embedding": "states", "States": "states"}


def __getattr__(name: str) -> Any:
    """The names of WHERE, imported when they are asked for: --help should not wait for torch."""
    if name not in WHERE:
        raise AttributeError(f"{__name__} has no {name}")
    return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
