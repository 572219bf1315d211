"""The contract suite notices what breaks the contract; that ours keep it is in test_contracts.py."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from blocks import TensorImage, TensorNumber, Transform, TransformBlock
from blocks.category import CategoryCounts
from blocks.prepare import map_here
from blocks.testing import Case, check_block, check_carried, check_summary, check_transform

PICTURES = [torch.full((1, 2, 2), float(i)).as_subclass(TensorImage) for i in range(3)]


@dataclass
class Plus(Transform):
    """Keeps the contract."""

    n: int = 1

    def encodes(self, x: int) -> int:
        return x + self.n

    def decodes(self, x: int) -> int:
        return x - self.n

    def encodes_column(self, values: pa.Array) -> np.ndarray:
        return values.to_numpy(zero_copy_only=False) + self.n


@dataclass
class Minus(Plus):
    """Its inverse goes the wrong way, its column face as well."""

    def encodes(self, x: int) -> int:
        return x - self.n


@dataclass
class Counting(Plus):
    """Remembers what it saw."""

    def encodes(self, x: int) -> int:
        self.n += 1
        return x + self.n


@dataclass
class OfTheBatch(Transform):
    """Looks at the other rows."""

    def encodes(self, x: TensorImage) -> torch.Tensor:
        return x - x.mean()


@dataclass
class Guessing(Transform):
    """Draws without the key of the sample."""

    def encodes(self, x: TensorImage) -> torch.Tensor:
        return x + torch.rand(1)


@dataclass
class Hiding(Transform):
    """Has a field that its equality does not see, and takes any argument for it."""

    n: Any = field(default=3, compare=False)

    def __post_init__(self) -> None:
        self.n = self.n if isinstance(self.n, list) else [self.n]


@dataclass
class Swallowing(Transform):
    """Makes something of anything."""

    def __call__(self, x: Any) -> Any:
        return 3


BROKEN = [
    (Case(Minus(), [1, 2], inverse=0), "decoding does not lead back to value 0: -1 instead of 1"),
    (Case(Minus(), [1, 2], column=True), r"1 is np\.int64\(2\) in a column, 0 alone"),
    (Case(Counting(), [1]), "of value 0 twice: 3 instead of 4|was changed by encoding"),
    (Case(OfTheBatch(), PICTURES, batch=True), "value 0 alone is not as in its batch: 1 apart"),
    (Case(Guessing(), PICTURES, batch=True), "of value 0 twice: 0.* apart"),
    (Case(Swallowing()), "makes 3 of an object it cannot know"),
]


@pytest.mark.parametrize(("case", "message"), BROKEN, ids=lambda b: type(b.transform).__name__ if isinstance(b, Case) else "")
def test_a_broken_promise_is_noticed(case: Case, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_transform(case)


def test_a_kept_one_passes() -> None:
    check_transform(Case(Plus(3), [1, 2, 3], inverse=0, column=True))


def test_a_field_that_is_not_plain_data_is_noticed() -> None:
    with pytest.raises(ValueError, match="not plain data"):
        check_transform(Case(Hiding()))


def test_what_a_carrier_loses_or_changes_is_noticed() -> None:
    cases = [Case(Plus(), [1, 2])]
    check_carried(cases, map_here)
    with pytest.raises(AssertionError, match="2 values went out, 1 came back"):
        check_carried(cases, lambda function, work: map(function, work[:1]))
    with pytest.raises(AssertionError, match="of value 0 elsewhere: 3 instead of 2"):
        check_carried(cases, lambda function, work: [swapped(function(w), work) for w in work])


def swapped(table: pa.Table, work: Any) -> pa.Table:
    return table.set_column(1, "value", pa.array([1 - table["value"][0].as_py()]))


class LastLabel(CategoryCounts):
    """Depends on the order of the parts."""

    def merge(self, other: Any) -> None:
        self.counts, self.first_row = other.counts, other.first_row


class EveryOther(CategoryCounts):
    """Its column face sees other rows."""

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        super().observe_column(values[::2], row_ids[::2])


def test_a_summary_that_does_not_merge_is_noticed() -> None:
    check_summary(CategoryCounts, list("abcab"))
    with pytest.raises(AssertionError, match="of parts is not"):
        check_summary(LastLabel, list("abcab"))
    with pytest.raises(AssertionError, match="of a column is not"):
        check_summary(EveryOther, list("abcab"))


@dataclass
class ToNumber(Transform):
    """Makes numbers of a block."""

    def encodes(self, x: float) -> TensorNumber:
        return torch.tensor(x).as_subclass(TensorNumber)


@dataclass
class Retyped(Transform):
    """Gives a batch another type."""

    def encodes(self, x: TensorNumber) -> TensorImage:
        return x.as_subclass(TensorImage)


def test_a_block_that_loses_its_type_is_noticed() -> None:
    check_block(TransformBlock(type_tfms=(ToNumber(),)), [1.0, 2.0])
    with pytest.raises(AssertionError, match="is a TensorImage after batch_tfms"):
        check_block(TransformBlock(type_tfms=(ToNumber(),), batch_tfms=(Retyped(),)), [1.0, 2.0])
