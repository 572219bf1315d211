"""Several ranks, by torch.distributed alone: who am I, sums over all ranks, BatchNorm over the rows of all."""

import inspect
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.same_host import SharedSums, shared_sums


def rank() -> int:
    """The number of this process among those that train together; 0 when it trains alone."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Leave the process group when all ranks have come to this point; this process can then end. Every rank must call it."""
    dist.barrier()
    dist.destroy_process_group()
    let_go_of_the_group()


def let_go_of_the_group() -> None:
    """Have torch's functions not hold the process group: gloo may abort a process that ends while something holds its group.

    `torch.distributed.nn.functional` has the group as a default argument when it is imported, by torchmetrics for one, after
    the group was made; when imported before, it has None, which means the same to it.
    """
    functions = inspect.getmembers(sys.modules.get("torch.distributed.nn.functional"), inspect.isfunction)
    for _, function in functions:
        defaults = function.__defaults__ or ()
        if any(isinstance(value, dist.ProcessGroup) for value in defaults):
            function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in defaults)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, on each of them. Every rank must call it."""
    if not _together():
        return x
    total = x.to("cuda") if dist.get_backend() == "nccl" else x.clone()  # nccl knows GPU memory only
    dist.all_reduce(total)
    return total.to(x.device)


# By process group, without keeping one alive: gloo aborts a process that ends before its group has.
_shared: weakref.WeakKeyDictionary[Any, SharedSums | None] = weakref.WeakKeyDictionary()


def _shared_by_ranks() -> SharedSums | None:
    group = dist.group.WORLD
    if group not in _shared:
        _shared[group] = shared_sums()
    return _shared[group]


def add_over_ranks(x: Tensor) -> None:
    """Make a contiguous `x` the sum over all ranks, in place: through shared memory where all ranks are on one machine."""
    shared = _shared_by_ranks() if x.dtype is torch.float32 and x.device.type == "cpu" else None
    if shared is None:
        dist.all_reduce(x)
    else:
        shared.add(x)


def begin_sum(x: Tensor) -> Any:
    """`add_over_ranks` that need not be over yet: `wait()` for what comes back, None where it is."""
    if _shared_by_ranks() is None or x.dtype is not torch.float32 or x.device.type != "cpu":
        return dist.all_reduce(x, async_op=True)
    add_over_ranks(x)
    return None


def gather(value: Any) -> list[Any]:
    """Each rank's `value`, plain data of any size, in the order of the ranks, on all of them. Every rank must call it."""
    if not _together():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def over_ranks(model: nn.Module) -> bool:
    """Have the BatchNorm layers of `model` take the statistics of the global batch, until `alone_again`; are there any?"""
    for module in model.modules():
        if type(module) in _GLOBAL:
            module.__class__ = _GLOBAL[type(module)]
    return any(isinstance(module, _OverRanks) for module in model.modules())


def alone_again(model: nn.Module) -> None:
    """Undo `over_ranks`: the model's normalisation layers are torch's own again."""
    for module in model.modules():
        if isinstance(module, _OverRanks):
            module.__class__ = next(own for own, over in _GLOBAL.items() if over is type(module))


_rows_are_borrowed = False


def borrow_rows(borrowed: bool) -> None:
    """Whether the rows of this rank's batch only keep it in step, and are to leave the batch statistics alone."""
    global _rows_are_borrowed
    _rows_are_borrowed = borrowed


class _OverRanks(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the global batch. Torch's SyncBatchNorm does so on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.track_running_stats:
            return super().forward(x)
        # In half precision sums over a batch would be too coarse.
        y, mean, var, count = _Normalised.apply(x.float(), self.weight, self.bias, self.eps, _rows_are_borrowed)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), share)
        return y.to(x.dtype)


class _OverRanks1d(_OverRanks, nn.BatchNorm1d):
    pass


class _OverRanks2d(_OverRanks, nn.BatchNorm2d):
    pass


class _OverRanks3d(_OverRanks, nn.BatchNorm3d):
    pass


_GLOBAL: dict[type, type] = {nn.BatchNorm1d: _OverRanks1d, nn.BatchNorm2d: _OverRanks2d, nn.BatchNorm3d: _OverRanks3d}


class _Normalised(torch.autograd.Function):
    """Normalisation by the mean and variance over all ranks' rows, and its gradient: one collective each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, borrowed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        # Each rank's own mean and variance: a mean square less a squared mean would lose a spread that is small beside it.
        own_mean = x.mean(dims)
        deviations = x - own_mean.view(1, -1, *(1 for _ in range(x.ndim - 2)))
        parts = x.new_zeros(world(), 2 * x.shape[1] + 1)
        if not borrowed:
            rows = x.new_tensor([x.numel() / x.shape[1]])
            parts[rank()] = torch.cat([own_mean, deviations.square_().mean(dims), rows])
        add_over_ranks(parts)
        means, variances, counts = parts.split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        ctx.borrowed = borrowed
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *(1 for _ in range(x.ndim - 2)))
        d_bias = dy.sum(dims)
        d_weight = ((dy * x).sum(dims) - mean * d_bias) * inverse
        sums = torch.cat([d_bias, d_weight])
        add_over_ranks(sums)
        if ctx.borrowed:
            sums.zero_()  # the statistics do not depend on these rows
        by_bias, by_weight = (sums / count).chunk(2)
        scale = inverse if weight is None else inverse * weight
        # (dy - by_bias - normalised * by_weight) * scale, with as few passes over the whole tensor as it takes.
        of_x = -by_weight * inverse * scale
        rest = -by_bias * scale - of_x * mean
        dx = torch.addcmul(rest.view(shape), dy, scale.view(shape)).addcmul_(x, of_x.view(shape))
        return dx, None if weight is None else d_weight, None if weight is None else d_bias, None, None


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
