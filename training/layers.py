"""Layers under fastai's names, for models of one's own; whatever torch has already is torch's."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Activation = Callable[[], nn.Module]
Norm = Literal["batch", "batch_zero", "instance", "spectral"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class ConvLayer(nn.Sequential):
    """A convolution, a normalisation and an activation: (rows, ni, *size) -> (rows, nf, *size / stride).

    ks: kernel size; padding: None keeps the size at stride 1. norm: "batch", "batch_zero" (its scale starts at 0, so that a
    residual block starts as the identity), "instance", "spectral" (of the weights), or None. bias: None for one where no
    normalisation takes it away. act_cls: None for none. transpose: a transposed convolution. ndim: 1, 2 or 3 dimensions.
    """

    def __init__(
        self,
        ni: int,
        nf: int,
        ks: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool | None = None,
        norm: Norm | None = "batch",
        act_cls: Activation | None = nn.ReLU,
        transpose: bool = False,
        ndim: int = 2,
    ):
        padding = ((ks - 1) // 2 if not transpose else 0) if padding is None else padding
        normalised = norm in ("batch", "batch_zero", "instance")
        kind = (_TRANSPOSED if transpose else _CONV)[ndim]
        conv = kind(ni, nf, ks, stride, padding, bias=not normalised if bias is None else bias)
        nn.init.kaiming_normal_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        layers: list[nn.Module] = [nn.utils.parametrizations.spectral_norm(conv) if norm == "spectral" else conv]
        if norm in ("batch", "batch_zero"):
            layers.append(_batch_norm(nf, ndim, zero=norm == "batch_zero"))
        elif norm == "instance":
            layers.append(_INSTANCE[ndim](nf, affine=True))
        elif norm not in (None, "spectral"):
            raise ValueError(f"norm is batch, batch_zero, instance, spectral or None, not {norm!r}")
        if act_cls is not None:
            layers.append(act_cls())
        super().__init__(*layers)


def _batch_norm(nf: int, ndim: int, zero: bool) -> nn.Module:
    norm = _BATCH[ndim](nf)
    if zero:
        nn.init.zeros_(norm.weight)
    return norm


class LinBnDrop(nn.Sequential):
    """BatchNorm, dropout with probability `p`, linear, activation, each if asked: (rows, n_in) -> (rows, n_out).

    lin_first: linear and activation come before BatchNorm and dropout.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        bn: bool = True,
        p: float = 0.0,
        act: nn.Module | None = None,
        lin_first: bool = False,
    ):
        before: list[nn.Module] = [nn.BatchNorm1d(n_out if lin_first else n_in)] if bn else []
        if p:
            before.append(nn.Dropout(p))
        linear: list[nn.Module] = [nn.Linear(n_in, n_out, bias=not bn), *([] if act is None else [act])]
        super().__init__(*(linear + before if lin_first else before + linear))


class AdaptiveConcatPool2d(nn.Module):
    """Largest and mean pixel side by side: (rows, c, h, w) -> (rows, 2 c, size, size)."""

    def __init__(self, size: int = 1):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.adaptive_max_pool2d(x, self.size), F.adaptive_avg_pool2d(x, self.size)], dim=1)


class PixelShuffle_ICNR(nn.Sequential):  # noqa: N801  fastai's name
    """Pictures `scale` times as large: (rows, ni, h, w) -> (rows, nf, scale h, scale w) by a 1x1 convolution's channels.

    It starts as nearest neighbours, without a checkerboard (Aitken et al., arXiv:1707.02937). blur: a mean of 2x2 pixels last.
    """

    def __init__(
        self,
        ni: int,
        nf: int | None = None,
        scale: int = 2,
        blur: bool = False,
        norm: Norm | None = None,
        act_cls: Activation | None = nn.ReLU,
    ):
        nf = ni if nf is None else nf
        conv = ConvLayer(ni, nf * scale**2, ks=1, norm=norm, act_cls=act_cls)
        weight = next(p for p in conv.parameters() if p.ndim == 4)
        with torch.no_grad():
            weight.copy_(weight[:: scale**2].repeat_interleave(scale**2, dim=0))
        smooth = [nn.ReplicationPad2d((1, 0, 1, 0)), nn.AvgPool2d(2, stride=1)] if blur else []
        super().__init__(conv, nn.PixelShuffle(scale), *smooth)


