"""Numbers to predict as a block."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.tensors import TensorNumber
from blocks.transform import ItemTransform


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
        if not wanted or np.isnan(numbers).any():
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
        if np.isnan(numbers).any():
            raise DataError(f"{int(np.isnan(numbers).sum())} rows have no number: leave them out, or fill them in before")
        return numbers.astype(np.float32)

    def decodes(self, x: TensorNumber) -> Any:
        return float(x) if x.ndim == 0 else [float(v) for v in x]


def RegressionBlock(n_out: int | None = None) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of numbers to predict, `n_out` a row; None: one, or as many as the rows have."""
    if n_out is not None and n_out < 1:
        raise ValueError(f"n_out is how many numbers a row has, at least 1, not {n_out!r}")
    return TransformBlock(type_tfms=(RegressionSetup(n_out),))
