"""The order of an epoch: which sample comes when, as a function of (seed, epoch) alone, and where batches begin and end.

So every rank works out the same order by itself, in any process and after any restart.
"""

from collections.abc import Sequence

import numpy as np

from blocks.errors import DataError

POOL_BATCHES = 50  # batches' worth of shuffled samples that are sorted by length together


def generator(seed: int, epoch: int, *purpose: int) -> np.random.Generator:
    """The random numbers of an epoch; `purpose` separates the draws of several of its parts."""
    return np.random.default_rng([seed, epoch, *(p + 1 for p in purpose)])  # a last 0 would change nothing


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Samples 0..n-1, each once, int64 (n,)."""
    return generator(seed, epoch).permutation(n)


def weighted(weights: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """`n` samples drawn with replacement, each as often as its weight says, int64 (n,)."""
    total = np.cumsum(weights, dtype=np.float64)
    drawn = np.searchsorted(total, generator(seed, epoch).random(n) * total[-1], side="right")
    return np.minimum(drawn, np.flatnonzero(weights)[-1])  # where rounding ends beyond the last sample that has a weight


def by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """`order` with samples of about one length beside each other, so that a batch needs little padding.

    Sorted within pools of some batches of the given order; then the batches are put into random order, the one with the
    longest sample first (what does not fit into memory fails at once) and the one that is not full last.
    """
    pool = POOL_BATCHES * batch_size
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(-lengths[p], kind="stable")] for p in pools])
    full = len(order) // batch_size
    batches = order[: full * batch_size].reshape(full, batch_size)
    if full > 1:
        longest = int(lengths[batches].max(axis=1).argmax())
        rest = np.delete(np.arange(full), longest)
        batches = batches[[longest, *generator(seed, epoch, 1).permutation(rest)]]
    return np.concatenate([batches.reshape(-1), order[full * batch_size :]])


def bounds(n: int, batch_size: int, *, training: bool, drop_last: bool = False) -> np.ndarray:
    """Where the batches of `n` samples begin and end: batch k is bounds[k]..bounds[k + 1].

    A last training batch of one sample joins the one before, since BatchNorm needs two. `drop_last` leaves out a last batch
    that is not full. It counts global batches, so it holds whatever the number of ranks.
    """
    edges = np.append(np.arange(0, n, batch_size), n)
    last = edges[-1] - edges[-2] if n else 0
    if drop_last and last < batch_size:
        edges = edges[:-1]
        if len(edges) < 2:
            raise DataError(f"drop_last leaves nothing: {n} samples do not fill one batch of {batch_size}. Lower batch_size")
    elif training and last == 1 and batch_size > 1 and len(edges) > 2:
        edges = np.delete(edges, -2)
    return edges


def checked_weights(weights: Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """`weights` as float64 (n,). DataError unless there is one a row, none is negative and some are not zero."""
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (n,):
        raise DataError(
            f"weights are one number for each of the part's {n} rows, in the order of `feed.ids()`, not {array.shape}"
        )
    if not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise DataError("weights are finite numbers of at least 0, and not all of them 0")
    return array
