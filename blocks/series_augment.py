"""Random changes of a batch of series, (rows, steps, channels), each sample by its own draw: for `batch_tfms`.

What follows a window (TensorForecast) is only changed where the window's values are, by Scale; what is known of its steps
(TensorKnown) never. Padding, NaN at the end of a series, stays padding.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from blocks.draws import bernoulli, normal, stream_of, uniform
from blocks.tensors import TensorForecast, TensorKnown, TensorSeries
from blocks.transform import RandTransform

Drawn = tuple[torch.Tensor, torch.Tensor]  # whether it acts on each sample, bool (rows,), and what is drawn for it


@dataclass
class _OfSeries(RandTransform, registered=False):
    """What they share. p: how often it acts on a sample."""

    p: float = field(default=0.5, kw_only=True)

    order: ClassVar[int] = 50
    to_forecasts: ClassVar[bool] = False  # whether what follows a window is changed like the window

    def draw(self, x: Any, keys: torch.Tensor) -> Drawn:
        """Whether it acts on each sample, and the number or the key that says how."""
        return bernoulli(keys, stream_of(f"{type(self).__name__}.p"), self.p), self.how(keys)

    def how(self, keys: torch.Tensor) -> torch.Tensor:
        """What is drawn of each sample's key, (rows, ...)."""
        return keys

    def changed(self, x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """All samples as those it acts on become."""
        raise NotImplementedError

    def encodes(self, x: TensorSeries, drawn: Drawn) -> torch.Tensor:
        if isinstance(x, TensorKnown) or (isinstance(x, TensorForecast) and not self.to_forecasts):
            return x
        acts, how = (d.to(x.device) for d in drawn)
        return torch.where(acts[:, None, None], self.changed(x, how), x)


@dataclass
class Jitter(_OfSeries):
    """Normal noise of the deviation `std` on each value: a share of a channel's deviation where the series are scaled."""

    std: float = 0.05

    def changed(self, x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        noise = normal(drawn, stream_of("Jitter"), n=x[0].numel()).view(x.shape)
        return x + self.std * noise.to(x.dtype)


@dataclass
class Scale(_OfSeries):
    """Each channel times a factor of its own, from 1/(1 + most) to 1 + most; what follows a window is scaled with it."""

    most: float = 0.2

    to_forecasts: ClassVar[bool] = True

    def changed(self, x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        factor = (1 + self.most) ** uniform(drawn, stream_of("Scale"), -1, 1, n=x.shape[-1])
        return x * factor[:, None].to(x.dtype)


@dataclass
class TimeWarp(_OfSeries):
    """Time runs faster in one half of a series and slower in the other: its middle moves by up to `most` of its length.

    The way from old to new places is a curve that keeps both ends where they are; values lie on the line between neighbours.
    """

    most: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.most <= 0.25:
            raise ValueError(f"TimeWarp: most is from 0 to 0.25, beyond which time would run backwards, not {self.most}")

    def how(self, keys: torch.Tensor) -> torch.Tensor:
        return uniform(keys, stream_of("TimeWarp"), -self.most, self.most)

    def changed(self, x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        last = ((~x.isnan().all(2)).sum(1) - 1).clamp(min=1)[:, None]  # of each series without its padding
        place = (steps / last).clamp(max=1)
        warped = (place + 4 * drawn[:, None] * place * (1 - place)) * last
        below = warped.floor().long().clamp(max=x.shape[1] - 1)
        above = torch.minimum(below + 1, last)
        share = (warped - below)[..., None].to(x.dtype)
        at = torch.arange(len(x), device=x.device)[:, None]
        return torch.where((steps <= last)[..., None], x[at, below] * (1 - share) + x[at, above] * share, x)


@dataclass
class TimeMask(_OfSeries):
    """A stretch of up to `most` of the series' length becomes its mean, in all channels."""

    most: float = 0.2

    def how(self, keys: torch.Tensor) -> torch.Tensor:
        return uniform(keys, stream_of("TimeMask"), n=2)

    def changed(self, x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        there = ~x.isnan().all(2)
        length = there.sum(1)
        width = drawn[:, 0] * self.most * length
        start = drawn[:, 1] * (length - width)
        steps = torch.arange(x.shape[1], device=x.device)
        inside = (steps >= start[:, None]) & (steps < (start + width)[:, None]) & there
        return torch.where(inside[..., None], x.nanmean(1, keepdim=True), x)


def series_tfms() -> list[RandTransform]:
    """Gentle changes that leave the class of most series as it is: time, size, noise, and a stretch left out."""
    return [TimeWarp(), Scale(), Jitter(), TimeMask()]
