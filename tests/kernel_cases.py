"""What the tests of the loss's kernels share: inputs, the equations in fp64, NaN in what nobody has written yet."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffpref.triton_kernels import item_errors, preference_head
from diffpref.triton_kernels.blocks import launch

ON = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU stands for Triton's interpreter
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Half a unit in the last place, relative.
STEP = {F32: 2.0**-24, BF16: 2.0**-9, F16: 2.0**-12, F64: 2.0**-24}

# Ops that run nothing on a device: views, and room that is not written.
FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "expand",
    "view",
    "detach",
    "alias",
    "_unsafe_view",
    "t",
    "slice",
}
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty returns is NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


class Work(TorchDispatchMode):
    """Notes every kernel and every op that a device has to run, and refuses those that the host waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ops: list[str] = []
        for module in (item_errors, preference_head):
            monkeypatch.setattr(module, "launch", self.launch)

    def launch(self, kernel, *arguments, **options) -> None:
        """A launch is one, whatever the interpreter does with its tensors."""
        self.ops.append(kernel.__name__)
        with _disable_current_modes():
            launch(kernel, *arguments, **options)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in SYNCS, f"{name} makes the host wait"
        self.ops += [] if name in FREE else [name]
        return func(*args, **(kwargs or {}))


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def inputs(shape, dtypes=(F32, F32, F32), gap=1e-2, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """policy, reference, target [N,...] and weight [N]."""
    g = seeded(seed)
    policy, drawn, target = (torch.randn(shape, generator=g) for _ in range(3))
    wide = (policy, policy + gap * drawn, target)
    p, r, y = (x.to(ON, dtype) for x, dtype in zip(wide, dtypes, strict=True))
    return p, r, y, (0.5 + torch.rand(shape[0], generator=g)).to(ON)


def exact(p, r, y, w, mask=None) -> tuple[Tensor, Tensor, Tensor]:
    """error, advantage, drift [N] in fp64, as means over what the mask keeps; 0 where that is nothing."""
    p, r, y, w = (x.double() for x in (p, r, y, w))
    m = torch.ones_like(p) if mask is None else mask.double().expand_as(p)
    count = m.flatten(1).sum(1)

    def mean(x: Tensor) -> Tensor:
        total = (m * x).flatten(1).sum(1)
        return w * torch.where(count > 0, total / count.clamp(min=1e-9), 0.0)

    return mean((p - y) ** 2), mean((r - p) * (p + r - 2 * y)), mean((p - r) ** 2)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖"""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
