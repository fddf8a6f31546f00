"""What can be counted on any machine: FLOPs, operations, waits for the device, bytes saved for the backward pass."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Operations whose result's size or value the host must know: on a GPU each waits until the device has done its work.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")


@dataclass
class Counts:
    """Of one step. operations: those that compute or copy, about what a GPU would launch.  waits: by kind.
    saved: bytes kept for the backward pass, each memory once, weights left out; the most of any one graph."""

    flop: int = 0
    operations: int = 0
    waits: Counter = field(default_factory=Counter)
    saved: int = 0

    def row(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"waits": dict(self.waits)}


class Counting(TorchDispatchMode):
    """Counts every operation inside."""

    def __init__(self, counts: Counts, device: str):
        super().__init__()
        self.counts, self.device = counts, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.counts.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        self.counts.operations += launches(func, result, self.device)
        if waits(packet.__name__, args):
            self.counts.waits[packet.__name__] += 1
        return result


NO_WORK = ("_unsafe_view", "detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty")


def launches(func: Any, result: Any, device: str) -> bool:
    """Whether it does more on the device than look at the same memory in another way, or reserve some."""
    if func.is_view or func._overloadpacket.__name__ in NO_WORK:
        return False
    made = result if isinstance(result, tuple | list) else [result]
    return any(isinstance(tensor, Tensor) and tensor.device.type == device for tensor in made)


def waits(name: str, args: tuple) -> bool:
    """Whether the host waits; an index by a mask has as many elements as the mask says."""
    masked = name in ("index", "index_put", "index_put_") and any(
        mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1]
    )
    return masked or name in WAITS


class Saved:
    """Memory kept for the backward pass, each storage once."""

    def __init__(self, left_out: Iterable[Tensor]):
        self.known = {place(tensor) for tensor in left_out}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Called with each saved tensor."""
        if place(tensor) not in self.known:
            self.known.add(place(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def place(tensor: Tensor) -> int:
    """What tells one memory from another, also where there is none (fake tensors)."""
    return tensor.untyped_storage()._cdata


@contextmanager
def saving(model: nn.Module) -> Iterator[Saved]:
    """Inside, what is saved beside the model's weights and buffers."""
    saved = Saved([*model.parameters(), *model.buffers()])
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


def count(step: Callable[[], Any], model: nn.Module) -> Counts:
    """One step of a model."""
    counts = Counts()
    device = next(model.parameters()).device.type
    with saving(model) as saved, Counting(counts, device):
        step()
    counts.saved = saved.bytes
    return counts
