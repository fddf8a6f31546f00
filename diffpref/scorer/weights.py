"""Weights from files into modules, checked: another architecture, missing names and NaN are refused by name."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a file. Raises FileNotFoundError, or ValueError for a damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error})") from error


def read_pickle(path: Path) -> Any:
    """What a .pt or .pth file of weights holds, through `weights_only`: no code in it is run.

    Raises FileNotFoundError, or ValueError for a damaged file and for one that holds more than weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than weights, and a pickle can run code") from error
    except (RuntimeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_weights(path: Path) -> Any:
    """A safetensors file, or a pickle of weights."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


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
