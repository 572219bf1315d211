"""Lanes: each row once an epoch, the same batches on any number of workers, and only a few shards open."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import DataBlock, Feed, Prepared
from blocks.errors import UserError
from blocks.lanes import LANES, WINDOW, Rotation
from blocks.splits import TRAIN, VALID

Made = Callable[..., Prepared]


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=70), cuts=st.lists(st.integers(1, 60), max_size=40))
def test_the_rotation_takes_each_sample_once_and_is_the_same_in_any_pieces(sizes: list[int], cuts: list[int]) -> None:
    if not sum(sizes):
        sizes[0] = 1
    rotation = Rotation(np.array(sizes))
    lanes, positions = rotation.between(0, rotation.n)
    for lane, size in enumerate(sizes):
        assert positions[lanes == lane].tolist() == list(range(size))
    edges = [0, *np.minimum(np.cumsum(cuts, dtype=int), rotation.n).tolist(), rotation.n]
    pieces = [rotation.between(a, b) for a, b in itertools.pairwise(edges) if a < b]
    assert np.array_equal(np.concatenate([p[0] for p in pieces]), lanes)
    assert np.array_equal(np.concatenate([p[1] for p in pieces]), positions)


def test_lanes_of_different_size_end_together() -> None:
    """So that no worker is left without rows before the others."""
    sizes = np.array([100, 90, 50, 10])
    lanes, _ = Rotation(sizes).between(0, 125)
    assert [int((lanes == lane).sum()) for lane in range(4)] == pytest.approx(sizes / 2, abs=1)


@pytest.mark.parametrize("rows", [401, 997])
def test_each_row_once_and_not_as_stored(made: Made, rows: int) -> None:
    feed = Feed(made(rows, 50, per_shard=5), TRAIN, 32, shuffle=True, lanes=True)
    orders = []
    for epoch in range(2):
        feed.set_epoch(epoch)
        orders.append([int(i) for batch in feed for i in batch.ids])
        assert sorted(orders[-1]) == sorted(int(i) for i in feed.ids())
    assert orders[0] != orders[1]
    neighbours = np.abs(np.diff(orders[0]))
    assert (neighbours == 1).mean() < 0.05


def test_a_sample_moves_between_the_epochs_of_its_lane(made: Made) -> None:
    """The rows of a lane's shards are shuffled together, and the shards are in another order each epoch."""
    feed = Feed(made(4 * LANES * 5, 1, per_shard=5), TRAIN, LANES, shuffle=True, lanes=True)
    places = []
    for epoch in range(2):
        feed.set_epoch(epoch)
        places.append({i: k for k, batch in enumerate(feed) for i in batch.ids})
    moved = np.array([places[0][i] - places[1][i] for i in places[0]])
    assert np.abs(moved).mean() > 4  # of 20 batches: any order at all gives 6.6


def test_without_shuffling_the_rotation_is_the_same_each_epoch(made: Made) -> None:
    feed = Feed(made(11, 400, per_shard=5), VALID, 32, shuffle=False, lanes=True)
    first = [batch.ids for batch in feed]
    feed.set_epoch(1)
    assert [batch.ids for batch in feed] == first
    assert Counter(i for ids in first for i in ids) == Counter(feed.ids())


class Watched(Prepared):
    """Notes which shards are opened."""

    opened: list[int]

    def table(self, number: int) -> pa.Table:
        self.opened.append(number)
        return super().table(number)


