"""Values over time as inputs: many channels, series of any length, gaps filled along the time.

A series is (steps, channels), time first, so that windows of it and batches of series of different lengths are cut and padded
along it (`Windows`, `DataLoaders.new(samples=...)`).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.summaries import Moments
from blocks.tensors import TensorKnown, TensorSeries
from blocks.transform import ItemTransform, Summary, Transform

Scale = Literal["training", "sample"]


@dataclass
class MakeSeries(ItemTransform):
    """Numbers over time, (steps,) or (steps, channels), become a float32 series; gaps lie on the line between neighbours.

    channels: how many there must be; None: as many as there are. DataError for what is no such thing, holds infinite numbers,
    or has a channel of gaps only.
    """

    channels: int | None = None

    def encodes(self, x: object) -> TensorSeries:
        try:
            values = np.array(x, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{x!r:.200} ({type(x).__name__}) is not a series: numbers (steps,) or (steps, channels)"
            ) from error
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or not values.size:
            raise DataError(f"a series is numbers (steps,) or (steps, channels), not an array of {values.shape}")
        if self.channels not in (None, values.shape[1]):
            raise DataError(f"the series has {values.shape[1]} channels, not {self.channels}: time comes first, then channels")
        if np.isinf(values).any():
            raise DataError(f"the series has {int(np.isinf(values).sum())} infinite numbers: make them gaps")
        for channel in values.T:
            _fill(channel)
        return torch.from_numpy(values.astype(np.float32)).as_subclass(TensorSeries)

    def decodes(self, x: TensorSeries) -> torch.Tensor:
        """The series without the padding of its batch."""
        return x[~x.isnan().all(-1)]


@dataclass
class MakeKnown(MakeSeries):
    """A series of what is known of the future as well, such as holidays and prices; otherwise as `MakeSeries`."""

    def encodes(self, x: object) -> TensorKnown:
        return super().encodes(x).as_subclass(TensorKnown)


def _fill(channel: np.ndarray) -> None:
    gaps = np.isnan(channel)
    if gaps.all():
        raise DataError("a channel of the series holds gaps only: leave the series out, or the channel")
    if gaps.any():
        there = np.flatnonzero(~gaps)
        channel[gaps] = np.interp(np.flatnonzero(gaps), there, channel[there])


@dataclass
class SeriesMoments:
    """The moments of each channel over the steps of all series."""

    channels: list[Moments] = field(default_factory=list)

    def observe(self, value: Any, row_id: Any) -> None:
        numbers = np.asarray(value, np.float64)
        seen = [Moments(len(c), float(c.mean()), float(((c - c.mean()) ** 2).sum())) for c in numbers.T]
        self.merge(type(self)(seen))

    def merge(self, other: Self) -> None:
        if not self.channels:
            self.channels = [Moments() for _ in other.channels]
        if other.channels and len(other.channels) != len(self.channels):
            raise DataError(f"series of {len(self.channels)} and of {len(other.channels)} channels: each needs as many")
        for mine, theirs in zip(self.channels, other.channels, strict=False):
            mine.merge(theirs)

    def to_plain(self) -> dict[str, Any]:
        return {"channels": [m.to_plain() for m in self.channels]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls([Moments.from_plain(m) for m in plain["channels"]])


@dataclass
class NormalizeSeries(Transform):
    """(x - mean) / std of each channel, over the steps of all series of the training part."""

    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()

    summary: ClassVar[type[Summary] | None] = SeriesMoments

    @property
    def fitted(self) -> bool:
        return bool(self.means)

    def setups(self, train: SeriesMoments, valid: SeriesMoments) -> set[Any]:
        self.means = tuple(m.mean for m in train.channels)
        self.stds = tuple(m.std or 1.0 for m in train.channels)  # a constant channel becomes zeros
        return set()

    def encodes(self, x: TensorSeries) -> torch.Tensor:
        if x.shape[-1] != len(self.means):
            raise DataError(f"the series has {x.shape[-1]} channels, not {len(self.means)}")
        return (x - x.new_tensor(self.means)) / x.new_tensor(self.stds)

    def decodes(self, x: TensorSeries) -> torch.Tensor:
        return x * x.new_tensor(self.stds) + x.new_tensor(self.means)


@dataclass
class StandardizeSeries(Transform):
    """(x - mean) / std of each channel of one series over its own steps: for what counts by its shape alone."""

    def encodes(self, x: TensorSeries) -> torch.Tensor:
        std, mean = torch.std_mean(x, dim=0, correction=0)
        return (x - mean) / torch.where(std > 0, std, 1.0)


def KnownBlock(channels: int | None = None) -> TransformBlock:  # noqa: N802
    """A block of what is known of each step, (steps, covariates), scaled by the training part: an input beside a series."""
    return TransformBlock(type_tfms=(MakeKnown(channels), NormalizeSeries()))


def SeriesBlock(scale: Scale | None = "training", channels: int | None = None) -> TransformBlock:  # noqa: N802
    """A block of series, (steps, channels), of one length or of several, the shorter ones of a batch padded with NaN.

    scale: by each channel's mean and deviation in the "training" part, in the "sample" itself, or not at all. channels: how
    many there must be.
    """
    scales: dict[str | None, tuple[Transform, ...]] = {
        "training": (NormalizeSeries(),),
        "sample": (StandardizeSeries(),),
        None: (),
    }
    if scale not in scales:
        raise ValueError(f"scale is 'training', 'sample' or None, not {scale!r}")
    return TransformBlock(type_tfms=(MakeSeries(channels), *scales[scale]))
