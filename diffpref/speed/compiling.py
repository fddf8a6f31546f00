"""torch.compile of the denoiser, in place: modules, names, files and the pipeline around it stay what they are.

A UNet is compiled whole, as more than half of its work is in convolutions between its transformer blocks. A transformer
is compiled block by block: its blocks are alike and share their graphs, so that compiling takes a fraction of the time.

Graphs are counted in few: one for the policy with gradient, one for the reference, one for the policy without gradient
where something asks for that (held-out data, two passes), each once for the first size of pictures and, from the second
one on, once more for all sizes; of a transformer these for each kind of block, and for the first block once more, into
which no gradient goes back. Compile last: after adapters, casts and layout.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from diffpref.families import Family

# Policy and reference are two graphs, fused differently. In half precision, without eager mode's roundings inside of
# fused kernels, they would differ by more than a preference does even where they are equal.
OPTIONS = {"inductor": {"emulate_precision_casts": True}}
GRAPHS = 64  # of one piece of code, after which torch computes without them; its own 8 would not do for some runs


def compile_denoiser(denoiser: nn.Module, family: Family, backend: str) -> None:
    """Let a denoiser, or its blocks, compile at their first pass. Nothing is done for "none".

    Raises ValueError for a backend that cannot compile here.
    """
    if backend == "none":
        return
    allow_graphs()
    check_backend(backend, next(denoiser.parameters()).device)
    for part in PARTS[family.denoiser](denoiser):
        part.compile(backend=backend, options=OPTIONS.get(backend))


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated blocks: all that a transformer keeps in lists."""
    return [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]


PARTS: dict[str, Callable[[nn.Module], Iterable[nn.Module]]] = {
    "unet": lambda denoiser: [denoiser],
    "transformer": blocks,
}


def eagerly() -> AbstractContextManager:
    """A context in which nothing is compiled, and what is compiled is run as if it were not: for pictures, whose sizes
    and guidance would ask for graphs of their own."""
    return torch.compiler.set_stance("force_eager")


def allow_graphs() -> None:
    """Raise torch's limit, which is of the whole process, and leave it there: graphs are made as passes ask for them.
    It forbids nothing that was allowed."""
    import torch._dynamo  # imports Triton

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError unless the backend compiles a line of arithmetic, forward and backward."""
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        torch.compile(line, backend=backend)(x).sum().backward()
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"train.compile: {backend} cannot compile here ({reason}); inductor wants Triton on a GPU and a C++"
            " compiler on a CPU; or set it to none"
        ) from error


def line(x: Tensor) -> Tensor:
    """y = 2x + 1."""
    return 2 * x + 1
