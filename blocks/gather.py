"""From stored rows to the columns of a batch: rows are copied into a new tensor, ragged ones padded to the longest.

A batch is a copy and nobody else's: what is done to it never reaches the data, and it may be kept for as long as wanted.
(A new buffer for each batch was as fast as a ring of reused ones: the allocator hands out again what nobody holds.)
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from blocks.errors import DataError
from blocks.prepared import Prepared
from blocks.shards import TYPE_KEY, BytesColumn, FixedColumn, RaggedColumn, StoredColumn, described, read_column
from blocks.tensors import as_plain, tensor_type

SMALL_ROW = 4096  # bytes of a row, below which copying row by row costs more than the bytes do
JOINED = 256_000_000  # bytes up to which the shards of a column of small rows are copied into memory as one array


class Span(NamedTuple):
    """A stretch of each of some rows: `length` long from `starts` on, in `columns`; the other columns are whole."""

    starts: np.ndarray
    length: int
    columns: tuple[str, ...]


class Share(NamedTuple):
    """One rank's part of a global batch, before anything is read.

    rows: positions in the store, int64. samples: what the samples' random draws are made from, int64. borrowed: the rank has
    no rows of the batch, and this one is there so that it can stay in step.
    """

    rows: np.ndarray
    samples: np.ndarray
    global_rows: int
    borrowed: bool = False
    span: Span | None = None


class Epoch(NamedTuple):
    """The batches of an epoch, for one rank: both functions may be called by any thread, for batches in any order."""

    share: Callable[[int], Share | None]  # of a global batch by its number; None where the rank has none and borrows none
    columns: Callable[[Share], list[torch.Tensor]]  # reads it


def share_of(order: np.ndarray, rank: int, world: int, lend: bool) -> tuple[np.ndarray, bool]:
    """A rank's part of the samples of a global batch: nearly equal parts, the larger ones first.

    Where that is none: the batch's first sample if it may be borrowed (`lend`), and whether it was.
    """
    size, larger = divmod(len(order), world)
    start = rank * size + min(rank, larger)
    own = order[start : start + size + (rank < larger)]
    return (order[:1], True) if lend and not len(own) else (own, False)


@dataclass(frozen=True)
class Shard:
    """An open shard: its columns as views of the mapped file, and the id and the part of each row."""

    table: pa.Table

    @cached_property
    def columns(self) -> dict[str, StoredColumn]:
        return {name: read_column(self.table, name) for name in column_types(self.table)}

    @cached_property
    def part(self) -> np.ndarray:
        return self.table["part"].to_numpy()

    def id(self, row: int) -> str:
        """A path as it is, a position in a table as text."""
        return str(self.table["id"][row].as_py())


def column_types(table: pa.Table) -> dict[str, str]:
    """The names of the stored columns, and what each holds: a tensor class by name, or "bytes"."""
    return {f.name: f.metadata[TYPE_KEY].decode() for f in table.schema if TYPE_KEY in (f.metadata or {})}


class Shards:
    """The shards of a store as one sequence of rows; each is opened when it is first needed.

    keep: how many stay open, those used last; None: all of them.
    """

    def __init__(self, prepared: Prepared, keep: int | None = None):
        self.prepared, self.keep = prepared, keep
        self.starts = np.cumsum([0, *(shard["rows"] for shard in prepared.index["shards"])])
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = Lock()  # several threads may make batches

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Shard:
        with self._lock:
            if number not in self._open:
                self._open[number] = Shard(self.prepared.table(number))
            self._open.move_to_end(number)
            if self.keep is not None and len(self._open) > self.keep:
                self._open.popitem(last=False)
            return self._open[number]

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def rows_of(self, part: int) -> np.ndarray:
        """The positions of a part's rows in the store, int64 (rows,). Opens each shard."""
        return np.flatnonzero(np.concatenate([shard.part for shard in self]) == part)

    def located(self, rows: np.ndarray) -> list[tuple[Shard, int]]:
        """The shard of each row, given by its position in the store, and where it is in the shard."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        shards = {number: self[number] for number in set(numbers.tolist())}
        return [(shards[n], r) for n, r in zip(numbers.tolist(), (rows - self.starts[numbers]).tolist(), strict=True)]

    @cached_property
    def types(self) -> dict[str, str]:
        """What each column holds, by name: a tensor class, or "bytes"."""
        return column_types(self[next(iter(self._open), 0)].table)

    @cached_property
    def joined(self) -> dict[str, np.ndarray]:
        """The columns of fixed shape that lie in memory as one array (rows, *shape): one shard, or many small rows."""
        found = {}
        for name in self[0].columns if self.keep is None else ():
            columns = [shard.columns[name] for shard in self]
            arrays = [c.array for c in columns if isinstance(c, FixedColumn)]
            if len(arrays) == 1 == len(columns):
                found[name] = arrays[0]
            elif arrays and arrays[0][0].nbytes <= SMALL_ROW and sum(a.nbytes for a in arrays) <= JOINED:
                found[name] = np.concatenate(arrays)
        return found

    def lengths(self, name: str, rows: np.ndarray) -> np.ndarray:
        """How long the first dimension of a column is in each of some rows, int64 (rows,)."""
        columns = [shard.columns[name] for shard in self]
        each = [
            np.full(len(c.array), c.array.shape[1] if c.array.ndim > 1 else 1)
            if isinstance(c, FixedColumn)
            else np.diff(c.offsets)
            for c in columns
        ]
        return np.concatenate(each)[rows]


# --- columns of a batch ------------------------------------------------------------------------------------------------


def gather(shards: Shards, share: Share, pad: Mapping[str, float]) -> list[torch.Tensor]:
    """The typed columns of a share, in the order of its samples.

    pad: by column, what fills the rows of a ragged one up to the longest.
    """
    located: list[tuple[Shard, int]] = []
    columns = []
    for name, kind in shards.types.items():
        cut = share.span if share.span and name in share.span.columns else None
        if cut is None and name in shards.joined:
            taken = shards.joined[name].take(share.rows, axis=0)
        else:
            located = located or shards.located(share.rows)
            pieces = [piece(shard.columns[name], row) for shard, row in located]
            if cut is not None:
                pieces = [p[start : start + cut.length] for p, start in zip(pieces, cut.starts.tolist(), strict=True)]
            fixed = cut is not None or isinstance(located[0][0].columns[name], FixedColumn)
            taken = stacked(pieces) if fixed else padded(pieces, padding(name, kind, pad))
        columns.append(torch.from_numpy(taken).as_subclass(tensor_type(kind)))
    return columns


def piece(column: StoredColumn, row: int) -> np.ndarray:
    """One row of a column, as a view of the data that must not be changed."""
    match column:
        case FixedColumn(array):
            return array[row]
        case RaggedColumn(values, offsets) | BytesColumn(values, offsets):
            return values[offsets[row] : offsets[row + 1]]


def stored_sample(shard: Shard, row: int) -> tuple[Any, ...]:
    """The stored values of one row: typed tensors of its own, or the bytes of an encoded file."""
    values: list[Any] = []
    for name, kind in column_types(shard.table).items():
        value = piece(shard.columns[name], row)
        is_bytes = isinstance(shard.columns[name], BytesColumn)
        values.append(value.tobytes() if is_bytes else torch.from_numpy(np.array(value)).as_subclass(tensor_type(kind)))
    return tuple(values)


def collate(names: Sequence[str], samples: Sequence[Sequence[torch.Tensor]], pad: Mapping[str, float]) -> list[torch.Tensor]:
    """Samples as the columns of a batch: stacked, or padded where their class is ragged. DataError when they do not fit."""
    columns = []
    for name, values in zip(names, zip(*samples, strict=True), strict=True):
        first = values[0]
        ragged = getattr(type(first), "ragged", False)
        odd = next((v for v in values if v.shape[ragged:] != first.shape[ragged:] or v.dtype != first.dtype), None)
        if odd is not None:
            raise DataError(
                f"column {name!r} holds {described(first)} and {described(odd)} in one batch: the item transforms must end "
                "with one size and dtype. Add one such as Resize(size) or RandomResizedCrop(size)"
            )
        if ragged:
            kind = type(first)
            taken = padded([as_plain(v).numpy() for v in values], padding(name, kind.__name__, pad))
            columns.append(torch.from_numpy(taken).as_subclass(kind))
        else:
            columns.append(torch.stack([as_plain(v) for v in values]).as_subclass(type(first)))
    return columns


def padding(name: str, kind: str, pad: Mapping[str, float]) -> float:
    """What fills the short rows of a column: as `pad` says for its name, else what its tensor class says."""
    return pad.get(name, getattr(tensor_type(kind), "pad_value", 0))


def padded(pieces: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays (n, *tail) of differing n as one (pieces, longest, *tail); where a piece ends, `fill` begins."""
    first = pieces[0]
    longest = max(len(p) for p in pieces)
    out = np.empty((len(pieces), longest, *first.shape[1:]), first.dtype)
    for row, p in zip(out, pieces, strict=True):
        row[: len(p)] = p
        row[len(p) :] = fill
    return out


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of one shape as one array (rows, *shape) of its own."""
    # One assignment a row was the fastest of what was tried over several arrays: about as fast as a take from one array.
    out = np.empty((len(rows), *rows[0].shape), rows[0].dtype)
    if out.ndim == 1:
        out[:] = rows
    else:
        for place, row in zip(out, rows, strict=True):
            place[...] = row
    return out
