"""What is stored comes back equal, of its type, and as a view that cannot be written."""

import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import DataError
from blocks.shards import (
    TYPE_KEY,
    BytesColumn,
    FixedColumn,
    RaggedColumn,
    StoredColumn,
    as_array,
    described_field,
    fixed_column,
    map_shard,
    read_column,
    shard_bytes,
    typed_column,
    write_shard,
)
from blocks.tensors import TensorBase, TensorImage, TensorMask, tensor_type

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES += (torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.float32, torch.float64)


class TensorTokens(TensorBase):
    """Ragged by its class, whatever the rows look like."""

    ragged: ClassVar[bool] = True


class TensorGrid(TensorBase):
    """Fixed by its class."""

    ragged: ClassVar[bool] = False


def stored(values: Any) -> tuple[pa.Field, StoredColumn]:
    """`values` written as a file's content and read back from it."""
    field, column = typed_column("x", values)
    content = shard_bytes(pa.Table.from_arrays([column], schema=pa.schema([field])))
    table = pa.ipc.open_file(content).read_all()
    assert table.schema.field("x").equals(field, check_metadata=True)
    return table.schema.field("x"), read_column(table, "x")


def rows_of(column: StoredColumn) -> list[np.ndarray]:
    match column:
        case FixedColumn(array):
            return list(array)
        case RaggedColumn(values, offsets) | BytesColumn(values, offsets):
            assert offsets.dtype == np.int64
            return [values[a:b] for a, b in pairwise(offsets)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    numbers = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 100, shape)
    return torch.from_numpy(np.asarray(numbers)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    tail=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from(DTYPES),
)
def test_ragged_rows_come_back(lengths: list[int], tail: list[int], dtype: torch.dtype) -> None:
    values = [random((n, *tail), dtype, seed).as_subclass(TensorTokens) for seed, n in enumerate(lengths)]
    field, column = stored(values)
    assert isinstance(column, RaggedColumn)
    assert column.values.shape == (sum(lengths), *tail)
    assert tensor_type(field.metadata[TYPE_KEY].decode()) is TensorTokens
    for row, value in zip(rows_of(column), values, strict=True):
        assert row.dtype == value.numpy().dtype
        assert np.array_equal(row, value.numpy())


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 4), shape=st.lists(st.integers(1, 3), max_size=3), dtype=st.sampled_from(DTYPES))
def test_rows_of_one_shape_come_back(rows: int, shape: list[int], dtype: torch.dtype) -> None:
    values = [random(tuple(shape), dtype, seed).as_subclass(TensorImage) for seed in range(rows)]
    field, column = stored(values)
    assert isinstance(column, FixedColumn)
    assert tensor_type(field.metadata[TYPE_KEY].decode()) is TensorImage
    assert column.array.dtype == values[0].numpy().dtype
    assert np.array_equal(column.array, torch.stack(values).numpy())


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.binary(max_size=5), min_size=1, max_size=6))
def test_bytes_come_back(values: list[bytes]) -> None:
    field, column = stored(values)
    assert isinstance(column, BytesColumn)
    assert [row.tobytes() for row in rows_of(column)] == values
    assert described_field(field) == "encoded bytes"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([torch.zeros(3), torch.zeros(3)], FixedColumn),
        ([torch.zeros(3), torch.zeros(2)], RaggedColumn),
        ([torch.zeros(0), torch.zeros(0)], RaggedColumn),
        ([torch.zeros(3).as_subclass(TensorTokens)], RaggedColumn),
        ([torch.zeros(3).as_subclass(TensorGrid)], FixedColumn),
        ([torch.tensor(1), torch.tensor(2)], FixedColumn),
    ],
)
def test_the_kind_is_the_classes_or_what_the_rows_are(values: list[torch.Tensor], kind: type) -> None:
    assert isinstance(stored(values)[1], kind)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.zeros(3).as_subclass(TensorGrid), torch.zeros(2).as_subclass(TensorGrid)], "3 of float32 and 2 of float32"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "3x8x8 of float32 and 3x9x9 of float32"),
        ([torch.zeros(2, 4), torch.zeros(3, 5)], "2x4 of float32 and 3x5 of float32"),
        ([torch.zeros(3), torch.zeros(3, dtype=torch.int64)], "3 of float32 and 3 of int64"),
        ([torch.zeros(3), torch.tensor(1.0)], "3 of float32 and a number of float32"),
        ([torch.zeros(2, 0)], "no element"),
        ([torch.zeros(1, 0).as_subclass(TensorTokens)], "at least 1"),
        ([torch.zeros(2, dtype=torch.bfloat16)], "make it float32"),
        ([torch.zeros(2, dtype=torch.complex64)], "complex64 cannot be stored"),
        (["a text"], "ends up as str, not as a tensor"),
        ([torch.zeros(2), b"bytes"], "ends up as bytes"),
    ],
)
def test_what_cannot_be_stored_is_named(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        typed_column("x", values)


def test_masks_of_two_sizes_are_no_ragged_column() -> None:
    """Their heights differ as lengths do, but a batch of them could not be stacked."""
    with pytest.raises(DataError, match="8x8 of uint8 and 9x8 of uint8"):
        typed_column("y", [torch.zeros(h, 8, dtype=torch.uint8).as_subclass(TensorMask) for h in (8, 9)])


def test_shards_of_one_data_set_are_described_alike() -> None:
    of_one = described_field(typed_column("x", [torch.zeros(1, 4).as_subclass(TensorTokens)])[0])
    of_two = described_field(typed_column("x", [torch.zeros(n, 4).as_subclass(TensorTokens) for n in (2, 0)])[0])
    assert of_one == of_two == "TensorTokens of nx4, float32"
    assert described_field(typed_column("x", [torch.tensor(True)])[0]) == "Tensor of a number, bool"


def test_a_whole_array_is_stored_as_its_rows_would_be() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::2]
    field, column = fixed_column("x", array, TensorImage)
    by_rows = typed_column("x", [torch.from_numpy(row.copy()).as_subclass(TensorImage) for row in array])
    assert column.equals(by_rows[1])
    assert field.equals(by_rows[0], check_metadata=True)


