"""Several ranks, by torch.distributed alone: who am I, sums over all ranks, gradients averaged over them."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """The number of this process among those that train together; 0 when it trains alone."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, on each of them. Every rank must call it."""
    if not _together():
        return x
    total = x.to("cuda") if dist.get_backend() == "nccl" else x.clone()  # nccl knows GPU memory only
    dist.all_reduce(total)
    return total.to(x.device)


def averaging(model: nn.Module) -> nn.Module:
    """`model` with its gradients averaged over the ranks in the backward pass; itself when this process trains alone.

    Made anew whenever what is frozen changes: it reduces the gradients of the parameters that train at this moment.
    """
    if not _together():
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # `average_buffers` takes the ranks' statistics together, where this would keep one's
    )


def average_buffers(model: nn.Module) -> None:
    """Make the model's buffers equal on all ranks: running statistics their mean, counters rank 0's."""
    if not _together():
        return
    floats = [b for b in model.buffers() if b.is_floating_point()]
    if floats:
        mean = sum_over_ranks(torch.cat([b.flatten() for b in floats])) / world()
        for buffer, part in zip(floats, mean.split([b.numel() for b in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            dist.broadcast(buffer, src=0)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
