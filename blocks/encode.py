"""Encoding: rows of a source as typed columns. By whole Arrow columns where getter and transforms can, else item by item."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blocks.category import is_missing
from blocks.errors import DataError, UnreadableRow
from blocks.files import read_bytes
from blocks.plan import Column, Encode
from blocks.rows import Rows
from blocks.shards import fixed_column, ragged_column, typed_column
from blocks.splits import VALID
from blocks.tensors import as_plain
from blocks.transform import ColumnTransform, Transform, dispatch

# --- one sample --------------------------------------------------------------------------------------------------------


def encode_sample(encode: Encode, row_id: Any, item: Any, part: int = VALID) -> tuple[Any, ...]:
    """One item of a part as the values of its blocks: what is stored of it."""
    values = []
    for column in encode.columns:
        with naming(row_id, column.name):
            value = column.getter(item)
            values.append(_file_of(column, value) if column.keeps_file else column.type_tfms(value))
    with naming(row_id, "item_tfms"):
        return tuple(to_stored(v) for v in encode.item_tfms(tuple(values), split_idx=part))


def _file_of(column: Column, value: Any) -> bytes:
    if not isinstance(value, str | Path | bytes):
        raise DataError(
            f"the item transforms give a random size to what {column.name!r} opens, so its file is stored, but the getter "
            f"gives {type(value).__name__}, not a path, a URL or the file's bytes. Add Resize(size) before them"
        )
    try:
        content = value if isinstance(value, bytes) else read_bytes(value)
    except OSError as error:
        raise UnreadableRow(f"not a readable file: {error}") from error
    to_stored(column.type_tfms(content))  # what cannot be decoded is to be found now, not in the middle of an epoch
    return content


def finish_sample(encode: Encode, values: Sequence[Any], key: torch.Tensor, split_idx: int) -> tuple[Any, ...]:
    """What the item transforms of each epoch make of the stored values of one row, as the columns of a batch.

    key: int64 (1,), what the row draws its random numbers by (`blocks.draws`).
    """
    opened = tuple(
        column.type_tfms(bytes(value)) if column.keeps_file else from_stored(value)
        for column, value in zip(encode.columns, encode.nested(values), strict=True)
    )
    finished = encode.each_epoch(opened, split_idx=split_idx, keys=key)
    return tuple(encode.flat(finished).values())


def decode_sample(encode: Encode, values: Sequence[Any]) -> tuple[Any, ...]:
    """One row of a batch as what it was before it was encoded, a value a block: points in pixels, a category by its name."""
    decoded = encode.item_tfms.decode(encode.each_epoch.decode(encode.nested(values)))
    return tuple(column.type_tfms.decode(value) for column, value in zip(encode.columns, decoded, strict=True))


@dispatch
def to_stored(value: object) -> Any:
    """What is stored of a value that is no tensor yet, where random item transforms follow: give its type a method."""
    return value


@dispatch
def from_stored(value: object) -> Any:
    """The value again."""
    return value


# --- some rows ---------------------------------------------------------------------------------------------------------


def column_values(column: Column, rows: Rows, transforms: Sequence[Transform]) -> Any:
    """What a column's getter and these of its transforms make of whole Arrow columns; None where one works item by item."""
    read = getattr(column.getter, "column", None)
    if rows.table is None or read is None or not column.getter.has_column(rows.table.schema):  # type: ignore[attr-defined]
        return None
    if not all(isinstance(t, ColumnTransform) for t in transforms):
        return None
    values = read(rows.table)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(
        values.type, pa.BaseExtensionType
    ):  # Ray Data's own, of pickled objects or arrays: Arrow has no function for it
        return None
    for t in transforms:
        values = t.encodes_column(values)  # type: ignore[attr-defined]
        if values is None:
            return None
    return values


