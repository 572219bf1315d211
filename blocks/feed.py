"""The feed: batches drawn from prepared data by (seed, epoch, rank, world).

Global batch k of an epoch is the same set of samples whatever the number of ranks; each rank takes its share of it, each
sample comes once per epoch, and each rank makes the same number of training steps.

What fastai's loaders have under other names: `shuffle_fn` and `get_idxs` are `order.py`; `create_item` and `after_item` the
DataBlock's transforms, once or each epoch as the Plan places them; `before_batch` and `create_batch` are `gather.py`;
`after_batch` the batch transforms; `before_iter` `set_epoch`; `SkipItemException` is `UnreadableRow` and `max_bad_rows`;
`WeightedDL` is `weights`, `PartialDL` `partial_n`, `SortedDL` `sort_by_length`, `LMDataLoader` `samples=Streams(...)`.
`wif`, `after_iter` and `retain` have no use here: no worker process is started, and types are kept by the columns.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from blocks.draws import sample_keys
from blocks.encode import finish_sample
from blocks.errors import UserError
from blocks.gather import Epoch, Share, collate, gather, ids_of, shards_of, stored_sample
from blocks.lanes import LANES, Lanes
from blocks.prepared import Prepared
from blocks.resident import Resident, Windows
from blocks.streams import Streams, StreamSamples

AHEAD = 2  # batches that are made while the one before is in use
THREADS = 4  # at most, that run item transforms

T = TypeVar("T")
W = TypeVar("W")


class Batch(tuple[Any, ...]):
    """The inputs and targets of some samples: one typed tensor (rows, ...) a column.

    global_rows: how many rows this batch has over all ranks. samples: the numbers of the samples, int64 (rows,): by default the
    positions of their rows in the store. borrowed: this rank has no rows of the batch, and this one is here so that it can
    stay in step: it counts for nothing.
    """

    _ids: Callable[[], list[str]]
    global_rows: int
    samples: np.ndarray | None
    borrowed: bool
    _seed_epoch: tuple[int, int]

    def __new__(
        cls,
        columns: Iterable[Any],
        ids: Callable[[], list[str]],
        global_rows: int,
        samples: np.ndarray | None = None,
        seed_epoch: tuple[int, int] = (0, 0),
        borrowed: bool = False,
    ) -> "Batch":
        batch = super().__new__(cls, columns)
        batch._ids, batch.global_rows, batch.samples = ids, global_rows, samples
        batch._seed_epoch, batch.borrowed = seed_epoch, borrowed
        return batch

    @property
    def ids(self) -> list[str]:
        """The id of each row: its path relative to the source's root, or its position in a table."""
        return self._ids()

    def __reduce__(self) -> Any:
        # The ids are looked up first: the data they lie in stays behind.
        found: Callable[[], list[str]] = partial(list, self.ids)
        return Batch, (tuple(self), found, self.global_rows, self.samples, self._seed_epoch, self.borrowed)

    @property
    def own_rows(self) -> int:
        """How many rows of the global batch these are: all of them, none where the row is borrowed."""
        return 0 if self.borrowed else len(self[0])

    @property
    def keys(self) -> torch.Tensor:
        """What each row draws its random numbers by, int64 (rows,): the same for it in any company."""
        numbers = np.arange(len(self[0])) if self.samples is None else self.samples
        return sample_keys(*self._seed_epoch, numbers)

    def map(self, f: Callable[[Any], Any]) -> "Batch":
        """The same rows with `f` applied to each column."""
        return self.with_columns(f(column) for column in self)

    def with_columns(self, columns: Iterable[Any]) -> "Batch":
        """The same rows with other values."""
        return Batch(columns, self._ids, self.global_rows, self.samples, self._seed_epoch, self.borrowed)


