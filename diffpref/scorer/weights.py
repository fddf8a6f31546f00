"""Weights from files into modules, checked: another architecture, missing names and NaN are refused by name."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]

# what open_clip, torch and Python raise for settings of which no module can be made, such as a width of -1 or "x"
IMPOSSIBLE = (ValueError, TypeError, AttributeError, AssertionError, RuntimeError, ArithmeticError, LookupError)


def said(error: Exception) -> str:
    """What an error says, in a line; some of open_clip's and torch's say nothing, or many lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Errors of reading weights, in words. Raises FileNotFoundError, or ValueError for a damaged file, for one of
    another architecture, and for a pickle that holds more than weights."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: damaged, or with more than weights, and a pickle can run code") from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or of another kind ({error})") from error


def read_tensors(path: Path, key: str = "") -> Tensors:
    """The tensors by name that a safetensors file holds, or a pickle, through `weights_only`: no code in it is run;
    or those below `key`, if it has that. Raises as `damage_named`, and ValueError for what is no tensors by name."""
    with damage_named(path):
        safe = path.suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds something else than tensors by name")
    return content


def refuse_no_numbers(tensors: Tensors, source: str) -> None:
    """Raise ValueError for weights that are NaN or infinite."""
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{source}: weights are NaN or infinite: {listed(bad)}")


def fill(module: nn.Module, tensors: Tensors, source: str) -> None:
    """Put tensors into a module, in the module's dtype. Raises ValueError where they are not its own or no numbers."""
    own = module.state_dict()
    faults = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [n for n, value in own.items() if n in tensors and tensors[n].shape != value.shape],
    }
    if any(faults.values()):
        said = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{source} holds the weights of another architecture ({said})")
    refuse_no_numbers(tensors, source)
    module.load_state_dict(tensors)


def listed(names: list[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def checked_device(device: str | torch.device) -> torch.device:
    """A device on which something was computed. Raises ValueError for one that is not there or not known."""
    try:
        torch.zeros(1, device=device).item()  # torch.device("cuda") alone asks for no driver
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is not to be had here: {said(error)}; cpu is always there") from error
    return torch.device(device)