class SelfAttention(nn.Module):
    """Each position of (rows, n, *size) looks at all others (Zhang et al., arXiv:1805.08318); it starts as the identity."""

    def __init__(self, n: int):
        super().__init__()
        if n < 8:
            raise ValueError(f"self-attention asks with an eighth of the channels: it needs at least 8, not {n}")
        self.query, self.key, self.value = (
            nn.utils.parametrizations.spectral_norm(nn.Conv1d(n, width, 1, bias=False)) for width in (n // 8, n // 8, n)
        )
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        # Of every position (rows, size, size): how much it takes of each.
        attention = (self.query(flat).transpose(1, 2) @ self.key(flat)).softmax(dim=-1)
        return (self.gamma * (self.value(flat) @ attention.transpose(1, 2)) + flat).view_as(x)


class ResBlock(nn.Module):
    """A residual block: (rows, ni * expansion, *size) -> (rows, nf * expansion, *size / stride); it starts as its short cut.

    expansion: 1 for two 3x3 convolutions; more for 1x1, 3x3, 1x1, the last with that many times the filters.
    The short cut averages to the size and has a 1x1 convolution where the number of filters changes.
    """

    def __init__(
        self,
        expansion: int,
        ni: int,
        nf: int,
        stride: int = 1,
        ks: int = 3,
        act_cls: Activation = nn.ReLU,
        ndim: int = 2,
    ):
        super().__init__()
        wide_in, wide = ni * expansion, nf * expansion
        if expansion == 1:
            convs = [
                ConvLayer(wide_in, nf, ks, stride, act_cls=act_cls, ndim=ndim),
                ConvLayer(nf, wide, ks, norm="batch_zero", act_cls=None, ndim=ndim),
            ]
        else:
            convs = [
                ConvLayer(wide_in, nf, 1, act_cls=act_cls, ndim=ndim),
                ConvLayer(nf, nf, ks, stride, act_cls=act_cls, ndim=ndim),
                ConvLayer(nf, wide, 1, norm="batch_zero", act_cls=None, ndim=ndim),
            ]
        self.convs = nn.Sequential(*convs)
        short: list[nn.Module] = [] if stride == 1 else [_AVG_POOL[ndim](stride, ceil_mode=True)]
        if wide_in != wide:
            short.append(ConvLayer(wide_in, wide, 1, act_cls=None, ndim=ndim))
        self.short = nn.Sequential(*short)
        self.act = act_cls()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convs(x) + self.short(x))


class SimpleCNN(nn.Sequential):
    """Convolutions with stride 2 from `filters[0]` channels to `filters[-1]`, then their means: (rows, filters[-1])."""

    def __init__(
        self,
        filters: Sequence[int],
        kernel_szs: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        bn: bool = True,
    ):
        layers = len(filters) - 1
        kernel_szs, strides = kernel_szs or [3] * layers, strides or [2] * layers
        sizes = zip(filters[:-1], filters[1:], kernel_szs, strides, strict=True)
        convs = [
            ConvLayer(ni, nf, ks, stride, norm="batch" if bn and i < layers - 1 else None)
            for i, (ni, nf, ks, stride) in enumerate(sizes)
        ]
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class SigmoidRange(nn.Module):
    """Squeezes values into `low` .. `high`."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (self.high - self.low) + self.low


class Embedding(nn.Embedding):
    """torch's embedding (n, width), starting near zero: a normal distribution of `std`, cut at twice that."""

    def __init__(self, ni: int, nf: int, std: float = 0.01):
        super().__init__(ni, nf)
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


class TimeDistributed(nn.Module):
    """Runs `module` on each step of (rows, steps, ...), all at once, or one after the other with `low_mem`."""

    def __init__(self, module: nn.Module, low_mem: bool = False, tdim: int = 1):
        super().__init__()
        self.module, self.low_mem, self.tdim = module, low_mem, tdim

    def forward(self, *xs: Tensor) -> Tensor:
        if self.low_mem:
            steps = zip(*(x.unbind(self.tdim) for x in xs), strict=True)
            return torch.stack([self.module(*step) for step in steps], dim=self.tdim)
        first = [x.movedim(self.tdim, 1) for x in xs]
        rows, steps_n = first[0].shape[:2]
        result = self.module(*(x.flatten(0, 1) for x in first))
        return result.unflatten(0, (rows, steps_n)).movedim(1, self.tdim)
