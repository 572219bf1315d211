"""Samples that are not whole rows: windows of series, and the streams a language model reads."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from blocks import Feed, Prepared, Streams, TensorCategory, TensorSeries, TensorText, Windows
from blocks.errors import DataError, UserError
from blocks.splits import TRAIN, VALID
from blocks.tensors import as_plain

Made = Callable[..., Prepared]


# --- windows -----------------------------------------------------------------------------------------------------------


def series(n: int, steps: Callable[[int], int], kind: type[torch.Tensor] = torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Row r has the values 1000 * r + time in two channels, time first."""
    x = [(1000.0 * r + torch.arange(steps(r)))[:, None].repeat(1, 2).as_subclass(kind) for r in range(n)]
    return {"x": x, "y": [torch.tensor(r).as_subclass(TensorCategory) for r in range(n)]}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_each_window_once(made: Made, ragged: bool, stride: int) -> None:
    columns = series(12, lambda r: 5 + 4 * (r % 3) if ragged else 9, torch.Tensor if ragged else TensorSeries)
    store = made(8, 4, per_shard=5, columns=columns)
    feed = Feed(store, TRAIN, 6, shuffle=True, samples=Windows(6, stride))
    expected = {(int(i), start) for i in feed.ids() for start in range(0, len(columns["x"][int(i)]) - 6 + 1, stride)}
    found = []
    for batch in feed:
        x, y = batch
        assert x.shape == (len(batch.ids), 6, 2)
        for row_id, window, target in zip(batch.ids, as_plain(x), y, strict=True):
            row, start = divmod(int(window[0, 0]), 1000)
            assert (row, row) == (int(row_id), int(target))
            assert torch.equal(window, columns["x"][row][start : start + 6].as_subclass(torch.Tensor))
            found.append((row, start))
    assert len(found) == feed.n
    assert sorted(found) == sorted(expected)


def test_windows_are_shuffled_among_rows_and_keyed_by_row_and_start(made: Made) -> None:
    feed = Feed(made(8, 4, columns=series(12, lambda r: 30)), TRAIN, 10, shuffle=True, samples=Windows(5))
    keys = {(i, float(x[0, 0])): int(k) for b in feed for i, x, k in zip(b.ids, b[0], b.keys, strict=True)}
    assert len(set(keys.values())) == feed.n == 8 * 26
    assert len(set(next(iter(feed)).ids)) > 1
    for rank in range(3):
        for b in feed.shard(rank, 3):
            assert all(keys[i, float(x[0, 0])] == int(k) for i, x, k in zip(b.ids, b[0], b.keys, strict=True))


def test_several_columns_are_cut_alike(made: Made) -> None:
    columns = series(12, lambda r: 9)
    columns["y"] = [x + 0.5 for x in columns["x"]]
    feed = Feed(made(8, 4, columns=columns), TRAIN, 6, shuffle=True, samples=Windows(4, columns=("x", "y")))
    for x, y in feed:
        assert torch.equal(x + 0.5, y)
    columns["y"][int(feed.ids()[0])] = torch.zeros(8, 2)
    with pytest.raises(DataError, match="differ in length"):
        len(Feed(made(8, 4, columns=columns), TRAIN, 6, shuffle=True, samples=Windows(4, columns=("x", "y"))))


def test_windows_longer_than_each_row(made: Made) -> None:
    with pytest.raises(DataError, match="a window of 10: the longest has 9"):
        len(Feed(made(8, 4, columns=series(12, lambda r: 9)), TRAIN, 6, shuffle=True, samples=Windows(10)))
    with pytest.raises(ValueError, match="at least 1"):
        Windows(0)


# --- streams -----------------------------------------------------------------------------------------------------------


def texts(n: int) -> dict[str, list[torch.Tensor]]:
    """Texts of many lengths, one of them empty; each token is unlike all others."""
    counter = itertools.count(5)
    lengths = [0 if r == 4 else 3 + 7 * r % 23 for r in range(n)]
    return {"x": [torch.tensor([next(counter) for _ in range(k)], dtype=torch.int64).as_subclass(TensorText) for k in lengths]}


