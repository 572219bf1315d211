"""Order for data larger than a node's memory or disk: lanes, each a queue of shards with a shuffle window of its own.

A full shuffle touches every shard at any time. Here shard s belongs to lane s % LANES for good, a lane goes through its
shards in an order of (seed, epoch) and shuffles the rows of a few of them together, and the epoch takes its samples from
the lanes in a fixed rotation. None of this asks how many workers there are: they share the lanes out, so each opens only
the shards of its lanes, a few at a time, and global batch k is the same set of samples for any number of them.

(seed, epoch, lane, position in it) says all, so the k-th batch is known without drawing those before.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np

from blocks import order
from blocks.gather import Epoch, Shards, Share, gather
from blocks.order import generator
from blocks.splits import TRAIN

if TYPE_CHECKING:
    from blocks.feed import Feed

LANES = 64
WINDOW = 2  # shards whose rows a lane shuffles together


class Rotation:
    """From which lane each sample of an epoch comes: all lanes by turns, a shorter one now and then left out.

    So all lanes end together, and each worker has its share to the end.
    """

    def __init__(self, sizes: np.ndarray):
        self.sizes, self.n = sizes, int(sizes.sum())  # samples of each lane
        self._rounds = int(sizes.max())

    @cached_property
    def _starts(self) -> np.ndarray:
        # How many samples the rounds before each one took.
        rounds = np.arange(self._rounds + 1)
        return sum((self._taken(rounds, size) for size in self.sizes.tolist()), np.zeros(len(rounds), np.int64))

    def _taken(self, rounds: np.ndarray, sizes: np.ndarray | int) -> np.ndarray:
        return rounds * sizes // self._rounds

    def between(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The lanes of samples start..end of the epoch, and their positions in their lanes, int64 (end - start,) each."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        taken = self._taken(np.arange(first, last + 1)[:, None], self.sizes)
        rounds, lanes = np.nonzero(np.diff(taken, axis=0))
        mine = slice(start - int(self._starts[first]), end - int(self._starts[first]))
        return lanes[mine], taken[rounds, lanes][mine]


class Lanes:
    """The samples of a `Feed` by lanes; opens the shards of this rank's lanes, each when its window comes."""

    def __init__(self, feed: "Feed"):
        self.feed = feed
        self.shards = Shards(feed.prepared, keep=(-(-LANES // feed.world) + 1) * WINDOW)
        name = "train" if feed.part == TRAIN else "valid"
        self.counts = np.array([shard[name] for shard in feed.prepared.index["shards"]], np.int64)
        self.rotation = Rotation(np.bincount(np.arange(len(self.counts)) % LANES, self.counts, LANES).astype(np.int64))
        self.n = self.rotation.n
        self.bounds = order.bounds(self.n, feed.batch_size, training=feed.part == TRAIN, drop_last=feed.drop_last)

    def epoch(self, epoch: int) -> Epoch:
        """The batches of this epoch."""
        feed, bounds = self.feed, self.bounds.tolist()
        row = self._rows_in(epoch)

        def share(k: int) -> Share | None:
            lanes, positions = self.rotation.between(bounds[k], bounds[k + 1])
            own = np.flatnonzero(lanes % feed.world == feed.rank)
            found = [row(lane, at) for lane, at in zip(lanes[own].tolist(), positions[own].tolist(), strict=True)]
            borrowed = not found and feed.part == TRAIN
            if borrowed:
                found = [row(*self._near(bounds[k]))]
            rows = np.array(found)
            return Share(rows, rows, len(lanes), borrowed) if found else None

        return Epoch(share, partial(gather, self.shards, pad=feed.pad))

    def _near(self, sample: int) -> tuple[int, int]:
        # A lane of this rank's, if it has one that is not empty, and where it is about the time of this sample.
        sizes = self.rotation.sizes
        lanes = np.flatnonzero(sizes)
        own = lanes[lanes % self.feed.world == self.feed.rank]
        lane = int((own if len(own) else lanes)[0])
        return lane, min(int(sizes[lane]) - 1, sample * int(sizes[lane]) // self.n)

    def _rows_in(self, epoch: int) -> Callable[[int, int], int]:
        # The function from a lane and a position in it to a position in the store.
        seed, shuffle, lock = self.feed.seed, self.feed.shuffle, RLock()

        @lru_cache(LANES)
        def windows(lane: int) -> tuple[list[np.ndarray], np.ndarray]:
            # The shards of each window, and how many rows the windows before it hold. First windows differ in size, so that
            # the lanes of a worker do not all open their next shards at the same time.
            own = np.arange(lane, len(self.counts), LANES)
            if shuffle:
                own = generator(seed, epoch, lane).permutation(own)
            first = 1 + lane // 2 % WINDOW
            cut = [own[:first], *(own[start : start + WINDOW] for start in range(first, len(own), WINDOW))]
            return cut, np.cumsum([0, *(int(self.counts[w].sum()) for w in cut)])

        # Of each lane the window it is in and the next, since several threads may make batches.
        @lru_cache(2 * LANES)
        def window(lane: int, number: int) -> np.ndarray:
            shards = windows(lane)[0][number].tolist()
            rows = np.concatenate(
                [self.shards.starts[s] + np.flatnonzero(self.shards[s].part == self.feed.part) for s in shards]
            )
            return generator(seed, epoch, lane, number).permutation(rows) if shuffle else rows

        def row(lane: int, position: int) -> int:
            with lock:
                _, starts = windows(lane)
                number = int(np.searchsorted(starts, position, side="right")) - 1
                return int(window(lane, number)[position - starts[number]])

        return row
