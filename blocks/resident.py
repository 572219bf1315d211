"""The samples of a store that fits on this node: any order is possible, and every order is over all of them."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from blocks import order
from blocks.errors import DataError
from blocks.gather import Epoch, Shards, Share, Span, gather, shards_of, share_of
from blocks.splits import TRAIN
from blocks.tensors import TensorForecast

if TYPE_CHECKING:
    from blocks.feed import Feed


@dataclass(frozen=True)
class Windows:
    """Each stretch of `length` along the first dimension of `columns` is a sample, the next one `stride` further on.

    The other columns give their whole row to each of its windows. A row shorter than `length` has none. Nothing is cut when
    data is prepared: a window is copied out of the stored row when a batch is made.

    horizon: so many steps more belong to each window, and are its target: a batch has what the window of the first column
    holds, the other columns with all their steps, and what follows the first one's window.
    """

    length: int
    stride: int = 1
    columns: tuple[str, ...] = ("x",)
    horizon: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.stride < 1:
            raise ValueError(f"the length and the stride of windows are at least 1, not {self.length} and {self.stride}")
        if self.horizon < 0:
            raise ValueError(f"the horizon is how many steps follow a window, not {self.horizon}")

    @property
    def steps(self) -> int:
        """How many steps of the stored row a window takes, with those that follow it."""
        return self.length + self.horizon

    def ends(self, shards: Shards, rows: np.ndarray) -> np.ndarray:
        """How many windows the rows up to and with each one have, int64 (rows,).

        DataError when there is none, or when two columns of a row differ in length.
        """
        lengths = shards.lengths(self.columns[0], rows)
        for name in self.columns[1:]:
            if (shards.lengths(name, rows) != lengths).any():
                raise DataError(
                    f"the columns {self.columns[0]!r} and {name!r} of a row differ in length, so no window fits both"
                )
        ends = np.cumsum(np.maximum(0, (lengths - self.steps) // self.stride + 1))
        if not len(ends) or not ends[-1]:
            raise DataError(
                f"no row is as long as a window of {self.steps}: the longest has {lengths.max(initial=0)}. Use shorter windows"
            )
        return ends


class Resident:
    """The samples of a `Feed` by a full order: shuffled, weighted or sorted by length; whole rows or windows of them."""

    def __init__(self, feed: "Feed"):
        self.feed = feed
        self.shards = shards_of(feed.prepared)
        self.rows = self.shards.rows_of(feed.part)
        self.windows = feed.samples if isinstance(feed.samples, Windows) else None
        every = len(self.rows) if self.windows is None else int(self._ends[-1])
        self.weights = None if feed.weights is None else order.checked_weights(feed.weights, every)
        self.n = every if feed.partial_n is None else min(every, feed.partial_n)
        self._every = every
        self.bounds = order.bounds(self.n, feed.batch_size, training=feed.part == TRAIN, drop_last=feed.drop_last)

    @cached_property
    def _ends(self) -> np.ndarray:
        assert self.windows is not None
        return self.windows.ends(self.shards, self.rows)

    @cached_property
    def _lengths(self) -> np.ndarray:
        assert self.feed.sort_by_length is not None
        return self.shards.lengths(self.feed.sort_by_length, self.rows)

    def _order(self, epoch: int) -> np.ndarray:
        # Samples by their position among the part's.
        feed = self.feed
        if self.weights is not None:
            found = order.weighted(self.weights, self.n, feed.seed, epoch)
        else:
            found = (order.shuffled(self._every, feed.seed, epoch) if feed.shuffle else np.arange(self._every))[: self.n]
        if feed.sort_by_length is not None:
            found = order.by_length(found, self._lengths, feed.batch_size, feed.seed, epoch)
        return found

    def epoch(self, epoch: int) -> Epoch:
        """The batches of this epoch."""
        found = self._order(epoch)
        feed, bounds = self.feed, self.bounds.tolist()

        def share(k: int) -> Share | None:
            start, end = bounds[k], bounds[k + 1]
            own, borrowed = share_of(np.arange(start, end), feed.rank, feed.world, lend=feed.part == TRAIN)
            return self._share(found[own], own, end - start, borrowed) if len(own) else None

        read = partial(gather, shards=self.shards, pad=feed.pad, joined=self.shards.joined)
        horizon = 0 if self.windows is None else self.windows.horizon

        def ahead(share: Share) -> list[torch.Tensor]:
            window, *rest = read(share)
            return [window[:, :-horizon], *rest, window[:, -horizon:].as_subclass(TensorForecast)]

        return Epoch(share, ahead if horizon else read)

    def _share(self, chosen: np.ndarray, places: np.ndarray, global_rows: int, borrowed: bool) -> Share:
        if self.windows is None:
            rows, samples, span = self.rows[chosen], self.rows[chosen], None
        else:
            of = np.searchsorted(self._ends, chosen, side="right")
            first = np.where(of > 0, self._ends[of - 1], 0)
            rows, starts = self.rows[of], (chosen - first) * self.windows.stride
            samples, span = (rows << 32) + starts, Span(starts, self.windows.steps, self.windows.columns)
        if self.weights is not None:  # a row that comes twice in an epoch is drawn for twice
            samples = places
        return Share(rows, samples, global_rows, borrowed, span)
