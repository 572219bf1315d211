"""The stored form: typed columns as uncompressed Arrow IPC files, read by memory map.

A column is one of three kinds. *fixed*: tensors of one shape, as Arrow's canonical fixed-shape tensor (numbers: a plain
column). *ragged*: tensors whose first dimension varies (tokens, boxes), as a large list of the flat numbers. *bytes*:
encoded files that are decoded each epoch. The field's metadata remembers the kind, the semantic type, the dtype and the
shape of a ragged row's element, so that what was a TensorImage comes out as one, here and in any other process.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blocks.errors import DataError
from blocks.storage import put

TYPE_KEY, DTYPE_KEY, KIND_KEY, TAIL_KEY = b"fastray.type", b"fastray.dtype", b"fastray.kind", b"fastray.tail"
SAME_SIZE = "samples of one data set must have one size and dtype. Add Resize(size) to item_tfms"


@dataclass(frozen=True)
class FixedColumn:
    """`array[i]` is row i: (rows, *shape)."""

    array: np.ndarray


@dataclass(frozen=True)
class RaggedColumn:
    """`values[offsets[i]:offsets[i + 1]]` is row i: values (total, *tail), offsets int64 (rows + 1)."""

    values: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class BytesColumn:
    """`data[offsets[i]:offsets[i + 1]]` are the bytes of row i: data uint8 (total,), offsets int64 (rows + 1)."""

    data: np.ndarray
    offsets: np.ndarray


StoredColumn = FixedColumn | RaggedColumn | BytesColumn


def typed_column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    """Some rows' tensors, or their encoded bytes, as an Arrow column.

    Tensors are ragged when their class says so (`ragged = True`), fixed when it says not; a plain tensor is what its rows
    are: of one shape, or differing in the first dimension. DataError for anything else.
    """
    first = values[0]
    if isinstance(first, bytes) and all(isinstance(v, bytes) for v in values):
        return _field(name, pa.large_binary(), "bytes", "bytes", "uint8"), pa.array(values, pa.large_binary())
    stray = next((v for v in values if not isinstance(v, torch.Tensor)), None)
    if stray is not None:
        raise DataError(
            f"the column {name!r} ends up as {type(stray).__name__}, not as a tensor: give its block a transform that makes "
            "one, or use a block such as ImageBlock() or CategoryBlock()"
        )
    kind = type(first)
    values = [v.as_subclass(torch.Tensor) for v in values]  # to ask a typed tensor for its shape costs microseconds
    first = values[0]
    ragged = getattr(kind, "ragged", None)
    if ragged is None:
        ragged = any(v.shape != first.shape or v.shape[:1] == (0,) for v in values)
    start = 1 if ragged else 0  # of the dimensions that must be equal
    odd = next((v for v in values if v.ndim < start or v.shape[start:] != first.shape[start:] or v.dtype != first.dtype), None)
    if odd is not None:
        raise DataError(f"column {name!r} holds {described(first)} and {described(odd)}: {SAME_SIZE}")
    arrays = [_numpy(name, v) for v in values]
    if not ragged:
        return fixed_column(name, np.stack(arrays), kind)
    tail = tuple(first.shape[1:])
    if 0 in tail:
        raise DataError(f"column {name!r} holds {described(first)}: beyond the first, each dimension must be at least 1")
    offsets = np.cumsum([0, *(a.size for a in arrays)], dtype=np.int64)
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(_storable(flat)))
    return ragged_column(name, column, kind, flat.dtype, tail)


def fixed_column(name: str, array: np.ndarray, kind: type[torch.Tensor]) -> tuple[pa.Field, pa.Array]:
    """An array (rows, *shape) as a fixed Arrow column of the semantic type `kind`."""
    if 0 in array.shape[1:]:
        raise DataError(f"column {name!r} holds samples of {'x'.join(map(str, array.shape[1:]))}, which have no element")
    column = pa.array(_storable(array.reshape(-1)))
    if array.ndim > 1:
        tensors = pa.fixed_shape_tensor(column.type, array.shape[1:])
        lists = pa.FixedSizeListArray.from_arrays(column, type=tensors.storage_type)
        column = pa.ExtensionArray.from_storage(tensors, lists)
    return _field(name, column.type, kind.__name__, "fixed", array.dtype.name), column


def ragged_column(
    name: str, lists: pa.LargeListArray, kind: type[torch.Tensor], dtype: np.dtype, tail: tuple[int, ...] = ()
) -> tuple[pa.Field, pa.Array]:
    """Lists of the flat numbers of rows (n, *tail) as a ragged Arrow column of the semantic type `kind`."""
    return _field(name, lists.type, kind.__name__, "ragged", dtype.name, tail), lists


def _field(
    name: str, stored: pa.DataType, type_name: str, kind: str, dtype: str, tail: tuple[int, ...] | None = None
) -> pa.Field:
    metadata = {TYPE_KEY: type_name, KIND_KEY: kind, DTYPE_KEY: dtype}
    return pa.field(name, stored, metadata=metadata if tail is None else metadata | {TAIL_KEY: json.dumps(tail)})


def _numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy()
    except TypeError as error:
        raise DataError(f"column {name!r} holds {described(tensor)}, which cannot be stored: make it float32") from error


def _storable(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise DataError(f"numbers of {array.dtype} cannot be stored: make them bool, whole numbers or floats")
    return array.view(np.uint8) if array.dtype == bool else array  # Arrow packs booleans as bits, which cannot be mapped


def described(t: torch.Tensor) -> str:
    """Shape and dtype for an error message."""
    return f"{'x'.join(map(str, t.shape)) or 'a number'} of {str(t.dtype).removeprefix('torch.')}"


def described_field(field: pa.Field) -> str:
    """Semantic type, shape and dtype of a stored column: equal for all shards of one data set."""
    kind, dtype = field.metadata[KIND_KEY], field.metadata[DTYPE_KEY].decode()
    if kind == b"bytes":
        return "encoded bytes"
    if kind == b"ragged":
        shape = "x".join(["n", *map(str, json.loads(field.metadata[TAIL_KEY]))])
    else:
        shape = "x".join(map(str, field.type.shape)) if isinstance(field.type, pa.FixedShapeTensorType) else "a number"
    return f"{field.metadata[TYPE_KEY].decode()} of {shape}, {dtype}"


# --- files -------------------------------------------------------------------------------------------------------------


def shard_bytes(table: pa.Table) -> pa.Buffer:
    """`table` as the content of an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def write_shard(where: str | Path, file: str, table: pa.Table) -> dict[str, Any]:
    """Write `table` as one Arrow IPC file in a folder or at a URL; returns its entry of the index.

    crc32: of the whole file; it is computed at about 4 GB/s.
    """
    content = shard_bytes(table)
    put(where, file, content)
    return {"file": file, "rows": table.num_rows, "bytes": content.size, "crc32": zlib.crc32(content)}


