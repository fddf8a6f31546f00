"""What a machine without a GPU can prove of a loss: operations, launches, bytes, waits for the device, memory kept."""

import os
from collections.abc import Callable
from typing import Any

import torch
from stepping.counting import Counting, Counts, saving
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffpref.triton_kernels.blocks import launches as triton_launches
from lossy.ways import COMPILED


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each tensor of each operation once; Triton's kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            self.bytes += sum(size(leaf) for leaf in tree_leaves((args, kwargs, result)))
        return result


def size(leaf: Any) -> int:
    """Bytes of a tensor's memory, once where it is expanded."""
    return min(leaf.nbytes, leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else 0


class Launches(Counting):
    """Operations that compute or copy. Triton's interpreter, where it stands in for a GPU, copies what kernels are
    given and what they leave; that is no part of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ in ("copy_", "set_") and os.environ.get("TRITON_INTERPRET") == "1":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(name: str, act: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Of one call: launches (of compiled code, the kernels that it was compiled to), waits for the device, memory kept
    for the backward pass and, where no kernel hides them, bytes read and written."""
    if name in COMPILED:
        from torch._inductor import metrics

        return {"launches": metrics.generated_kernel_count}
    counts, traffic = Counts(), Traffic()
    with triton_launches() as kernels, saving(nn.Identity()) as saved, Launches(counts, device.type), traffic:
        act()
    found: dict[str, Any] = {"launches": counts.operations + len(kernels), "waits": sum(counts.waits.values())}
    found |= {"saved_bytes": saved.bytes}
    return found | ({"kernels": list(kernels)} if kernels else {"bytes": traffic.bytes})
