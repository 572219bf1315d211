"""Models of values over time, (rows, steps, channels) -> (rows, outputs), or forecasts (rows, horizon, channels)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks.tensors import as_plain
from training.callback import Callback
from training.metrics import AvgMetric, values_over_ranks
from training.models import model_builder
from training.tabular import Sizes, TableInput

if TYPE_CHECKING:
    from training.learner import Learner

KERNELS = (39, 19, 9)


class _Masked(nn.Module):
    """A BatchNorm of (rows, channels, steps) that sees the steps of the series alone, and leaves zeros where there is padding.

    So the next convolution meets what it meets at the end of a series that is not padded.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            return self.norm(x)
        if not self.training:
            return self.norm(x).masked_fill(padding, 0)
        there, steps = ~padding.squeeze(1), x.transpose(1, 2)
        normed = torch.zeros_like(steps)
        normed[there] = self.norm(steps[there]).to(steps.dtype)
        return normed.transpose(1, 2)


def _without_padding(x: Tensor) -> tuple[Tensor, Tensor | None]:
    # (rows, steps, channels) as (rows, channels, steps) with zeros for padding, and where that is, (rows, 1, steps).
    padding = x.isnan().all(2)[:, None]
    if not torch.compiler.is_exporting() and not padding.any():
        return x.transpose(1, 2), None
    return x.transpose(1, 2).masked_fill(padding, 0), padding


def _mean(x: Tensor, padding: Tensor | None) -> Tensor:
    # Over the steps that are there, (rows, channels).
    return x.mean(2) if padding is None else x.sum(2) / (~padding).sum(2)