def map_shard(path: Path) -> pa.Table:
    """The table in `path`, memory-mapped: reading a value reads that page of the file, and none can be changed."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def as_array(table: pa.Table, name: str) -> np.ndarray:
    """A column of one number or one fixed shape a row as a read-only array (rows, *shape), without a copy."""
    column = _one_chunk(table, name)
    array = column.to_numpy_ndarray() if isinstance(column, pa.FixedShapeTensorArray) else column.to_numpy(zero_copy_only=True)
    return _as_stored(array, table.schema.field(name).metadata)


def read_column(table: pa.Table, name: str) -> StoredColumn:
    """A stored column as read-only numpy views of the table's memory, without a copy of its values."""
    metadata = table.schema.field(name).metadata or {}
    match metadata.get(KIND_KEY):
        case b"ragged":
            lists = _one_chunk(table, name)
            tail = tuple(json.loads(metadata[TAIL_KEY]))
            values = _as_stored(lists.values.to_numpy(zero_copy_only=True), metadata).reshape(-1, *tail)
            offsets = lists.offsets.to_numpy(zero_copy_only=True)
            return RaggedColumn(values, offsets if prod(tail) == 1 else offsets // prod(tail))
        case b"bytes":
            blobs = _one_chunk(table, name)
            _, offsets_buffer, data = blobs.buffers()
            offsets = np.frombuffer(offsets_buffer, np.int64, len(blobs) + 1, blobs.offset * 8)
            return BytesColumn(np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), offsets)
    return FixedColumn(as_array(table, name))


def _one_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _as_stored(array: np.ndarray, metadata: dict[bytes, bytes] | None) -> np.ndarray:
    array.flags.writeable = False
    return array.view(bool) if (metadata or {}).get(DTYPE_KEY) == b"bool" else array
