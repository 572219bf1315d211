"""Numbers to predict."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from blocks import ColReader, DataBlock, DataError, RegressionBlock, RegressionSetup, TensorNumber


@pytest.mark.parametrize("value", [3, 2.5, np.float64(2.5), True])
def test_a_number(value: Any) -> None:
    encoded = RegressionSetup()(value)
    assert (type(encoded), encoded.dtype, encoded.shape) == (TensorNumber, torch.float32, ())
    assert RegressionSetup().decode(encoded) == float(value)


@pytest.mark.parametrize("value", [[1.0, 2.0], (1, 2), np.array([1, 2])])
def test_several_numbers(value: Any) -> None:
    (setup,) = RegressionBlock(2).type_tfms
    assert isinstance(setup, RegressionSetup)
    encoded = setup(value)
    assert (type(encoded), encoded.shape) == (TensorNumber, (2,))
    assert setup.decode(encoded) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("setup", "values"),
    [
        (RegressionSetup(), pa.array([1, 2, 3])),
        (RegressionSetup(1), pa.array([0.1, 2.0])),
        (RegressionSetup(2), pa.array([[1.0, 2.0], [3.0, 4.0]])),
        (RegressionSetup(), pa.array([], pa.float64())),
    ],
)
def test_a_column_is_encoded_as_its_rows(setup: RegressionSetup, values: pa.Array) -> None:
    column = setup.encodes_column(values)
    assert column.dtype == np.float32
    assert column.tolist() == [setup(v).tolist() for v in values.to_pylist()]


@pytest.mark.parametrize(
    ("c", "value"),
    [(None, None), (None, float("nan")), (None, float("inf")), (None, "x"), (2, [1.0]), (2, 1.0), (1, [1.0]), (None, [[1.0]])],
)
def test_what_is_no_number(c: int | None, value: Any) -> None:
    with pytest.raises(DataError, match="is not a "):
        RegressionSetup(c)(value)


def test_a_column_with_empty_cells() -> None:
    with pytest.raises(DataError, match="1 rows have no finite number"):
        RegressionSetup().encodes_column(pa.array([1, None]))
    with pytest.raises(DataError, match="2 rows have no finite number"):
        RegressionSetup().encodes_column(pa.array([1.0, float("inf"), float("nan")]))


def test_the_row_that_has_no_number_is_named() -> None:
    rows = pd.DataFrame({"a": range(40), "b": [*range(37), None, 1, 2]})
    block = DataBlock(blocks=(RegressionBlock(), RegressionBlock()), get_x=ColReader("a"), get_y=ColReader("b"))
    with pytest.raises(DataError, match="the column 'b' has no value in row 37: 1 rows have no finite number"):
        block.dataloaders(rows, cache="off")


def test_n_out() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        RegressionBlock(0)
