"""Summaries of numbers: merged in any grouping they are those of the whole."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.summaries import Moments, Quantiles

NUMBERS = st.lists(st.one_of(st.none(), st.just(math.nan), st.floats(-1e6, 1e6), st.integers(-1000, 1000)), max_size=40)


def seen(kind: Any, values: list[Any]) -> Any:
    summary = kind()
    for i, value in enumerate(values):
        summary.observe(value, i)
    return summary


def there(values: list[Any]) -> np.ndarray:
    return np.array([v for v in values if v is not None and not math.isnan(v)], float)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(NUMBERS, min_size=1, max_size=5), order=st.randoms())
def test_parts_merge_to_the_whole_in_any_order(parts: list[list[Any]], order: Any) -> None:
    whole = [v for part in parts for v in part]
    shuffled = list(parts)
    order.shuffle(shuffled)
    numbers = there(whole)
    for kind in (Moments, Quantiles):
        merged = kind()
        for part in shuffled:
            merged.merge(kind.from_plain(json.loads(json.dumps(seen(kind, part).to_plain()))))
        assert merged.n == len(numbers)
        assert merged.missing == len(whole) - len(numbers)
        if not len(numbers):
            continue
        if kind is Moments:
            assert merged.mean == pytest.approx(numbers.mean(), rel=1e-12, abs=1e-9)
            assert merged.std == pytest.approx(numbers.std(), rel=1e-9, abs=1e-6)
        else:
            for q in (0, 0.1, 0.5, 0.77, 1):
                assert merged.quantile(q) == np.quantile(numbers, q)
            assert merged.rank_error == 0


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.one_of(st.none(), st.floats(-100, 100)), max_size=30))
def test_a_whole_column_is_as_its_values(values: list[Any]) -> None:
    for kind in (Moments, Quantiles):
        by_column, by_value = kind(), seen(kind, values)
        by_column.observe_column(pa.array(values, pa.float64()), pa.array(range(len(values))))
        assert (by_column.n, by_column.missing) == (by_value.n, by_value.missing)
        if by_value.n:
            of = (lambda s: s.std) if kind is Moments else (lambda s: s.median)
            assert of(by_column) == pytest.approx(of(by_value), abs=1e-9)


def test_nothing_seen() -> None:
    assert Moments().std == 0
    assert math.isnan(Quantiles().median)


@pytest.mark.parametrize("shape", ["sorted", "shuffled", "steps"])
def test_beyond_its_capacity_the_rank_error_is_as_stated(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quantiles, "CAPACITY", 200)
    n = 20_000
    values = np.arange(n, dtype=float) if shape != "steps" else np.arange(n) // 1000 * 1.0
    if shape == "shuffled":
        values = np.random.default_rng(0).permutation(values)
    summary = Quantiles()
    for part in np.array_split(values, 60):
        one = Quantiles()
        one.observe_column(pa.array(part), pa.array(range(len(part))))
        summary.merge(Quantiles.from_plain(one.to_plain()))
    assert summary.n == n
    assert 0 < summary.rank_error < 0.05
    assert sum(map(len, summary.levels)) < 2500
    ordered = np.sort(values)
    for q in np.linspace(0, 1, 41):
        found = summary.quantile(float(q))
        low, high = np.searchsorted(ordered, found, "left") / n, np.searchsorted(ordered, found, "right") / n
        assert low - summary.rank_error - 1 / n <= q <= high + summary.rank_error + 1 / n