def watched(store: Prepared) -> Watched:
    seen = Watched(**{name: getattr(store, name) for name in store.__dataclass_fields__})
    object.__setattr__(seen, "opened", [])
    return seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_worker_opens_only_the_shards_of_its_lanes_and_keeps_a_few(made: Made, world: int) -> None:
    store = made(6 * LANES * 3, 2, per_shard=3)
    together: list[int] = []
    for rank in range(world):
        seen = watched(store)
        feed = Feed(seen, TRAIN, 48, shuffle=True, lanes=True).shard(rank, world)
        most = 0
        for _ in feed:
            most = max(most, len(feed._samples.shards._open))
        assert {s % LANES % world for s in seen.opened} == {rank}
        assert max(Counter(seen.opened).values()) == 1, "a shard was opened again in the same epoch"
        assert most <= (LANES // world + 1) * WINDOW < len(seen.opened)
        together += seen.opened
    assert sorted(together) == list(range(len(store.index["shards"])))


def test_shares_are_nearly_equal(made: Made) -> None:
    whole = Feed(made(1000, 5), TRAIN, 48, shuffle=True, lanes=True)
    for batches in zip(*(whole.shard(rank, 3) for rank in range(3)), strict=True):
        sizes = [b.own_rows for b in batches]
        assert max(sizes) - min(sizes) <= 2
        assert {b.global_rows for b in batches} == {sum(sizes)}


@pytest.mark.parametrize(
    "setting", [{"weights": [1.0] * 40}, {"partial_n": 3}, {"sort_by_length": "x"}], ids=lambda s: next(iter(s))
)
def test_what_needs_all_rows_at_once_is_refused(made: Made, setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(setting))} needs an order over all rows"):
        Feed(made(40, 5), TRAIN, 8, shuffle=True, lanes=True, **setting)


def test_more_workers_than_lanes_are_refused(made: Made) -> None:
    feed = Feed(made(200, 5), TRAIN, 100, shuffle=True, lanes=True)
    with pytest.raises(UserError, match="64 lanes feed at most 64 workers, not 65"):
        feed.shard(0, 65)


def test_an_epoch_that_was_left_keeps_nothing_open(made: Made) -> None:
    feed = Feed(made(6 * LANES * 3, 2, per_shard=3), TRAIN, 48, shuffle=True, lanes=True)
    next(iter(feed))
    for _ in feed:
        pass
    assert not feed._samples.shards._open


def test_threads_that_overtake_each_other_leave_nothing_open(made: Made) -> None:
    feed = Feed(made(6 * LANES * 3, 2, per_shard=3), TRAIN, 48, shuffle=True, lanes=True)
    epoch = feed._samples.epoch(0)
    seen: list[int] = []
    for k in np.arange(len(feed)).reshape(-1, 2)[:, ::-1].reshape(-1).tolist():  # each second batch before the first
        share = epoch.share(k)
        assert share is not None
        seen += share.rows.tolist()
    assert len(set(seen)) == len(seen) == feed.n
    assert not feed._samples.shards._open


def test_a_lane_feed_goes_on_in_the_middle_of_an_epoch(made: Made) -> None:
    store = made(300, 5)
    feed = Feed(store, TRAIN, 16, shuffle=True, lanes=True, epoch=4)
    iterator = iter(feed)
    for _ in range(7):
        next(iterator)
    state, rest = feed.state_dict(), None
    rest = [b.ids for b in iterator]
    again = replace(feed)
    again.load_state_dict(state)
    assert [b.ids for b in again] == rest


@pytest.mark.parametrize("disk", [10**12, 100])
def test_copies_are_dropped_where_the_disk_would_not_hold_them(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: int
) -> None:
    """Each shard is fetched once an epoch and goes when its rows were drawn; with room, it stays for the next epoch."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/storage")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=disk, free=10**12))
    dls = digits_block.dataloaders(few_digits, batch_size=16).new(lanes=True)
    assert dls.prepared is not None
    assert len({i for batch in dls.train for i in batch.ids}) == dls.train.n  # type: ignore[attr-defined]
    copies = list(dls.prepared.folder.rglob("*.arrow"))
    assert len(copies) == (0 if disk == 100 else len(dls.prepared.index["shards"]))
    again = [batch.ids for batch in dls.train]
    assert len(again) == len(dls.train)  # type: ignore[arg-type]
