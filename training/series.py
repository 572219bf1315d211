"""Models of values over time, (rows, steps, channels) -> (rows, outputs), or forecasts (rows, horizon, channels)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks.tensors import as_plain
from training.callback import Callback
from training.metrics import AvgMetric, values_over_ranks
from training.models import model_builder

if TYPE_CHECKING:
    from training.learner import Learner

KERNELS = (39, 19, 9)


class _Inception(nn.Module):
    """Convolutions of several lengths beside each other over fewer channels, and a pool, joined."""

    def __init__(self, n_in: int, width: int, bottleneck: int):
        super().__init__()
        self.squeeze = nn.Conv1d(n_in, bottleneck, 1, bias=False) if n_in > 1 else nn.Identity()
        squeezed = bottleneck if n_in > 1 else n_in
        self.convs = nn.ModuleList(nn.Conv1d(squeezed, width, k, padding=k // 2, bias=False) for k in KERNELS)
        self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), nn.Conv1d(n_in, width, 1, bias=False))
        self.norm = nn.BatchNorm1d(width * (len(KERNELS) + 1))

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        joined = torch.cat([*(conv(squeezed) for conv in self.convs), self.pooled(x)], dim=1)
        return F.relu(self.norm(joined))


class InceptionTime(nn.Module):
    """Series (rows, steps, n_in) -> (rows, n_out), of any length (Fawaz et al., arXiv:1909.04939).

    width: channels of each convolution. depth: of inception modules; every third one adds what came three before.
    """

    def __init__(self, n_in: int, n_out: int, width: int = 32, depth: int = 6, bottleneck: int = 32):
        super().__init__()
        joined = width * (len(KERNELS) + 1)
        self.blocks = nn.ModuleList(_Inception(joined if i else n_in, width, bottleneck) for i in range(depth))
        self.shortcuts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(joined if i else n_in, joined, 1, bias=False), nn.BatchNorm1d(joined))
            for i in range(depth // 3)
        )
        self.head = nn.Linear(joined, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = kept = x.transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                x = kept = F.relu(x + self.shortcuts[i // 3](kept))
        return self.head(x.mean(2))


class ResNet1d(nn.Module):
    """Series (rows, steps, n_in) -> (rows, n_out), of any length: residual convolutions (Wang et al., arXiv:1611.06455)."""

    def __init__(self, n_in: int, n_out: int, widths: tuple[int, ...] = (64, 128, 128)):
        super().__init__()
        sizes = [n_in, *widths]
        self.blocks = nn.ModuleList(_Residual1d(a, b) for a, b in zip(sizes, widths, strict=False))
        self.head = nn.Linear(sizes[-1], n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2))


class _Residual1d(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i, k in enumerate((7, 5, 3)):
            layers += [nn.Conv1d(n_out if i else n_in, n_out, k, padding=k // 2, bias=False), nn.BatchNorm1d(n_out)]
            layers += [nn.ReLU()] if i < 2 else []
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv1d(n_in, n_out, 1, bias=False), nn.BatchNorm1d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class NLinear(nn.Module):
    """Forecasts (rows, steps, channels) -> (rows, horizon, channels): one linear layer for all channels, over what differs from
    the last step (Zeng et al., "Are transformers effective for time series forecasting?", arXiv:2205.13504).

    n_quantiles: so many forecasts of each, (rows, horizon, channels, n_quantiles); None: one, without that axis.
    """

    def __init__(self, steps: int, horizon: int, n_quantiles: int | None = None):
        super().__init__()
        self.horizon, self.n_quantiles = horizon, n_quantiles
        self.linear = nn.Linear(steps, horizon * (n_quantiles or 1))

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1:]
        ahead = self.linear((x - last).transpose(1, 2))  # (rows, channels, horizon * quantiles)
        return _as_forecast(ahead, self.horizon, self.n_quantiles, last)


class TCN(nn.Module):
    """Forecasts as `NLinear`, by causal convolutions, each twice as wide apart as the last (Bai et al., arXiv:1803.01271)."""

    def __init__(self, channels: int, horizon: int, width: int = 32, depth: int = 5, n_quantiles: int | None = None):
        super().__init__()
        self.channels, self.horizon, self.n_quantiles = channels, horizon, n_quantiles
        self.convs = nn.ModuleList(nn.Conv1d(width if i else channels, width, 3, dilation=2**i) for i in range(depth))
        self.head = nn.Linear(width, channels * horizon * (n_quantiles or 1))

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1:]
        h = (x - last).transpose(1, 2)
        for i, conv in enumerate(self.convs):
            new = F.relu(conv(F.pad(h, (2 << i, 0))))
            h = new + h if new.shape == h.shape else new
        ahead = self.head(h[:, :, -1]).view(len(x), self.channels, -1)
        return _as_forecast(ahead, self.horizon, self.n_quantiles, last)


def _as_forecast(ahead: Tensor, horizon: int, n_quantiles: int | None, last: Tensor) -> Tensor:
    # (rows, channels, horizon * quantiles) -> (rows, horizon, channels[, quantiles]), the last step added again.
    shaped = ahead.unflatten(2, (horizon, n_quantiles or 1)).transpose(1, 2)
    return shaped.squeeze(3) + last if n_quantiles is None else shaped + last[..., None]


@model_builder
def inception_time(*, n_in: int, n_out: int, width: int = 32, depth: int = 6) -> nn.Module:
    """An `InceptionTime` by its arguments, as plain data."""
    return InceptionTime(n_in, n_out, width, depth)


@model_builder
def resnet1d(*, n_in: int, n_out: int) -> nn.Module:
    """A `ResNet1d` by its arguments, as plain data."""
    return ResNet1d(n_in, n_out)


@model_builder
def nlinear(*, steps: int, horizon: int, n_quantiles: int | None = None) -> nn.Module:
    """An `NLinear` by its arguments, as plain data."""
    return NLinear(steps, horizon, n_quantiles)


@model_builder
def tcn(*, channels: int, horizon: int, width: int = 32, depth: int = 5, n_quantiles: int | None = None) -> nn.Module:
    """A `TCN` by its arguments, as plain data."""
    return TCN(channels, horizon, width, depth, n_quantiles)


# --- what any forecast is to beat --------------------------------------------------------------------------------------


def naive_forecast(x: Tensor, horizon: int, season: int = 1) -> Tensor:
    """What was there a season before, (rows, steps, channels) -> (rows, horizon, channels); season 1: the last step."""
    steps = x.shape[1]
    if not 1 <= season <= steps:
        raise ValueError(f"a season of {season} steps does not lie within the {steps} steps that are seen")
    ahead = torch.arange(horizon, device=x.device) % season
    return x[:, steps - season + ahead]


class AgainstNaive(Callback):
    """Records beside each validation what the seasonal naive forecast's error is: `valid/mae_naive`, by `naive_forecast`."""

    order = -40  # after the Recorder
    needs_inputs = True
    remove_on_fetch = True

    def __init__(self, season: int = 1):
        self.season = season
        self.metric = AvgMetric(_mean_absolute, higher_is_better=False, name="mae_naive")

    def before_validate(self, learn: "Learner") -> None:
        self.metric.reset()

    def after_loss(self, learn: "Learner") -> None:
        if not learn.training and learn.rows:
            target = as_plain(learn.yb[0])
            naive = naive_forecast(as_plain(learn.xb[0]), target.shape[1], self.season)
            self.metric.accumulate(naive, target, learn.rows)

    def after_validate(self, learn: "Learner") -> None:
        learn.recorder.values |= {f"valid/{name}": value for name, value in values_over_ranks([self.metric]).items()}
        self.metric.reset()  # else a validation that is cancelled before it begins has the value of the last one


def _mean_absolute(pred: Tensor, targ: Tensor) -> Tensor:
    return (pred - targ).abs().mean()
