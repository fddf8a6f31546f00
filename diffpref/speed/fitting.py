"""Whether the activations of a batch fit, measured on one of its items, so that nothing is recomputed without need."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn

SHARE = 0.8  # of the free memory; gradients and workspaces want the rest


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the model's own weights. What is drawn in it, for
    dropout, is drawn again afterwards."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    devices = [device] if (device := next(model.parameters()).device).type == "cuda" else []
    eagerly = torch.compiler.set_stance("force_eager")  # one item is a shape of its own, not worth a graph
    with torch.random.fork_rng(devices), eagerly, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = forward()  # while it is held, no storage is freed, and no address taken twice
    del result
    return sum(size for address, size in kept.items() if address not in own)


def for_all(one: int, two: int, count: int, growth: float) -> int:
    """Bytes that `count` items keep, at `growth` times the area, from what one and two of them keep; two is 0 where
    there is only one. Some is kept once for all: weights that autocast has cast."""
    each = two - one if two else one
    return int(one - each + count * each * growth)


def still_to_come(model: nn.Module) -> int:
    """Bytes of gradients and of an optimiser's two moments, before the first step; fp32."""
    return 3 * sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still have on the device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def decide(needed: int, free: int, agree: Callable[[bool], bool]) -> tuple[bool, str]:
    """(whether to recompute, the same in words).

    Args:
        needed: Bytes of the activations of a batch.
        free: Bytes to be had.
        agree: Whether some process says so: all must do the same.
    """
    recompute = agree(needed > SHARE * free)
    what = "they are recomputed" if recompute else "kept, nothing is recomputed"
    return recompute, f"activations of a batch: {gigabytes(needed)}, {gigabytes(free)} free: {what}"


def gigabytes(size: int) -> str:
    """In words."""
    return f"{size / 1e9:.2g} GB"
