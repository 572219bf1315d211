"""Numbers to predict as a block."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.summaries import Quantiles
from blocks.tensors import TensorNumber
from blocks.transform import ItemTransform, Summary, Transform


@dataclass
class RegressionSetup(ItemTransform):
    """A number becomes a float32 scalar, several numbers a row of `c` of them (None: as many as there are)."""

    c: int | None = None

    def encodes(self, x: object) -> TensorNumber:
        try:
            numbers = np.array(x, np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{x!r:.200} ({type(x).__name__}) is not a number, nor several") from error
        wanted = numbers.ndim < 2 if self.c is None else numbers.size == self.c and numbers.ndim == (self.c > 1)
        if not wanted or not np.isfinite(numbers).all():
            raise DataError(f"{x!r:.200} is not {self._wanted}: leave such rows out, or fill them in before")
        return torch.from_numpy(numbers).as_subclass(TensorNumber)

    @property
    def _wanted(self) -> str:
        return {None: "a number or a row of numbers", 1: "a number"}.get(self.c, f"a row of {self.c} numbers")

    def encodes_column(self, values: pa.Array) -> np.ndarray:
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)) or self.c not in (None, 1):
            rows = [self.encodes(v).numpy() for v in values.to_pylist()]
            return np.stack(rows) if rows else np.zeros((0, self.c or 1), np.float32)
        numbers = values.to_numpy(zero_copy_only=False)
        numbers = numbers.astype(np.float32)
        none = int((~np.isfinite(numbers)).sum())
        if none:
            raise DataError(f"{none} rows have no finite number: leave them out, or fill them in before")
        return numbers

    def decodes(self, x: TensorNumber) -> Any:
        return float(x) if x.ndim == 0 else [float(v) for v in x]


@dataclass
class LogNumber(Transform):
    """A positive number becomes its logarithm: for prices and other numbers that differ by factors."""

    def encodes(self, x: TensorNumber) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.encodes_column(x.numpy())))

    def encodes_column(self, values: Any) -> np.ndarray:
        numbers = np.asarray(values)
        if (numbers <= 0).any():
            raise DataError(f"{numbers.min():g} has no logarithm: leave such rows out, or predict the number itself")
        return np.log(numbers)

    def decodes(self, x: TensorNumber) -> torch.Tensor:
        return x.exp()


@dataclass
class QuantileNumber(Transform):
    """A number becomes the share of the training part's numbers that are below it, 0..1, by `n` quantiles of them."""

    n: int = 100
    quantiles: tuple[float, ...] = ()

    summary: ClassVar[type[Summary] | None] = Quantiles

    @property
    def fitted(self) -> bool:
        return bool(self.quantiles)

    def setups(self, train: Quantiles, valid: Quantiles) -> set[Any]:
        self.quantiles = tuple(train.quantile(i / self.n) for i in range(self.n + 1))
        if self.quantiles[0] == self.quantiles[-1]:
            raise DataError(f"all numbers to predict are {self.quantiles[0]:g}: there is nothing to learn")
        return set()

    def encodes(self, x: TensorNumber) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.encodes_column(x.numpy())))

    def encodes_column(self, values: Any) -> np.ndarray:
        found = np.interp(np.asarray(values, np.float64), self.quantiles, np.linspace(0, 1, len(self.quantiles)))
        return found.astype(np.float32)

    def decodes(self, x: TensorNumber) -> torch.Tensor:
        found = np.interp(x.numpy(), np.linspace(0, 1, len(self.quantiles)), self.quantiles)
        return torch.from_numpy(np.asarray(found, np.float32))


def RegressionBlock(n_out: int | None = None, *tfms: Transform) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of numbers to predict, `n_out` a row; None: one, or as many as the rows have.

    tfms: what is learned instead of the numbers themselves, such as `LogNumber()`; predictions are turned back.
    """
    if n_out is not None and n_out < 1:
        raise ValueError(f"n_out is how many numbers a row has, at least 1, not {n_out!r}")
    return TransformBlock(type_tfms=(RegressionSetup(n_out), *tfms))
