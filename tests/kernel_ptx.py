"""Compiles what the loss launches, for GPUs' architectures, on a machine that may have none. Run as a script, without
the interpreter: `kernel_ptx.py 80:hinge 90:logistic,square` -> a line of JSON for each kernel."""

import json
import re
import sys
import warnings

import torch
import triton
from objective_cases import pairs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffpref.triton_kernels import item_errors, preference_head

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


def kind(value) -> str:
    """An argument's type as a launch would find it; Triton takes None, 1 and what is no number for constants."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    constant = value is None or value is True or value is False or not isinstance(value, int) or value == 1
    return "constexpr" if constant else "i32"


def compiled(capability: int):
    """In place of `launch`: the kernel is compiled for these arguments and not run."""
    done = set()

    def launch(kernel, programs, like, *arguments, num_warps, **constants) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        kinds = {name: "constexpr" if name in constants else kind(values[name]) for name in kernel.arg_names}
        fixed = {(i,): values[n] for i, n in enumerate(kernel.arg_names) if kinds[n] == "constexpr"}
        if (key := f"{kernel.__name__} {kinds} {fixed}") not in done:
            done.add(key)
            options = {"num_warps": num_warps, "enable_fp_fusion": False}
            source = ASTSource(kernel, kinds, fixed)
            found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            report(kernel.__name__, capability, found)

    return launch


def report(name: str, capability: int, found) -> None:
    """One line."""
    ptx = found.asm["ptx"]
    facts = {"capability": capability, "target": re.search(r"\.target (\w+)", ptx)[1], "cubin": len(found.asm["cubin"])}
    local = re.findall(r"\.local .*?\[(\d+)\]", ptx)
    print(json.dumps({"kernel": name, "spilled": local, "fma": "fma.rn.f32" in ptx, **facts}))


def launch_all(links: list[str]) -> None:
    """Errors with everything there is, the loss with each link, and their gradients."""
    p = torch.zeros(4, 4, 61, 67, dtype=torch.bfloat16, requires_grad=True)
    r, y, w = p.detach().half(), p.detach().float(), torch.ones(4)
    mask, mixed = torch.ones(4, 1, 61, 67, dtype=torch.bool), {"target": y, "noise": r, "by_x0": w, "by_noise": w}
    sum(item_errors.item_errors(p, r, **mixed, weight=w, mask=mask, drift=True)).sum().backward()
    batch = pairs(2)
    for link in links:
        rest = {"link": link, "numbers": (0.5, 0.5, 0.5), "beta": 9.0, "probability": torch.ones(2)}
        preference_head.preference_loss(p, r, y, w, batch.pairs, batch.group, batch.weight, **rest)[0].backward()


if __name__ == "__main__":
    warnings.simplefilter("error")
    for share in sys.argv[1:]:
        architecture, names = share.split(":")
        item_errors.launch = preference_head.launch = compiled(int(architecture))
        launch_all(names.split(","))
