"""Order for data larger than a node's memory or disk: lanes, each a queue of shards with a shuffle window of its own.

A full shuffle touches every shard at any time. Here shard s belongs to lane s % LANES for good, a lane goes through its
shards in an order of (seed, epoch) and shuffles the rows of a few of them together, and the epoch takes its samples from
the lanes in a fixed rotation. None of this asks how many workers there are: they share the lanes out, so each opens only
the shards of its lanes, a few at a time, and global batch k is the same set of samples for any number of them.

(seed, epoch, lane, position in it) says all, so the k-th batch is known without drawing those before.
"""

import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from blocks import order
from blocks.gather import Epoch, Shards, Share, gather
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
        self.shards = Shards(feed.prepared)
        name = "train" if feed.part == TRAIN else "valid"
        self.counts = np.array([shard[name] for shard in feed.prepared.index["shards"]], np.int64)
        self.rotation = Rotation(np.bincount(np.arange(len(self.counts)) % LANES, self.counts, LANES).astype(np.int64))
        self.n = self.rotation.n
        self.bounds = order.bounds(self.n, feed.batch_size, training=feed.part == TRAIN, drop_last=feed.drop_last)

    def epoch(self, epoch: int) -> Epoch:
        """The batches of this epoch."""
        feed, bounds = self.feed, self.bounds.tolist()
        shards = self.shards = Shards(feed.prepared)  # what another epoch, not gone through to its end, has open stays behind
        windows, lock = _Windows(feed, shards, self.counts, epoch), Lock()

        def share(k: int) -> Share | None:
            lanes, positions = self.rotation.between(bounds[k], bounds[k + 1])
            own = np.flatnonzero(lanes % feed.world == feed.rank)
            places = list(zip(lanes[own].tolist(), positions[own].tolist(), strict=True))
            borrowed = not places and feed.part == TRAIN
            if borrowed:
                places = [self._near(bounds[k])]
            if not places:
                return None
            with lock:  # several threads may make batches
                rows = windows.rows(places)
                located = shards.located(rows)
                windows.leave()
            return Share(rows, rows, len(lanes), borrowed, located=located)

        return Epoch(share, partial(gather, shards=shards, pad=feed.pad))

    def _near(self, sample: int) -> tuple[int, int]:
        # A lane of this rank's, if it has one that is not empty, and where it is about the time of this sample.
        sizes = self.rotation.sizes
        lanes = np.flatnonzero(sizes)
        own = lanes[lanes % self.feed.world == self.feed.rank]
        lane = int((own if len(own) else lanes)[0])
        return lane, min(int(sizes[lane]) - 1, sample * int(sizes[lane]) // self.n)


class _Windows:
    """The rows of one epoch, lane by lane: a lane's shards in an order of their own, some of them shuffled together."""

    def __init__(self, feed: "Feed", shards: Shards, counts: np.ndarray, epoch: int):
        self.feed, self.shards, self.counts, self.epoch = feed, shards, counts, epoch
        # Copies of what lies at a URL go where this node's disk would not hold them all.
        prepared = feed.prepared
        self.drops = prepared.url is not None and prepared.nbytes > shutil.disk_usage(prepared.folder).total / 2
        self._cuts: dict[int, tuple[list[np.ndarray], list[int]]] = {}
        self._open: dict[tuple[int, int], np.ndarray] = {}  # of a lane's window: the positions of its rows in the store
        # The first of its rows that was drawn, and how many were: threads may draw a batch before the one it follows.
        self._first: dict[tuple[int, int], int] = {}
        self._drawn: Counter[tuple[int, int]] = Counter()

    def rows(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The positions in the store of some rows, given by lane and position in it; opens the windows they lie in."""
        found = [self._place(*place) for place in places]
        new = list(dict.fromkeys(window for window, _ in found if window not in self._open))
        self.shards.open(s for lane, number in new for s in self._cuts[lane][0][number].tolist())
        self._open |= {window: self._rows(*window) for window in new}
        for window, place in found:
            self._first[window] = min(place, self._first.get(window, place))
            self._drawn[window] += 1
        return np.array([self._open[window][place] for window, place in found])

    def leave(self) -> None:
        """Release the shards of the windows of which each row was drawn."""
        for window in [w for w, rows in self._open.items() if self._first[w] + self._drawn[w] >= len(rows)]:
            lane, number = window
            self.shards.release(self._cuts[lane][0][number].tolist(), self.drops)
            del self._open[window]

    def _place(self, lane: int, position: int) -> tuple[tuple[int, int], int]:
        # The window of a lane's row, and its place there.
        if lane not in self._cuts:
            self._cuts[lane] = self._cut(lane)
        starts = self._cuts[lane][1]
        number = bisect_right(starts, position) - 1
        return (lane, number), position - starts[number]

    def _cut(self, lane: int) -> tuple[list[np.ndarray], list[int]]:
        # The shards of each window, and how many rows the windows before it hold. First windows differ in size, so that the
        # lanes of a worker do not all open their next shards at the same time.
        own = np.arange(lane, len(self.counts), LANES)
        if self.feed.shuffle:
            own = order.generator(self.feed.seed, self.epoch, lane).permutation(own)
        first = 1 + lane // 2 % WINDOW
        cuts = [own[:first], *(own[start : start + WINDOW] for start in range(first, len(own), WINDOW))]
        return cuts, np.cumsum([0, *(int(self.counts[cut].sum()) for cut in cuts)]).tolist()

    def _rows(self, lane: int, number: int) -> np.ndarray:
        shards = self._cuts[lane][0][number]
        own = [self.shards.starts[s] + np.flatnonzero(self.shards[s].part == self.feed.part) for s in shards.tolist()]
        rows = np.concatenate(own)
        return order.generator(self.feed.seed, self.epoch, lane, number).permutation(rows) if self.feed.shuffle else rows