def test_views_of_the_file_cannot_be_written(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "fixed": [torch.ones(2, dtype=torch.bool)],
        "ragged": [torch.ones(1), torch.ones(2)],
        "bytes": [b"ab"],
    }
    for name, values in rows.items():
        field, column = typed_column(name, values)
        write_shard(tmp_path, name, pa.Table.from_arrays([column], schema=pa.schema([field])))
        before = pa.total_allocated_bytes()
        match read_column(map_shard(tmp_path / name), name):
            case FixedColumn(array) | RaggedColumn(array, _) | BytesColumn(array, _):
                assert not array.flags.writeable
                assert pa.total_allocated_bytes() == before  # nothing was copied out of the map
    assert not list(tmp_path.glob("*.partial"))


def test_a_part_of_a_table_reads_its_own_rows() -> None:
    fields, columns = zip(
        typed_column("r", [torch.full((n, 2), float(n)) for n in (1, 2, 3)]),
        typed_column("b", [b"a", b"bc", b"def"]),
        strict=True,
    )
    table = pa.Table.from_arrays(list(columns), schema=pa.schema(fields)).slice(1)
    assert [r.tolist() for r in rows_of(read_column(table, "r"))] == [[[2.0] * 2] * 2, [[3.0] * 2] * 3]
    assert [r.tobytes() for r in rows_of(read_column(table, "b"))] == [b"bc", b"def"]


def test_a_column_without_metadata_is_plain_numbers() -> None:
    table = pa.concat_tables([pa.table({"part": pa.array([0, 1], pa.uint8())}), pa.table({"part": pa.array([1], pa.uint8())})])
    assert as_array(table, "part").tolist() == [0, 1, 1]


def test_a_shards_entry_describes_its_file(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "a.arrow", pa.table({"n": [1, 2, 3]}))
    content = (tmp_path / "a.arrow").read_bytes()
    assert entry == {"file": "a.arrow", "rows": 3, "bytes": len(content), "crc32": zlib.crc32(content)}