def encode_rows(encode: Encode, rows: Rows, parts: np.ndarray) -> tuple[pa.Table | None, list[dict[str, str]]]:
    """Some rows and their parts as the stored columns id, part, x, y, and the rows that could not be read."""
    whole = {} if encode.item_tfms.transforms else _whole_columns(encode, rows)
    good, samples, bad = _samples(encode, [c for c in encode.columns if c.name not in whole], rows, parts)
    if not good.any():
        return None, bad
    by_item = _typed(samples, [rows.ids[i].as_py() for i in np.flatnonzero(good)[: len(samples)]])
    typed = []
    for column in encode.columns:
        if column.name in whole:
            typed += [(field, array.filter(pa.array(good))) for field, array in whole[column.name]]
        else:
            typed += [c for name, c in by_item.items() if name.partition(".")[0] == column.name]
    fields = [pa.field("id", rows.ids.type), pa.field("part", pa.uint8()), *(f for f, _ in typed)]
    arrays = [rows.ids.filter(pa.array(good)), pa.array(parts[good], pa.uint8()), *(a for _, a in typed)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields)), bad


def _whole_columns(encode: Encode, rows: Rows) -> dict[str, list[tuple[pa.Field, pa.Array]]]:
    # By column the stored columns it becomes.
    found = {}
    for column in encode.columns:
        try:
            with naming(rows.ids[0].as_py(), column.name):
                values = column_values(column, rows, column.type_tfms.transforms)
        except DataError as error:
            gaps = _gaps(column, rows)
            if gaps:
                name = getattr(column.getter, "cols", column.name)
                raise DataError(f"the column {name!r} has no value in row {_listed(gaps)}: {error}") from error
            continue  # item by item, since that names the row
        if values is None:
            continue
        with naming(rows.ids[0].as_py(), column.name):
            first = encode.named(column, column.type_tfms(column.getter(next(iter(rows.each())))))
            arrays = values if isinstance(values, tuple) else (values,)
            typed = [_typed_whole(name, part, array) for (name, part), array in zip(first.items(), arrays, strict=True)]
        if all(t is not None for t in typed):
            found[column.name] = [t for t in typed if t is not None]
    return found


def _gaps(column: Column, rows: Rows) -> list[Any]:
    # The ids of the rows without a finite value, where the column is taken from a table as it is.
    values = column_values(column, rows, ())
    if values is None:
        return []
    each = zip(rows.ids.to_pylist(), values.to_pylist(), strict=True)
    return [i for i, v in each if is_missing(v) or (isinstance(v, float) and math.isinf(v))]


def _listed(ids: Sequence[Any], most: int = 3) -> str:
    return ", ".join(map(str, ids[:most])) + (", ..." if len(ids) > most else "")


def _typed_whole(name: str, first: Any, values: Any) -> tuple[pa.Field, pa.Array] | None:
    # A stored column of the type that the first row has; None where it is to be made row by row.
    if not isinstance(first, torch.Tensor):
        return None
    dtype = as_plain(first).numpy().dtype
    if not getattr(type(first), "ragged", False):
        return fixed_column(name, np.asarray(values).astype(dtype, copy=False), type(first))
    return ragged_column(name, values, type(first), dtype) if isinstance(values, pa.LargeListArray) else None


def _samples(
    encode: Encode, columns: Sequence[Column], rows: Rows, parts: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, str]]]:
    good = np.ones(len(rows), bool)
    samples: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    if not columns:
        return good, samples, bad
    some = Encode(tuple(columns), encode.item_tfms)
    for i, (row_id, part, item) in enumerate(zip(rows.ids.to_pylist(), parts.tolist(), rows.each(), strict=True)):
        try:
            samples.append(some.flat(encode_sample(some, row_id, item, part)))
        except UnreadableRow as unreadable:
            good[i] = False
            bad.append({"id": str(row_id), "reason": str(unreadable)})
    return good, samples, bad


def _typed(samples: Sequence[dict[str, Any]], ids: Sequence[Any]) -> dict[str, tuple[pa.Field, pa.Array]]:
    if not samples:
        return {}
    names = samples[0].keys()
    odd = next((i for i, s in zip(ids, samples, strict=True) if s.keys() != names), None)
    if odd is not None:
        raise DataError(
            f"the row {str(odd)!r} becomes other columns than {str(ids[0])!r}: a block must give each row as many values"
        )
    return {name: typed_column(name, [s[name] for s in samples]) for name in names}


@contextlib.contextmanager
def naming(row_id: Any, step: str) -> Iterator[None]:
    """Name the row and the step in an error of the user's code."""
    try:
        yield
    except UnreadableRow:
        raise
    except Exception as error:
        error.add_note(f"while preparing {step!r} of the row {str(row_id)!r}")
        raise
