"""The stored form: typed columns as uncompressed Arrow IPC files, read by memory map.

A column of tensors of one shape is Arrow's canonical fixed-shape tensor (scalars: a plain column); its field remembers
the semantic type, so that what was a TensorImage comes out as one, here and in any other process.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from blocks.errors import DataError

TYPE_KEY = b"fastray.type"


def typed_column(name: str, values: Sequence[torch.Tensor]) -> tuple[pa.Field, pa.Array]:
    """Tensors of one shape and dtype as an Arrow column. DataError when they differ."""
    first = values[0]
    odd = next((v for v in values if v.shape != first.shape or v.dtype != first.dtype), None)
    if odd is not None:
        raise DataError(
            f"column {name!r} holds {_shape(first)} and {_shape(odd)}: samples of one data set must have one size. "
            "Add Resize(size) to item_tfms"
        )
    array = np.stack([v.numpy() for v in values])
    column = pa.array(array) if array.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    return pa.field(name, column.type, metadata={TYPE_KEY: type(first).__name__}), column


def _shape(t: torch.Tensor) -> str:
    return f"{'x'.join(map(str, t.shape)) or 'a number'} of {str(t.dtype).removeprefix('torch.')}"


def write_shard(path: Path, table: pa.Table) -> None:
    """Write `table` as one Arrow IPC file; it stands under its name only when it is whole."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    partial.replace(path)


def map_shard(path: Path) -> pa.Table:
    """The table in `path`, memory-mapped: reading a value reads that page of the file, and none can be changed."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def as_array(column: pa.ChunkedArray) -> np.ndarray:
    """A stored column as a read-only array (rows, *shape), without a copy."""
    (chunk,) = column.chunks
    if isinstance(chunk, pa.FixedShapeTensorArray):
        return chunk.to_numpy_ndarray()
    return chunk.to_numpy(zero_copy_only=True)