class _Inception(nn.Module):
    """Convolutions of several lengths beside each other over fewer channels, and a pool, joined."""

    def __init__(self, n_in: int, width: int, bottleneck: int):
        super().__init__()
        self.squeeze = nn.Conv1d(n_in, bottleneck, 1, bias=False) if n_in > 1 else nn.Identity()
        squeezed = bottleneck if n_in > 1 else n_in
        self.convs = nn.ModuleList(nn.Conv1d(squeezed, width, k, padding=k // 2, bias=False) for k in KERNELS)
        self.pool, self.pooled = nn.MaxPool1d(3, 1, padding=1), nn.Conv1d(n_in, width, 1, bias=False)
        self.norm = _Masked(width * (len(KERNELS) + 1))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        squeezed = self.squeeze(x)
        highest = self.pool(x) if padding is None else self.pool(x.masked_fill(padding, -torch.inf)).masked_fill(padding, 0)
        joined = torch.cat([*(conv(squeezed) for conv in self.convs), self.pooled(highest)], dim=1)
        return F.relu(self.norm(joined, padding))


class InceptionTime(nn.Module):
    """Series (rows, steps, n_in) -> (rows, n_out), of any length (Fawaz et al., arXiv:1909.04939).

    Steps of NaN are padding: what is said of a series is the same whatever stands beside it. width: channels of each
    convolution. depth: of inception modules; every third one adds what came three before.
    """

    def __init__(self, n_in: int, n_out: int, width: int = 32, depth: int = 6, bottleneck: int = 32):
        super().__init__()
        joined = width * (len(KERNELS) + 1)
        self.blocks = nn.ModuleList(_Inception(joined if i else n_in, width, bottleneck) for i in range(depth))
        self.shortcuts = nn.ModuleList(_Shortcut(joined if i else n_in, joined) for i in range(depth // 3))
        self.head = nn.Linear(joined, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x, padding = _without_padding(x)
        kept = x
        for i, block in enumerate(self.blocks):
            x = block(x, padding)
            if i % 3 == 2:
                x = kept = F.relu(x + self.shortcuts[i // 3](kept, padding))
        return self.head(_mean(x, padding))


class _Shortcut(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(n_in, n_out, 1, bias=False), _Masked(n_out)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return self.norm(self.conv(x), padding)


class ResNet1d(nn.Module):
    """Series (rows, steps, n_in) -> (rows, n_out), of any length: residual convolutions (Wang et al., arXiv:1611.06455).

    Steps of NaN are padding, as for `InceptionTime`.
    """

    def __init__(self, n_in: int, n_out: int, widths: tuple[int, ...] = (64, 128, 128)):
        super().__init__()
        sizes = [n_in, *widths]
        self.blocks = nn.ModuleList(_Residual1d(a, b) for a, b in zip(sizes, widths, strict=False))
        self.head = nn.Linear(sizes[-1], n_out)

    def forward(self, x: Tensor) -> Tensor:
        x, padding = _without_padding(x)
        for block in self.blocks:
            x = block(x, padding)
        return self.head(_mean(x, padding))


class _Residual1d(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(n_out if i else n_in, n_out, k, padding=k // 2, bias=False) for i, k in enumerate((7, 5, 3))
        )
        self.norms = nn.ModuleList(_Masked(n_out) for _ in self.convs)
        self.shortcut = _Shortcut(n_in, n_out)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(F.relu(h) if i else h), padding)
        return F.relu(h + self.shortcut(x, padding))


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

    def begin_at(self, weights: Tensor) -> None:
        """Take the linear forecast of least squares, `fit_linear`'s, for the first weights: each quantile begins there."""
        each = weights.T.repeat_interleave(self.n_quantiles or 1, dim=0)
        with torch.no_grad():
            self.linear.weight.copy_(each[:, :-1])
            self.linear.bias.copy_(each[:, -1])


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


class WithCovariates(nn.Module):
    """A forecast of what is left of a series once the effect of its covariates is taken away, and that effect added again.

    model: a forecast of (rows, steps, channels), such as `NLinear`. The effect on each step is that of a small network of what
    is known of the step (rows, steps + horizon, n_known), of what is known of the series (the columns of `TableInput`: codes
    of emb_szs, n_static numbers), and of the step's place. It begins at zero.
    """

    def __init__(self, model: nn.Module, channels: int, n_known: int, emb_szs: Sizes = (), n_static: int = 0, width: int = 32):
        super().__init__()
        self.model, self.n_known = model, n_known
        self.static = TableInput(emb_szs, n_static, bn_cont=False) if emb_szs or n_static else None
        n_in = 1 + n_known + (self.static.width if self.static else 0)
        last = nn.Linear(width, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.effect = nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), last)
        self.horizon = int(model.horizon)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        seen = x.shape[1]
        place = torch.linspace(-1, 1, seen + self.horizon, device=x.device, dtype=x.dtype)
        of_steps = [place[None, :, None].expand(len(x), -1, 1), *beside[: bool(self.n_known)]]
        if self.static is not None:
            of_series = self.static(*beside[bool(self.n_known) :])
            of_steps.append(of_series[:, None].expand(-1, seen + self.horizon, -1))
        effect = self.effect(torch.cat(of_steps, dim=2))
        ahead, added = self.model(x - effect[:, :seen]), effect[:, seen:]
        return ahead + (added if ahead.ndim == 3 else added[..., None])


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


FORECASTERS = {"nlinear": nlinear, "tcn": tcn}


@model_builder
def covariate_forecast(
    *, arch: str, settings: Mapping[str, Any], channels: int, n_known: int, emb_szs: Sizes = (), n_static: int = 0
) -> nn.Module:
    """A `WithCovariates` of the forecast `arch`, "nlinear" or "tcn", by its arguments `settings`, as plain data."""
    return WithCovariates(FORECASTERS[arch](**settings), channels, n_known, emb_szs, n_static)


# --- what any forecast is to beat --------------------------------------------------------------------------------------


def naive_forecast(x: Tensor, horizon: int, season: int = 1) -> Tensor:
    """What was there a season before, (rows, steps, channels) -> (rows, horizon, channels); season 1: the last step."""
    steps = x.shape[1]
    if not 1 <= season <= steps:
        raise ValueError(f"a season of {season} steps does not lie within the {steps} steps that are seen")
    ahead = torch.arange(horizon, device=x.device) % season
    return x[:, steps - season + ahead]


def fit_linear(windows: Iterable[Sequence[Tensor]]) -> Tensor:
    """The linear forecast of least squares, a little ridge added, one for all channels: (steps + 1, horizon) float32.

    windows: batches of what is seen (rows, steps, channels) first, and what follows (rows, horizon, channels) last. Its inputs
    are what differs from the last step, and 1.
    """
    gram, moments = torch.zeros(()), torch.zeros(())
    for batch in windows:
        x, y = as_plain(batch[0]).double(), as_plain(batch[-1]).double()
        seen, came = _from_last(x), (y - x[:, -1:]).transpose(1, 2).flatten(0, 1)
        gram, moments = gram + seen.T @ seen, moments + seen.T @ came
    ridge = torch.full((len(gram),), 1e-4 * gram.diagonal()[:-1].mean().item() + 1e-9, dtype=torch.float64)
    ridge[-1] = 0
    return torch.linalg.solve(gram + ridge.diag(), moments).float()


def linear_forecast(x: Tensor, weights: Tensor) -> Tensor:
    """What `fit_linear` learned to follow, (rows, steps, channels) -> (rows, horizon, channels)."""
    ahead = _from_last(x) @ weights.to(x)
    return ahead.unflatten(0, (len(x), x.shape[2])).transpose(1, 2) + x[:, -1:]


def _from_last(x: Tensor) -> Tensor:
    # (rows * channels, steps + 1): what differs from the last step, and 1.
    differs = (x - x[:, -1:]).transpose(1, 2).flatten(0, 1)
    return torch.cat([differs, differs.new_ones(len(differs), 1)], dim=1)


class _Against(Callback):
    """Records beside each validation the mean absolute error of another forecast of the same windows, as `valid/<name>`."""

    order = -40  # after the Recorder
    needs_inputs = True
    remove_on_fetch = True

    def __init__(self, name: str):
        self.metric = AvgMetric(_mean_absolute, higher_is_better=False, name=name)

    def forecast(self, x: Tensor, horizon: int) -> Tensor:
        """(rows, steps, channels) -> (rows, horizon, channels)."""
        raise NotImplementedError

    def before_validate(self, learn: "Learner") -> None:
        self.metric.reset()

    def after_loss(self, learn: "Learner") -> None:
        if not learn.training and learn.rows:
            target = as_plain(learn.yb[0])
            self.metric.accumulate(self.forecast(as_plain(learn.xb[0]), target.shape[1]), target, learn.rows)

    def after_validate(self, learn: "Learner") -> None:
        learn.recorder.values |= {f"valid/{name}": value for name, value in values_over_ranks([self.metric]).items()}
        self.metric.reset()  # else a validation that is cancelled before it begins has the value of the last one


class AgainstNaive(_Against):
    """Records the error of the seasonal naive forecast beside each validation: `valid/mae_naive`, by `naive_forecast`."""

    def __init__(self, season: int = 1):
        super().__init__("mae_naive")
        self.season = season

    def forecast(self, x: Tensor, horizon: int) -> Tensor:
        return naive_forecast(x, horizon, self.season)


class AgainstLinear(_Against):
    """Records the error of a linear forecast beside each validation: `valid/mae_linear`. weights: of `fit_linear`."""

    def __init__(self, weights: Tensor):
        super().__init__("mae_linear")
        self.weights = weights

    def forecast(self, x: Tensor, horizon: int) -> Tensor:
        return linear_forecast(x, self.weights)


def _mean_absolute(pred: Tensor, targ: Tensor) -> Tensor:
    return (pred - targ).abs().mean()
