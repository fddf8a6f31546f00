"""Where Triton kernels can run, and who computes: Triton or PyTorch. Importing this does not import Triton."""

import importlib.util
import os

import torch

CAPABILITY = (8, 0)  # the least that Triton supports: NVIDIA's Ampere


def cannot_run(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of this device; None where one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; its wheels are for Linux)"
    if os.environ.get("TRITON_INTERPRET") == "1":  # slow, for tests; to be set before anything imports Triton
        return None
    if device.type != "cuda":
        return f"Triton has no driver for tensors on {device.type}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"Triton wants compute capability {'.'.join(map(str, CAPABILITY))}, and this GPU has {found}"
    return None


def use_triton(kernel: str, device: torch.device) -> bool:
    """Whether a Triton kernel computes on tensors of this device, by the setting train.kernel: auto takes Triton on
    CUDA devices that it supports, and PyTorch elsewhere. Raises ValueError where triton is asked for and cannot run."""
    if kernel == "torch":
        return False
    if kernel == "auto":
        return device.type == "cuda" and cannot_run(device) is None
    if kernel != "triton":
        raise ValueError(f"train.kernel {kernel!r} is unknown; known: auto, torch, triton")
    if (reason := cannot_run(device)) is not None:
        raise ValueError(f"train.kernel triton cannot run: {reason}; set it to auto or torch")
    return True
