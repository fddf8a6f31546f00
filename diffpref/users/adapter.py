"""A user adapter in a denoiser: put in, scaled, switched off, written and read.

Facts of a file, in the metadata of its safetensors: format, family (the denoiser's class), width, sequence, and what
the writer added, such as which encoder its users come from; each as JSON.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpref.engines import full
from diffpref.synpic.files import written_whole
from diffpref.users.files import ADAPTER
from diffpref.users.formats import FORMATS, State, UserFormat

FORMAT = 1
PARTS = ("image_proj", "ip_adapter")


def format_of(denoiser: nn.Module) -> UserFormat:
    """How this denoiser holds a user adapter. Raises ValueError for a class that FORMATS does not hold."""
    name = family_name(denoiser)
    if name not in FORMATS:
        raise ValueError(f"{name} cannot hold a user adapter; known denoisers: {', '.join(FORMATS)}")
    return FORMATS[name]


def family_name(denoiser: nn.Module) -> str:
    """The class of a denoiser as its configuration names it: engines may have put another one around it."""
    return getattr(denoiser, "config", {}).get("_class_name", type(denoiser).__name__)


# --- in the denoiser ------------------------------------------------------------------------------------------------


def add_user_adapter(denoiser: nn.Module, width: int, *, sequence: bool = False, seed: int = 0) -> None:
    """Give the denoiser a user adapter in fp32 that starts as the identity, and make it train.

    Raises ValueError for a denoiser that has one already, or whose format takes no sequences.
    """
    if has_user_adapter(denoiser):
        raise ValueError(f"this {family_name(denoiser)} has a user adapter already")
    check_shape(denoiser, width, sequence)
    g = torch.Generator().manual_seed(seed)
    layout = format_of(denoiser)
    layout.install(denoiser, layout.start(denoiser, width, sequence, g), torch.float32)
    train_user_adapter(denoiser)


def check_shape(denoiser: nn.Module, width: int, sequence: bool) -> None:
    """Raise ValueError for users that the denoiser's format cannot take."""
    if width < 1:
        raise ValueError(f"a user has at least one number, got width {width}")
    if sequence and not format_of(denoiser).sequences:
        raise ValueError(
            f"the IP-adapter format of {family_name(denoiser)} takes one vector for a user, no sequence of them;"
            " give the mean over the sequence, or tune a UNet"
        )


def has_user_adapter(denoiser: nn.Module) -> bool:
    """Whether there is one, ours or loaded by diffusers."""
    layout = FORMATS.get(family_name(denoiser))
    return layout is not None and bool(layout.processors(denoiser))


def user_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of the adapter, by the names in `denoiser.named_parameters()`: all but the biases, which stay 0."""
    ours = format_of(denoiser).parameters(denoiser)
    training = {id(p) for name, p in ours.items() if not name.endswith(".bias")}
    return {name: p for name, p in denoiser.named_parameters() if id(p) in training}


def user_modules(denoiser: nn.Module) -> list[str]:
    """Names of the modules that hold its weights; none where there is no adapter."""
    layout = FORMATS.get(family_name(denoiser))
    ours = {id(module) for module in layout.modules(denoiser).values()} if layout else set()
    return [name for name, module in denoiser.named_modules() if id(module) in ours]


def train_user_adapter(denoiser: nn.Module) -> None:
    """Let the adapter train, as after peft, which freezes all that is not its own; its biases stay frozen."""
    for name, parameter in format_of(denoiser).parameters(denoiser).items():
        parameter.requires_grad_(not name.endswith(".bias"))


def set_user_scale(denoiser: nn.Module, scale: float) -> None:
    """How strongly the user counts: 0 is the model without adapter, 1 what was trained. Raises ValueError unless
    finite."""
    if not math.isfinite(scale):
        raise ValueError(f"the scale of a user adapter must be a finite number, got {scale}")
    for processor in format_of(denoiser).processors(denoiser).values():
        processor.scale = [scale] * len(processor.scale)


@contextmanager
def user_adapter_off(denoiser: nn.Module) -> Iterator[None]:
    """Exactly the model without adapter, inside; the scales come back, also after an exception."""
    processors = format_of(denoiser).processors(denoiser).values()
    scales = [processor.scale for processor in processors]
    set_user_scale(denoiser, 0.0)
    try:
        yield
    finally:
        for processor, scale in zip(processors, scales, strict=True):
            processor.scale = scale


def user_state(denoiser: nn.Module) -> State:
    """The adapter in fp32, named as in the published files. Where it is sharded every process must call this."""
    state: State = {part: {} for part in PARTS}
    for name, parameter in format_of(denoiser).parameters(denoiser).items():
        part, key = name.split(".", 1)
        state[part][key] = full(parameter).float()
    return state


# --- the file -------------------------------------------------------------------------------------------------------


def shape_of(state: State) -> dict[str, Any]:
    """Width and kind of the users that an adapter takes. Raises ValueError for a projection that is no user's."""
    projection = state["image_proj"]
    for key, sequence in (("proj.weight", False), ("proj.0.weight", True)):
        if key in projection:
            return {"width": projection[key].shape[-1], "sequence": sequence}
    raise ValueError(f"no user adapter: its projection has neither proj.weight nor proj.0.weight, but {[*projection]}")


