"""The feed: batches drawn from prepared data by (seed, epoch, rank, world).

Global batch k of an epoch is the same set of rows whatever the number of ranks, up to the last one of a training epoch
(see `Feed`); each rank takes its share of it, each row comes once per epoch, and each rank makes the same number of steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blocks.errors import DataError, UserError
from blocks.prepare import Prepared
from blocks.shards import TYPE_KEY, as_array
from blocks.tensors import tensor_type


class Batch(tuple[Any, ...]):
    """The inputs and targets of some samples, one typed tensor (rows, ...) a column, with `ids` and the global row count."""

    def __new__(cls, columns: Any, ids: Callable[[], list[str]], global_rows: int) -> "Batch":
        batch = super().__new__(cls, columns)
        batch._ids = ids
        batch.global_rows = global_rows
        return batch

    _ids: Callable[[], list[str]]
    global_rows: int

    @property
    def ids(self) -> list[str]:
        """The id of each row: its path relative to the source's root."""
        return self._ids()

    def map(self, f: Callable[[Any], Any]) -> "Batch":
        """The same rows with `f` applied to each column."""
        return Batch((f(column) for column in self), self._ids, self.global_rows)


class _Columns:
    """Memory-mapped shards as one sequence of rows; `take` copies, so what is done to a batch never reaches the data."""

    def __init__(self, tables: list[pa.Table]):
        schema = tables[0].schema
        self.part = np.concatenate([as_array(t, "part") for t in tables])
        self.starts = np.cumsum([0, *(t.num_rows for t in tables)])
        self.ids = [t["id"] for t in tables]
        self.kinds = {f.name: tensor_type(f.metadata[TYPE_KEY].decode()) for f in schema if f.metadata}
        self.arrays = {name: [as_array(t, name) for t in tables] for name in self.kinds}

    def take(self, rows: np.ndarray) -> list[torch.Tensor]:
        """The typed columns of some rows, in their order."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [(s, np.flatnonzero(shard_of == s)) for s in np.unique(shard_of)]
        taken = []
        for name, arrays in self.arrays.items():
            out = np.empty((len(rows), *arrays[0].shape[1:]), arrays[0].dtype)
            for shard, where in parts:
                out[where] = arrays[shard][rows[where] - self.starts[shard]]
            taken.append(torch.from_numpy(out).as_subclass(self.kinds[name]))
        return taken

    def ids_of(self, rows: np.ndarray) -> list[str]:
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        return [self.ids[s][int(r - self.starts[s])].as_py() for s, r in zip(shard_of, rows, strict=True)]


@dataclass(frozen=True)
class Feed:
    """An iterable of batches over one part of prepared data.

    batch_size: the global one, shared among the ranks. shuffle: a new order each epoch, by (seed, epoch).
    A last training batch that would give a rank fewer than two rows joins the one before: BatchNorm needs two.
    """

    prepared: Prepared
    part: int
    batch_size: int
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world: int = 1
    epoch: list[int] = field(default_factory=lambda: [0], compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 2 * self.world:
            raise UserError(
                f"batch_size={self.batch_size} is the global one and must give each of {self.world} workers two rows: "
                f"at least {2 * self.world}"
            )

    @cached_property
    def _columns(self) -> _Columns:
        return _Columns(self.prepared.tables())

    @cached_property
    def rows(self) -> np.ndarray:
        """The positions of this part's rows in the store."""
        return np.flatnonzero(self._columns.part == self.part)

    @property
    def n(self) -> int:
        """The number of samples of an epoch, over all ranks."""
        return len(self.rows)

    @cached_property
    def _bounds(self) -> np.ndarray:
        bounds = np.append(np.arange(0, self.n, self.batch_size), self.n)
        if self.shuffle and len(bounds) > 2 and bounds[-1] - bounds[-2] < 2 * self.world:
            bounds = np.delete(bounds, -2)
        if self.shuffle and bounds[-1] - bounds[-2] < 2 * self.world:
            raise DataError(f"the training part has {self.n} rows, too few for {self.world} workers: each needs two")
        return bounds

    def shard(self, rank: int, world: int) -> "Feed":
        """This feed as one of `world` ranks sees it."""
        return replace(self, rank=rank, world=world, epoch=[self.epoch[0]])

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch[0] = epoch

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[Batch]:
        order = self.rows
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch[0]]).permutation(order)
        for start, end in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            share = np.array_split(order[start:end], self.world)[self.rank]
            if len(share):  # a rank may have no rows of a last validation batch
                yield self._batch(share, int(end - start))

    def _batch(self, rows: np.ndarray, global_rows: int) -> Batch:
        columns = self._columns
        return Batch(columns.take(rows), lambda: columns.ids_of(rows), global_rows)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps stay behind: each process opens its own.
        return {k: v for k, v in self.__dict__.items() if k in self.__dataclass_fields__}
