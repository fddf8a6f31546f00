"""One process, several (DDP), sharded ones (FSDP2) or DeepSpeed: what differs, behind a few functions.

Everything here is called by every process. Tensors of sharded models are DTensors: `full` and `like` translate.
"""

import os
import time
from datetime import timedelta

import diffusers
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from diffpref.config import RunConfig

LONG = timedelta(days=7)  # nothing here takes a week; NCCL's own ten minutes would end a run while rank 0 draws


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's engine, as its launcher or torchrun set it up, for this run."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else, without a GPU, torchrun's processes would not find each other
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        log_with=config.train.report_to or None,
        project_config=ProjectConfiguration(str(config.run_dir), logging_dir=str(config.run_dir / "logs")),
    )
    shard_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        tell_deepspeed(accelerator, config)
    if not accelerator.is_main_process:
        silence()
    return accelerator


def tell_deepspeed(accelerator: Accelerator, config: RunConfig) -> None:
    """DeepSpeed clips and steps by itself and wants to know the batch, which accelerate reads off a loader that it
    prepares; ours it does not. Raises ValueError for what cannot be had with it."""
    if config.train.skip_grad_norm is not None:
        raise ValueError("train.skip_grad_norm cannot be had with DeepSpeed: it has stepped before the norm is known")
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train.train_batch_size
    settings["gradient_clipping"] = config.train.max_grad_norm


def silence() -> None:
    """One process's loading bars are enough."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def shard_on_cpu(accelerator: Accelerator) -> None:
    """accelerate takes FSDP for GPUs only and goes on with DDP where there are none; torch's FSDP2 runs there too."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of the weights, so that all must take part in every forward pass."""
    return isinstance(model, FSDPModule)


def whole(accelerator: Accelerator) -> bool:
    """Whether every process holds all weights, as they are: no engine shards or replaces them."""
    return accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def full(tensor: Tensor) -> Tensor:
    """A tensor or the parts of a sharded one -> the whole, on the CPU, without graph. Every process must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def whole_norm(norm: Tensor | float | None, device: torch.device) -> Tensor:
    """What an engine gives as the gradient's norm -> [1] on the device; [0] where it gives none (DeepSpeed)."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor([] if norm is None else norm, dtype=torch.float32, device=device).detach().reshape(-1)


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor -> a copy on the device of another one, and sharded as that is."""
    if not isinstance(tensor, DTensor):
        return whole.to(tensor.device, copy=True)  # in memory of its own: what a file maps is aligned otherwise
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


class Patience:
    """What processes do together beside the training: wait for one that works alone, however long that takes, and agree
    to stop. On gloo, which has a timeout of its own and leaves the GPUs alone. Every process must make and call it."""

    def __init__(self, accelerator: Accelerator):
        self.alone = accelerator.num_processes == 1
        self.group = None if self.alone else dist.new_group(backend="gloo", timeout=LONG)

    def wait(self) -> None:
        """Returns once all processes are here."""
        if not self.alone:
            dist.barrier(self.group)

    def any(self, flag: bool) -> bool:
        """Whether some process says so."""
        if self.alone:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, self.group)
        return bool(said)


def gather(items: list) -> list:
    """The lists of all processes, one after the other, at every process."""
    return gather_object(items)


def end(accelerator: Accelerator) -> None:
    """Close trackers and leave the process group together, so that no process takes the others for dead."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        # gloo's threads let go of their last tensors a little later, for which they want the interpreter's lock;
        # one that asks for it while Python shuts down aborts the process.
        time.sleep(0.1)