def save_user_adapter(denoiser: nn.Module, folder: Path, facts: dict[str, Any], main: bool = True) -> Path:
    """Write `user_adapter.safetensors`, which `load_ip_adapter` of a stock pipeline takes where the family has a
    format of diffusers' own. Where the denoiser is sharded every process must call it; only the `main` one writes."""
    state = user_state(denoiser)
    facts = facts | {"format": FORMAT, "family": family_name(denoiser)} | shape_of(state)
    tensors = {f"{part}.{key}": value for part, values in state.items() for key, value in values.items()}
    path = Path(folder) / ADAPTER
    if main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as beside:
            save_file(tensors, beside, metadata={key: json.dumps(value) for key, value in facts.items()})
    return path


def read_user_adapter(path: Path | str) -> tuple[State, dict[str, Any]]:
    """A file, or the folder that holds it -> state and facts. Raises FileNotFoundError, or ValueError for a file that
    is damaged or no user adapter."""
    path = Path(path)
    path = path / ADAPTER if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such user adapter; a run that trains one writes {ADAPTER}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    return checked(path, tensors), read_facts(path, metadata)


def checked(path: Path, tensors: dict[str, Tensor]) -> State:
    """Flat names -> state. Raises ValueError for what stock diffusers would take, and no null user survives."""
    state: State = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part not in PARTS:
            raise ValueError(f"{path} is no user adapter: it holds {name}, and not only image_proj.… and ip_adapter.…")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds weights that are NaN or infinite ({name}); the file is damaged")
        if name.endswith(".bias") and tensor.any():
            raise ValueError(
                f"{path} is no user adapter: {name} is not zero, so that a user of zeros would not get the base model"
            )
        state[part][key] = tensor
    for part, values in state.items():
        if not values:
            raise ValueError(f"{path} is no user adapter: it holds nothing named {part}.…")
    return state


def read_facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The facts of a file. Raises ValueError where they are not there, not readable, or of a later format."""
    try:
        facts = {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no user adapter of diffpref: its metadata are not JSON ({error})") from error
    missing = {"format", "family", "width", "sequence"} - facts.keys()
    if missing:
        raise ValueError(f"{path} is no user adapter of diffpref: its metadata lack {', '.join(sorted(missing))}")
    if facts["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {facts['format']}, and this diffpref reads {FORMAT}: install a later one"
        )
    if type(facts["width"]) is not int or type(facts["sequence"]) is not bool:
        raise ValueError(f"{path} is damaged: its metadata say width {facts['width']}, sequence {facts['sequence']}")
    return facts


def load_into(denoiser: nn.Module, state: State, facts: dict[str, Any]) -> None:
    """Put a saved adapter into a denoiser, in its precision, in place of the one it may have; nothing trains.

    Raises ValueError for an adapter of another family or of other sizes.
    """
    family, layout = family_name(denoiser), format_of(denoiser)
    if facts["family"] != family:
        raise ValueError(f"this user adapter is for a {facts['family']}, and the pipeline has a {family}")
    check_shape(denoiser, facts["width"], facts["sequence"])
    room = layout.shapes(denoiser, facts["width"], facts["sequence"])
    for part in PARTS:
        refuse_other_shapes(part, room[part], state[part])
    layout.install(denoiser, state, next(denoiser.parameters()).dtype)
    for parameter in layout.parameters(denoiser).values():
        parameter.requires_grad_(False)


def refuse_other_shapes(part: str, room: dict[str, tuple[int, ...]], given: dict[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference."""
    for key in sorted(room.keys() | given.keys()):
        shape = tuple(given[key].shape) if key in given else None
        if shape != room.get(key):
            raise ValueError(
                f"this user adapter is for a model of other sizes: {part}.{key} is {shape or 'absent'},"
                f" and the model has room for {room.get(key, 'none')}"
            )
