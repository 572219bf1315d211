"""BatchNorm on several ranks: with the statistics of the global batch, or of each rank's own rows.

The layers of a model change their class for the time of a training; their parameters, buffers and hooks stay.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.distributed import add_over_ranks, rank, world

_BatchNorm = nn.modules.batchnorm._BatchNorm


def over_ranks(model: nn.Module, sync: bool = True) -> bool:
    """Have the BatchNorm layers of `model` normalise over all ranks' rows (sync), or over each rank's, until `undo`.

    Whether it has any that now do so.
    """
    own = [module for module in model.modules() if _can_change(type(module))]
    for module in own:
        tensors = (*module.parameters(), *module.buffers())
        way = _PerRank if not sync else _OverGPUs if tensors and tensors[0].is_cuda else _OverRanks
        module.__class__ = _changed(type(module), way)
    return bool(own)


def undo(model: nn.Module) -> None:
    """The layers of `model` are torch's own again."""
    for module in model.modules():
        if isinstance(module, _OverRanks | _PerRank | _OverGPUs):
            module.__class__ = next(own for (own, _), changed in _CHANGED.items() if changed is type(module))


def in_words(model: nn.Module, sync: bool) -> str:
    """What the BatchNorm layers of `model` do on several ranks, for a person to read; empty where it has none."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    others = sorted({type(m).__name__ for m in norms if not isinstance(m, _OverRanks | _PerRank | _OverGPUs)})
    said = []
    if any(isinstance(m, _OverRanks | _PerRank | _OverGPUs) for m in norms):
        rows = f"the rows of all {world()} workers (sync_bn=True)" if sync else "each worker's own rows (sync_bn=False)"
        said.append(f"BatchNorm: statistics of {rows}")
    if others:
        said.append(f"{', '.join(others)}: statistics as its own class takes them on each worker")
    return "; ".join(said)


_rows_are_borrowed = False


def borrow_rows(borrowed: bool) -> None:
    """Whether the rows of this rank's batch only keep it in step, and are to leave the batch statistics alone."""
    global _rows_are_borrowed
    _rows_are_borrowed = borrowed


def _by_running_statistics(module: _BatchNorm, x: Tensor) -> Tensor:
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return F.batch_norm(x, mean, var, module.weight, module.bias, training=False, eps=module.eps)


class _PerRank(_BatchNorm):
    """BatchNorm over this rank's rows. A single number has no variance, and borrowed ones are not its own: running ones do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (_rows_are_borrowed or x.numel() == x.shape[1]):
            return _by_running_statistics(self, x)
        return _BatchNorm.forward(self, x)


class _OverGPUs(nn.SyncBatchNorm):
    """Torch's own over GPUs. A rank with borrowed rows takes part in its sums with none."""

    process_group = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and _rows_are_borrowed:
            return _by_running_statistics(self, x) + super().forward(x[:0].float()).sum()  # ranks with rows send floats, too
        return super().forward(x)


class _OverRanks(_BatchNorm):
    """BatchNorm with the statistics of the global batch, on CPUs, where torch has none."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        # In half precision sums over a batch would be too coarse.
        wide = x if x.dtype is torch.float64 else x.float()
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        y, mean, var, count = _Normalised.apply(wide, weight, bias, self.eps, _rows_are_borrowed)
        if count <= 1:  # on all ranks alike, as torch does in one process
            raise ValueError(f"Expected more than 1 value per channel when training, got {int(count)} over all ranks")
        if self.track_running_stats:
            self._track(mean, var * (count / (count - 1)))
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


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


class _Activates(_BatchNorm):
    """What timm's BatchNormAct2d, whose `forward` repeats torch's, does after it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


def _can_change(own: type) -> bool:
    # timm's by its name, so as not to import timm.
    return own in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or _is_timms(own)


def _is_timms(own: type) -> bool:
    return own.__name__ == "BatchNormAct2d" and own.__module__.startswith("timm.")


_CHANGED: dict[tuple[type, type], type] = {}  # by the own class and the way


def _changed(own: type, way: type) -> type:
    """The class of torch's or timm's `own` that normalises in a `way`."""
    if (own, way) not in _CHANGED:
        bases = (_Activates, way, own) if _is_timms(own) else (way, own)
        _CHANGED[own, way] = type(f"{own.__name__}{way.__name__}", bases, {})
    return _CHANGED[own, way]
