"""Orders and batch bounds as plain arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import order
from blocks.errors import DataError

numbers = st.integers(1, 300)


@settings(deadline=None, max_examples=40)
@given(n=numbers, batch_size=st.integers(1, 40), training=st.booleans())
def test_bounds_cover_all_samples(n: int, batch_size: int, training: bool) -> None:
    edges = order.bounds(n, batch_size, training=training)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, n)
    assert (sizes[:-1] == batch_size).all()
    assert sizes[-1] >= (2 if training and batch_size > 1 and n > 1 else 1)
    assert sizes[-1] <= batch_size + training


@settings(deadline=None, max_examples=40)
@given(n=numbers, batch_size=st.integers(1, 40))
def test_drop_last_leaves_full_batches(n: int, batch_size: int) -> None:
    if n < batch_size:
        with pytest.raises(DataError, match="drop_last leaves nothing"):
            order.bounds(n, batch_size, training=True, drop_last=True)
        return
    assert set(np.diff(order.bounds(n, batch_size, training=True, drop_last=True))) == {batch_size}


def test_no_samples_are_no_batches() -> None:
    assert order.bounds(0, 8, training=False).tolist() == [0]


@settings(deadline=None, max_examples=40)
@given(n=numbers, batch_size=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_by_length_keeps_each_sample_once_and_full_batches_first(n: int, batch_size: int, seed: int, epoch: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 50, n)
    found = order.by_length(order.shuffled(n, seed, epoch), lengths, batch_size, seed, epoch)
    assert sorted(found) == list(range(n))
    full = found[: n // batch_size * batch_size].reshape(-1, batch_size)
    if len(full):
        assert lengths[full[0]].max() == lengths[full].max()


def test_by_length_sorts_within_pools_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same samples would meet in every epoch."""
    monkeypatch.setattr(order, "POOL_BATCHES", 4)
    lengths = np.arange(1000)
    first, second = (order.by_length(order.shuffled(1000, 0, e), lengths, 10, 0, e).reshape(100, 10) for e in (0, 1))
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in second)
    assert np.ptp(first, axis=1).mean() < 0.4 * np.ptp(order.shuffled(1000, 0, 0).reshape(100, 10), axis=1).mean()


def test_weighted_never_draws_a_weight_of_nothing() -> None:
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    drawn = np.concatenate([order.weighted(weights, 100, 0, epoch) for epoch in range(50)])
    assert set(drawn) == {1, 3}
    assert abs((drawn == 3).mean() - 0.75) < 0.025  # four standard deviations