@dataclass(eq=False)
class Feed:
    """An iterable of batches over one part of prepared data.

    batch_size: the global one, shared among the ranks. shuffle: a new order each epoch, by (seed, epoch).
    drop_last: leave out a last batch that is not full. Without it, a last training batch of one row joins the one before.
    weights: one number a row of the part, in the order of `ids()`: rows are drawn with replacement, as often as these say.
    partial_n: only so many samples an epoch, others each epoch where the order is shuffled.
    sort_by_length: a ragged column; samples of about one length share a batch.
    pad: by column, what fills the rows of a ragged one up to the longest of the batch; by default what its class says.
    samples: `Windows` or `Streams` in the place of whole rows.
    lanes: for a store that this node cannot hold: shuffle in lanes (`lanes.py`), a few shards open at a time.
    """

    prepared: Prepared
    part: int
    batch_size: int
    shuffle: bool
    seed: int = 0
    drop_last: bool = False
    weights: Sequence[float] | np.ndarray | None = field(default=None, repr=False)
    partial_n: int | None = None
    sort_by_length: str | None = None
    pad: Mapping[str, float] = field(default_factory=dict)
    samples: Windows | Streams | None = None
    lanes: bool = False
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        self._position = self._start = 0
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise UserError(f"batch_size is a whole number of rows, at least 1, not {self.batch_size!r}")
        if self.batch_size < self.world:
            raise UserError(
                f"batch_size={self.batch_size} is the global one, of all {self.world} workers: it must be at least {self.world}"
            )
        if self.partial_n is not None and self.partial_n < 1:
            raise UserError(f"partial_n is a number of samples, at least 1, not {self.partial_n}")
        chosen = [name for name in ("weights", "partial_n", "sort_by_length", "samples") if getattr(self, name) is not None]
        if self.lanes and chosen:
            raise UserError(f"{chosen[0]} needs an order over all rows, and this store is fed in lanes: give lanes=False")
        if self.lanes and self.world > LANES:
            raise UserError(f"{LANES} lanes feed at most {LANES} workers, not {self.world}")
        if isinstance(self.samples, Streams) and (len(chosen) > 1 or self.drop_last):
            raise UserError(
                f"streams read all texts one after the other: {chosen[0] if chosen[1:] else 'drop_last'} has no place"
            )
        if isinstance(self.samples, Windows) and self.sort_by_length is not None:
            raise UserError("windows have one length: leave sort_by_length out")
        encode = self.prepared.encode
        known = dict.fromkeys((*encode.layout, *(column.name for column in encode.columns)))
        named = [*self.pad, *([self.sort_by_length] if self.sort_by_length else [])]
        named += self.samples.columns if self.samples else []
        unknown = [name for name in named if name not in known]
        if unknown:
            raise UserError(f"there is no column {unknown[0]!r}; there are {', '.join(known)}")
        if self.samples is not None and self._finishes:
            raise UserError("windows and streams are cut from stored rows, so no item transform may be random: use batch_tfms")

    @cached_property
    def _samples(self) -> Resident | Lanes | StreamSamples:
        if self.lanes:
            return Lanes(self)
        return StreamSamples(self) if isinstance(self.samples, Streams) else Resident(self)

    @property
    def n(self) -> int:
        """The number of samples of an epoch, over all ranks."""
        return self._samples.n

    def __len__(self) -> int:
        return len(self._samples.bounds) - 1

    def ids(self) -> list[str]:
        """The id of each row of this part, in the order of the store."""
        shards = shards_of(self.prepared)
        return [shard.id(row) for shard, row in shards.located(shards.rows_of(self.part))]

    def column(self, number: int) -> torch.Tensor:
        """One column of all rows of this part, in the order of the store, typed: for columns of small rows."""
        shards = shards_of(self.prepared)
        rows = shards.rows_of(self.part)
        (found,) = gather(Share(rows, rows, len(rows)), shards, self.pad, shards.joined, [list(shards.kinds)[number]])
        return found

    def shard(self, rank: int, world: int) -> "Feed":
        """This feed as one of `world` ranks sees it."""
        return replace(self, rank=rank, world=world)

    # --- position --------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        if epoch != self.epoch:
            self.epoch, self._start, self._position = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where the feed is: the epoch, and how many of its batches were drawn, of all ranks."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Have the next iteration go on where the feed was when `state_dict` was called."""
        self.epoch = state["epoch"]
        self._start = self._position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        return self.batches(start)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The epoch from global batch `start` on, as the whole one would have gone on; none of those before is read."""
        epoch, number = self._samples.epoch(self.epoch), self.epoch
        made = ahead(lambda k: self._batch(epoch, number, k), range(start, len(self)), self._threads)
        self._position = start
        for k, batch in enumerate(made, start + 1):
            self._position = k
            if batch is not None:
                yield batch

    # --- batches ---------------------------------------------------------------------------------------------------------

    @property
    def _threads(self) -> int:
        # Copying rows that lie in memory costs less than handing the batch to another thread. (On 2 cores 158,000 against
        # 121,000 pictures of 48 kB a second; the thread's batch has to come from the other core's cache.)
        if self._finishes:
            return item_threads()
        return int(self.lanes or torch.cuda.is_available())

    @property
    def _finishes(self) -> bool:
        return bool(self.prepared.encode.each_epoch.transforms)

    def _batch(self, epoch: Epoch, number: int, k: int) -> Batch | None:
        share = epoch.share(k)
        if share is None:
            return None
        columns = self._finished(share, number) if self._finishes else epoch.columns(share)
        if torch.cuda.is_available():  # so that the copy to the GPU does not wait
            columns = [column.pin_memory() for column in columns]
        ids = partial(ids_of, share, self._samples.shards)
        return Batch(columns, ids, share.global_rows, share.samples, (self.seed, number), share.borrowed)

    def _finished(self, share: Share, number: int) -> list[torch.Tensor]:
        # The item transforms of each epoch, then one batch of their results.
        keys = sample_keys(self.seed, number, share.samples)
        samples = []
        located = share.located or self._samples.shards.located(share.rows)
        for (shard, row), key in zip(located, keys, strict=True):
            try:
                samples.append(finish_sample(self.prepared.encode, stored_sample(shard, row), key[None], self.part))
            except Exception as error:
                error.add_note(f"in an item transform of each epoch, row {shard.id(row)!r}")
                raise
        return collate(list(self._samples.shards.kinds), samples, self.pad)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps stay behind: each process opens its own.
        return {k: v for k, v in self.__dict__.items() if k != "_samples"}


def item_threads() -> int:
    """How many threads run item transforms: decoding and resizing leave Python's lock."""
    return min(THREADS, os.cpu_count() or 1)


def ahead(make: Callable[[W], T], work: Iterable[W], threads: int) -> Iterator[T]:
    """`make` of each piece of work, in order; with threads, of a few before they are asked for.

    An error of `make` is raised when its turn comes. No thread outlives the iterator.
    """
    if not threads:
        yield from map(make, work)
        return
    work = iter(work)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastray-feed")
    try:
        waiting = deque(pool.submit(make, w) for w in islice(work, AHEAD + threads - 1))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, w) for w in islice(work, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