def read(feed: Feed) -> list[list[int]]:
    """What each row of the batches reads over an epoch."""
    rows: list[list[int]] = [[] for _ in next(iter(feed))[0]]
    for x, y in feed:
        for row, tokens, targets in zip(rows, x.tolist(), y.tolist(), strict=True):
            row += tokens
            assert targets[:-1] == tokens[1:]
    return rows


def test_streams_go_on_from_batch_to_batch(made: Made) -> None:
    columns = texts(30)
    feed = Feed(made(24, 6, columns=columns), VALID, 4, shuffle=False, samples=Streams(5))
    corpus = torch.cat([columns["x"][int(i)] for i in feed.ids()]).tolist()
    rows = read(feed)
    length = (len(corpus) - 1) // 4
    assert rows == [corpus[i * length : (i + 1) * length] for i in range(4)]
    assert [b[0].shape[1] for b in feed] == [5] * (length // 5) + ([length % 5] if length % 5 else [])
    x, y = next(iter(feed))
    assert type(x) is type(y) is TensorText
    last_targets = list(feed)[-1][1][:, -1].tolist()
    assert last_targets == [corpus[(i + 1) * length] for i in range(4)]


def test_streams_read_whole_texts_in_another_order_each_epoch(made: Made) -> None:
    columns = texts(30)
    feed = Feed(made(24, 6, columns=columns), TRAIN, 4, shuffle=True, samples=Streams(5))
    first = [token for row in read(feed) for token in row]
    feed.set_epoch(1)
    second = [token for row in read(feed) for token in row]
    assert first != second
    wanted = sorted(torch.cat([columns["x"][int(i)] for i in feed.ids()]).tolist())
    for tokens in (first, second):
        assert len(set(tokens)) == len(tokens) >= len(wanted) - 4
        assert set(tokens) <= set(wanted)


@pytest.mark.parametrize("world", [2, 3])
def test_workers_read_what_one_would_have_read(made: Made, world: int) -> None:
    feed = Feed(made(24, 6, columns=texts(30)), TRAIN, 7, shuffle=True, samples=Streams(5))
    feed.set_epoch(2)
    ranks = [feed.shard(rank, world) for rank in range(world)]
    assert [row for rank in ranks for row in read(rank)] == read(feed)
    assert {len(rank) for rank in ranks} == {len(feed)}
    assert {b.global_rows for b in ranks[1]} == {7}


def test_a_stream_feed_from_some_batch_on(made: Made) -> None:
    feed = Feed(made(24, 6, columns=texts(30)), TRAIN, 4, shuffle=True, samples=Streams(5))
    whole = list(feed)
    for k, (x, y) in enumerate(feed.batches(start=2), 2):
        assert torch.equal(x, whole[k][0])
        assert torch.equal(y, whole[k][1])
    rest = list(feed.batches(start=2))
    assert len(rest) == len(whole) - 2
    assert [b.ids for b in rest] == [b.ids for b in whole[2:]]


def test_too_few_tokens_for_the_streams(made: Made) -> None:
    columns = {"x": [torch.arange(2).as_subclass(TensorText) for _ in range(8)]}
    with pytest.raises(DataError, match="10 tokens do not fill 10 streams"):
        len(Feed(made(5, 3, columns=columns), TRAIN, 10, shuffle=True, samples=Streams(5)))
    with pytest.raises(ValueError, match="at least 1"):
        Streams(0)


@pytest.mark.parametrize("settings", [{"weights": [1.0] * 24}, {"partial_n": 3}, {"drop_last": True}, {"lanes": True}])
def test_what_has_no_place_with_streams(made: Made, settings: dict[str, Any]) -> None:
    feed = Feed(made(24, 6, columns=texts(30)), TRAIN, 4, shuffle=True, samples=Streams(5))
    with pytest.raises(UserError, match=r"streams read all|needs an order over all"):
        replace(feed, **settings)


def test_one_text_feeds_several_streams(made: Made) -> None:
    columns = {"x": [torch.arange(1000).as_subclass(TensorText)] * 2}
    assert np.concatenate(
        read(Feed(made(1, 1, columns=columns), TRAIN, 3, shuffle=True, samples=Streams(50)))
    ).tolist() == list(range(999))
