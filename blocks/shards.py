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

TYPE_KEY, DTYPE_KEY = b"fastray.type", b"fastray.dtype"
SAME_SIZE = "samples of one data set must have one size and dtype. Add Resize(size) to item_tfms"


def typed_column(name: str, values: Sequence[torch.Tensor]) -> tuple[pa.Field, pa.Array]:
    """Tensors of one shape and dtype as an Arrow column. DataError when they differ."""
    first = values[0]
    if not isinstance(first, torch.Tensor):
        raise DataError(
            f"the column {name!r} ends up as {type(first).__name__}, not as a tensor: give its block a transform that makes "
            "one, or use a block such as ImageBlock() or CategoryBlock()"
        )
    odd = next((v for v in values if v.shape != first.shape or v.dtype != first.dtype), None)
    if odd is not None:
        raise DataError(f"column {name!r} holds {described(first)} and {described(odd)}: {SAME_SIZE}")
    array = np.stack([v.numpy() for v in values])
    dtype = array.dtype.name
    if dtype == "bool":
        array = array.view(np.uint8)  # Arrow packs booleans as bits, which cannot be mapped as they are
    column = pa.array(array) if array.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    return pa.field(name, column.type, metadata={TYPE_KEY: type(first).__name__, DTYPE_KEY: dtype}), column


def described(t: torch.Tensor) -> str:
    """Shape and dtype for an error message."""
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


def as_array(table: pa.Table, name: str) -> np.ndarray:
    """A stored column as a read-only array (rows, *shape), without a copy."""
    (chunk,) = table[name].chunks
    array = chunk.to_numpy_ndarray() if isinstance(chunk, pa.FixedShapeTensorArray) else chunk.to_numpy(zero_copy_only=True)
    dtype = (table.schema.field(name).metadata or {}).get(DTYPE_KEY)
    return array.view(bool) if dtype == b"bool" else array
