"""From stored rows to the columns of a batch: rows are copied into a new tensor, ragged ones padded to the longest.

A batch is a copy and nobody else's: what is done to it never reaches the data, and it may be kept for as long as wanted.
(A new buffer for each batch was as fast as a ring of reused ones: the allocator hands out again what nobody holds.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import torch

from blocks.errors import DataError
from blocks.prepared import Prepared
from blocks.shards import TYPE_KEY, BytesColumn, FixedColumn, RaggedColumn, StoredColumn, described, read_column
from blocks.tensors import as_plain, tensor_type

SMALL_ROW = 4096  # bytes of a row, below which copying row by row costs more than the bytes do
OPENERS = 8  # shards that are opened side by side
JOINED = 256_000_000  # bytes up to which the shards of a column of small rows are copied into memory as one array


class Span(NamedTuple):
    """A stretch of each of some rows: `length` long from `starts` on, in `columns`; the other columns are whole."""

    starts: np.ndarray
    length: int
    columns: tuple[str, ...]


class Share(NamedTuple):
    """One rank's part of a global batch, before anything is read.

    rows: positions in the store, int64. samples: what the samples' random draws are made from, int64. borrowed: the rank has
    no rows of the batch, and this one is there so that it can stay in step. located: where the rows lie, when that was
    looked up already.
    """

    rows: np.ndarray
    samples: np.ndarray
    global_rows: int
    borrowed: bool = False
    span: Span | None = None
    located: "list[tuple[Shard, int]] | None" = None


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
        return {name: read_column(self.table, name) for name in self.kinds}

    @cached_property
    def kinds(self) -> dict[str, type]:
        """What each stored column holds, by name: a tensor class, or bytes."""
        named = {f.name: f.metadata[TYPE_KEY].decode() for f in self.table.schema if TYPE_KEY in (f.metadata or {})}
        return {name: bytes if kind == "bytes" else tensor_type(kind) for name, kind in named.items()}

    @cached_property
    def part(self) -> np.ndarray:
        return self.table["part"].to_numpy()

    def id(self, row: int) -> str:
        """A path as it is, a position in a table as text."""
        return str(self.table["id"][row].as_py())


class Shards:
    """The shards of a store as one sequence of rows; each is opened when it is first needed, and stays so until released."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.starts = np.cumsum([0, *(shard["rows"] for shard in prepared.index["shards"])])
        self._open: dict[int, Shard] = {}
        self._lock = Lock()  # several threads may make batches

    def __len__(self) -> int:
        return len(self.starts) - 1

    def open(self, numbers: Iterable[int]) -> list[Shard]:
        """These shards. Those that are not open yet are fetched and checked side by side."""
        numbers = list(numbers)
        with self._lock:
            missing = [number for number in dict.fromkeys(numbers) if number not in self._open]
            if len(missing) > 1:
                with ThreadPoolExecutor(OPENERS, thread_name_prefix="fastray-open") as pool:
                    tables = list(pool.map(self.prepared.table, missing))
            else:
                tables = [self.prepared.table(number) for number in missing]
            self._open.update(zip(missing, map(Shard, tables), strict=True))
            return [self._open[number] for number in numbers]

    def __getitem__(self, number: int) -> Shard:
        return self.open([number])[0]

    def release(self, numbers: Iterable[int], drop: bool = False) -> None:
        """Keep these shards open no longer; who holds rows of them may read on. drop: nor a copy of what lies at a URL."""
        with self._lock:
            for number in numbers:
                self._open.pop(number, None)
                if drop:
                    self.prepared.drop(number)

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.open(range(len(self))))

    def rows_of(self, part: int) -> np.ndarray:
        """The positions of a part's rows in the store, int64 (rows,). Opens each shard."""
        return np.flatnonzero(np.concatenate([shard.part for shard in self]) == part)

    def located(self, rows: np.ndarray) -> list[tuple[Shard, int]]:
        """The shard of each row, given by its position in the store, and where it is in the shard."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        which = set(numbers.tolist())
        shards = dict(zip(which, self.open(which), strict=True))
        return [(shards[n], r) for n, r in zip(numbers.tolist(), (rows - self.starts[numbers]).tolist(), strict=True)]

    @cached_property
    def kinds(self) -> dict[str, type]:
        """What each column holds, by name: a tensor class, or bytes."""
        with self._lock:
            opened = next(iter(self._open), 0)
        return self[opened].kinds

    @cached_property
    def joined(self) -> dict[str, np.ndarray]:
        """The columns of fixed shape that lie in memory as one array (rows, *shape): one shard, or many small rows."""
        found = {}
        for name in self[0].columns:
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


def ids_of(share: Share, shards: Shards) -> list[str]:
    """The ids of a share's rows."""
    return [shard.id(row) for shard, row in share.located or shards.located(share.rows)]


_SHARED: WeakValueDictionary[Path, Shards] = WeakValueDictionary()


def shards_of(prepared: Prepared) -> Shards:
    """The shards of a store, the same for all who read any of it in this process: they are opened and joined once."""
    return _SHARED.setdefault(prepared.folder, Shards(prepared))


# --- columns of a batch ------------------------------------------------------------------------------------------------


def gather(
    share: Share,
    shards: Shards,
    pad: Mapping[str, float],
    joined: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] | None = None,
) -> list[torch.Tensor]:
    """The typed columns of a share, in the order of its samples.

    pad: by column, what fills the rows of a ragged one up to the longest. joined: columns that lie in memory whole. names: of
    the columns that are wanted, by default all.
    """
    joined = joined or {}
    located = share.located
    columns: list[torch.Tensor] = []
    for name in shards.kinds if names is None else names:
        kind = shards.kinds[name]
        cut = share.span if share.span and name in share.span.columns else None
        if cut is None and name in joined:
            taken = joined[name].take(share.rows, axis=0)
        else:
            located = located or shards.located(share.rows)
            fixed = isinstance(located[0][0].columns[name], FixedColumn)
            if cut is not None:
                pieces = [piece(shard.columns[name], row) for shard, row in located]
                taken = stacked([p[start : start + cut.length] for p, start in zip(pieces, cut.starts.tolist(), strict=True)])
            elif fixed:
                taken = stacked([shard.columns[name].array[row] for shard, row in located])  # type: ignore[union-attr]
            else:
                taken = padded([piece(shard.columns[name], row) for shard, row in located], padding(name, kind, pad))
        columns.append(torch.from_numpy(taken).as_subclass(kind))
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
    for name, kind in shard.kinds.items():
        value = piece(shard.columns[name], row)
        values.append(value.tobytes() if kind is bytes else torch.from_numpy(np.array(value)).as_subclass(kind))
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
            taken = padded([as_plain(v).numpy() for v in values], padding(name, kind, pad))
            columns.append(torch.from_numpy(taken).as_subclass(kind))
        else:
            columns.append(torch.stack([as_plain(v) for v in values]).as_subclass(type(first)))
    return columns


def padding(name: str, kind: type, pad: Mapping[str, float]) -> float:
    """What fills the short rows of a column: as `pad` says for it or for its block, else what its tensor class says."""
    of_block = pad.get(name.partition(".")[0], getattr(kind, "pad_value", 0))
    return pad.get(name, of_block)


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
