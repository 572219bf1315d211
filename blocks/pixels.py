"""Pixels on the batch side: bytes become floats, floats are normalised by statistics that are given or learned."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from blocks.pieces import ByPiece
from blocks.tensors import TensorImage, TensorMask, as_plain
from blocks.transform import Summary, Transform, dispatch

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class IntToFloatTensor(ByPiece, Transform):
    """uint8 pixels 0..255 become float32 0..1, class numbers of masks int64; `div_mask` is 255 for masks of 0 and 255."""

    div_mask: int = 1

    order: ClassVar[int] = 10

    @dispatch
    def encodes(self, x: TensorImage) -> torch.Tensor:
        return as_plain(x).to(torch.float32, copy=True).div_(255)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorMask) -> torch.Tensor:  # noqa: F811
        return as_plain(x).to(torch.int64) // self.div_mask

    @dispatch
    def decodes(self, x: TensorImage) -> torch.Tensor:
        return x.clamp(0, 1).mul(255).round().to(torch.uint8)

    @dispatch  # type: ignore[no-redef]
    def decodes(self, x: TensorMask) -> torch.Tensor:  # noqa: F811
        return (x * self.div_mask).to(torch.uint8)


@dataclass
class PixelMoments:
    """How many uint8 pixels each channel has, their sum and the sum of their squares. Mergeable, exact."""

    n: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)

    def observe(self, value: torch.Tensor, row_id: Any) -> None:
        """value: (channels, height, width), uint8."""
        pixels = as_plain(value).flatten(1).to(torch.int64)
        self.merge(type(self)(pixels.shape[1], pixels.sum(1).tolist(), (pixels * pixels).sum(1).tolist()))

    def merge(self, other: Self) -> None:
        if not self.n:
            self.sums, self.squares = [0] * len(other.sums), [0] * len(other.sums)
        if other.n:
            self.n += other.n
            self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
            self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]

    def to_plain(self) -> dict[str, Any]:
        return {"n": self.n, "sums": self.sums, "squares": self.squares}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(plain["n"], list(plain["sums"]), list(plain["squares"]))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of pixels as 0..1, one number a channel; a channel that never changes has the std 1."""
        # Integers to the last: n * squares - sums ** 2 has no rounding.
        variances = [(self.n * q - s * s) / (self.n * self.n) for s, q in zip(self.sums, self.squares, strict=True)]
        return (
            tuple(s / self.n / 255 for s in self.sums),
            tuple(v**0.5 / 255 if v > 0 else 1.0 for v in variances),
        )


@dataclass
class Normalize(Transform):
    """(x - mean) / std for each channel of float pixels; `mean` and `std` have one number a channel, in 0..1.

    Without them, those of the training part's pixels: learned once, from the stored bytes.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    order: ClassVar[int] = 99
    summary: ClassVar[type[Summary] | None] = PixelMoments

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"Normalize takes as many means as positive stds, not {self.mean!r} and {self.std!r}")

    @classmethod
    def from_stats(cls, mean: Sequence[float], std: Sequence[float]) -> "Normalize":
        """fastai's name for `Normalize(mean, std)`."""
        return cls(tuple(mean), tuple(std))

    @property
    def fitted(self) -> bool:
        return bool(self.mean)

    def setups(self, train: PixelMoments, valid: PixelMoments) -> set[Any]:
        self.mean, self.std = train.mean_and_std()
        return set()

    def _as(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.mean:
            raise ValueError(
                "Normalize() has not learned its statistics: use it in the batch_tfms of a DataBlock, or give it some, as in "
                "Normalize.from_stats(*IMAGENET_STATS)"
            )
        return _by_channel(self.mean, x.dtype, x.device), _by_channel(self.std, x.dtype, x.device)

    def encodes(self, x: TensorImage) -> torch.Tensor:
        mean, std = self._as(x)
        return (as_plain(x) - mean).div_(std)

    def decodes(self, x: TensorImage) -> torch.Tensor:
        mean, std = self._as(x)
        return x * std + mean


@functools.lru_cache(maxsize=16)  # the same few at each batch and each prediction
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)
