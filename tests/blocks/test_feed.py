"""The feed: each sample once an epoch, the same global batches on any number of ranks, and copies, not the data."""

import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks import (
    Batch,
    DataBlock,
    Feed,
    Prepared,
    Streams,
    TensorCategory,
    TensorImage,
    TensorText,
    Windows,
    prepare,
)
from blocks.draws import sample_keys, uniform
from blocks.errors import DataError, UserError
from blocks.feed import ahead
from blocks.splits import TRAIN, VALID
from blocks.tensors import as_plain
from blocks.transform import ItemTransform, RandTransform

Made = Callable[..., Prepared]


@pytest.fixture
def digits(digits_block: DataBlock, few_digits: Path) -> Prepared:
    return prepare(digits_block.plan(few_digits))


def epoch_of(feed: Feed, epoch: int = 0) -> list[list[str]]:
    """The ids of each batch, without those that are borrowed."""
    feed.set_epoch(epoch)
    return [[] if batch.borrowed else batch.ids for batch in feed]


def flat(batches: list[list[str]]) -> list[str]:
    return [row_id for batch in batches for row_id in batch]


# --- rows and order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "shuffle"), [(TRAIN, True), (VALID, False)])
def test_each_row_once_an_epoch(digits: Prepared, part: int, shuffle: bool) -> None:
    rows = [i for t in digits.tables() for i, p in zip(t["id"].to_pylist(), t["part"].to_pylist(), strict=True) if p == part]
    feed = Feed(digits, part, 16, shuffle=shuffle)
    assert feed.n == len(rows)
    assert feed.ids() == rows
    for epoch in range(3):
        drawn = flat(epoch_of(feed, epoch))
        assert sorted(drawn) == sorted(rows)
        assert (drawn == rows) is not shuffle


def test_the_order_is_that_of_seed_and_epoch(digits: Prepared) -> None:
    def feed(seed: int) -> Feed:
        return Feed(digits, TRAIN, 16, shuffle=True, seed=seed)

    orders = {(seed, epoch): epoch_of(feed(seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len({str(order) for order in orders.values()}) == 6
    one = feed(1)
    assert [epoch_of(one, epoch) for epoch in (2, 0, 2)] == [orders[1, 2], orders[1, 0], orders[1, 2]]


def test_iterating_again_repeats_the_epoch(digits: Prepared) -> None:
    feed = Feed(digits, TRAIN, 16, shuffle=True)
    assert [b.ids for b in feed] == [b.ids for b in feed]


def test_a_batch_holds_what_its_ids_say(digits: Prepared, few_digits: Path) -> None:
    stored = {
        row_id: (x, y)
        for t in digits.tables()
        for row_id, x, y in zip(
            t["id"].to_pylist(), t["x"].combine_chunks().to_numpy_ndarray(), t["y"].to_pylist(), strict=True
        )
    }
    for batch in Feed(digits, TRAIN, 16, shuffle=True):
        x, y = batch
        assert type(x) is TensorImage
        assert type(y) is TensorCategory
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert len(batch.ids) == len(x) == len(y) == batch.global_rows == batch.own_rows
        for row_id, pixels, code in zip(batch.ids, x, y, strict=True):
            assert np.array_equal(pixels.numpy(), stored[row_id][0])
            assert int(code) == stored[row_id][1] == int(Path(row_id).parent.name)
            assert (few_digits / row_id).exists()


@pytest.mark.parametrize("size", [2, 40])
@pytest.mark.parametrize("per_shard", [7, 100])
def test_small_and_large_rows_in_one_and_many_shards(made: Made, size: int, per_shard: int) -> None:
    """Each way of copying."""
    rows = [torch.full((size, size), n) for n in range(30)]
    store = made(
        20, 10, per_shard, {"x": [r.as_subclass(TensorImage) for r in rows], "y": [torch.tensor(n) for n in range(30)]}
    )
    assert (rows[0].nbytes > 4096) == (size == 40)
    for batch in Feed(store, TRAIN, 8, shuffle=True):
        for row_id, x, y in zip(batch.ids, *batch, strict=True):
            assert torch.equal(as_plain(x), rows[int(row_id)])
            assert int(y) == int(row_id)


def test_changing_a_batch_does_not_change_the_data(digits: Prepared) -> None:
    feed = Feed(digits, TRAIN, 16, shuffle=True)
    before = [as_plain(batch[0]).clone() for batch in feed]
    for batch in feed:
        batch[0].zero_()
    assert all(torch.equal(as_plain(batch[0]), x) for batch, x in zip(feed, before, strict=True))
    assert any(x.any() for x in before)


def test_changing_a_batch_does_not_change_the_data_of_another_process(digits: Prepared, tmp_path: Path) -> None:
    """Each maps the same files."""
    sent = tmp_path / "feed"
    sent.write_bytes(pickle.dumps(Feed(digits, TRAIN, 16, shuffle=True)))
    code = f"import pickle\nfor batch in pickle.load(open({str(sent)!r}, 'rb')):\n    batch[0].add_(7)\n    batch[1].add_(7)"
    feed = Feed(digits, TRAIN, 16, shuffle=True)
    before = [tuple(as_plain(c).clone() for c in batch) for batch in feed]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
    for batches in (feed, Feed(digits, TRAIN, 16, shuffle=True)):
        for batch, old in zip(batches, before, strict=True):
            assert all(torch.equal(as_plain(c), o) for c, o in zip(batch, old, strict=True))


def test_a_batch_that_is_kept_stays_as_it_is(made: Made) -> None:
    """No buffer of a batch is used again while somebody holds it."""
    kept = list(Feed(made(100, 20), TRAIN, 8, shuffle=True))
    for batch in kept:
        assert [str(int(v)) for v in batch[1]] == batch.ids
        assert [str(int(v)) for v in batch[0][:, 0, 0, 0]] == batch.ids


def test_mapping_a_batch_keeps_its_rows(digits: Prepared) -> None:
    batch = next(iter(Feed(digits, TRAIN, 16, shuffle=True)))
    mapped = batch.map(lambda column: column.float())
    assert type(mapped) is Batch
    assert mapped.ids == batch.ids
    assert mapped.global_rows == batch.global_rows
    assert torch.equal(mapped.keys, batch.keys)
    assert mapped[0].dtype == torch.float32


def test_a_batch_travels(digits: Prepared) -> None:
    batch = next(iter(Feed(digits, TRAIN, 16, shuffle=True, seed=3)))
    arrived = pickle.loads(pickle.dumps(batch))  # noqa: S301  our own bytes
    assert type(arrived) is Batch
    assert (arrived.ids, arrived.global_rows, arrived.own_rows) == (batch.ids, 16, 16)
    assert torch.equal(arrived.keys, batch.keys)
    assert torch.equal(as_plain(arrived[0]), as_plain(batch[0]))


# --- keys --------------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_row_are_those_of_seed_epoch_and_position(made: Made) -> None:
    feed = Feed(made(40, 10), TRAIN, 8, shuffle=True, seed=3)
    feed.set_epoch(2)
    for batch in feed:
        assert batch.samples is not None
        assert batch.samples.tolist() == [int(i) for i in batch.ids]
        assert torch.equal(batch.keys, sample_keys(3, 2, batch.samples))


def test_a_row_has_the_same_key_in_any_company(made: Made) -> None:
    whole = Feed(made(41, 10), TRAIN, 8, shuffle=True)
    keys = {i: int(k) for batch in whole for i, k in zip(batch.ids, batch.keys, strict=True)}
    for feed in (whole.shard(1, 3), replace(whole, batch_size=5)):
        assert all(keys[i] == int(k) for batch in feed for i, k in zip(batch.ids, batch.keys, strict=True))
    whole.set_epoch(1)
    assert all(keys[i] != int(k) for batch in whole for i, k in zip(batch.ids, batch.keys, strict=True))


# --- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 31, 97])
def test_global_batches_do_not_depend_on_the_ranks(made: Made, world: int, rows: int, lanes: bool) -> None:
    whole = Feed(made(rows, 20), TRAIN, 8, shuffle=True, seed=3, lanes=lanes)
    alone = epoch_of(whole, 1)
    ranks = [whole.shard(rank, world) for rank in range(world)]
    batches = [epoch_of(rank, 1) for rank in ranks]
    assert {len(b) for b in batches} == {len(alone)} == {len(rank) for rank in ranks}
    assert [sorted(flat(list(batch))) for batch in zip(*batches, strict=True)] == [sorted(batch) for batch in alone]
    assert sorted(flat(alone)) == sorted(whole.ids())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_a_batch_are_nearly_equal_and_know_the_whole(made: Made, world: int) -> None:
    whole = Feed(made(31, 5), TRAIN, 8, shuffle=True)
    for batches in zip(*(whole.shard(rank, world) for rank in range(world)), strict=True):
        sizes = [b.own_rows for b in batches]
        assert max(sizes) - min(sizes) <= 1
        assert {b.global_rows for b in batches} == {sum(sizes)}


@pytest.mark.parametrize("lanes", [False, True])
def test_a_rank_without_rows_borrows_one_in_training(made: Made, lanes: bool) -> None:
    """So that it can take part in the step; it counts for nothing."""
    whole = Feed(made(10, 5), TRAIN, 8, shuffle=True, lanes=lanes)
    last = [list(whole.shard(rank, 3))[-1] for rank in range(3)]
    assert sum(b.own_rows for b in last) == 2
    (borrowed,) = (b for b in last if b.borrowed)
    assert (borrowed.own_rows, borrowed.global_rows, len(borrowed[0]), len(borrowed.ids)) == (0, 2, 1, 1)
    assert borrowed.ids[0] in whole.ids()
    assert borrowed.map(lambda c: c).own_rows == 0


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [
        (32, 8, [8, 8, 8, 8]),
        (33, 8, [8, 8, 8, 9]),
        (34, 8, [8, 8, 8, 8, 2]),
        (5, 8, [5]),
        (9, 8, [9]),
        (1, 8, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_last_batch_of_one_row_joins_the_one_before(
    made: Made, rows: int, batch_size: int, sizes: list[int], world: int
) -> None:
    if world > batch_size:
        return
    feed = Feed(made(rows, 3), TRAIN, batch_size, shuffle=True).shard(0, world)
    assert [batch.global_rows for batch in feed] == sizes
    assert len(feed) == len(sizes)


def test_a_small_last_batch_of_validation_stays(made: Made) -> None:
    feed = Feed(made(10, 9), VALID, 8, shuffle=False)
    assert [batch.global_rows for batch in feed] == [8, 1]


@pytest.mark.parametrize(("rows", "sizes"), [(33, [8] * 4), (32, [8] * 4), (39, [8] * 4)])
def test_drop_last(made: Made, rows: int, sizes: list[int]) -> None:
    feed = Feed(made(rows, 3), TRAIN, 8, shuffle=True, drop_last=True)
    assert [batch.global_rows for batch in feed] == sizes
    assert len(set(flat(epoch_of(feed)))) == sum(sizes)
    with pytest.raises(DataError, match="drop_last leaves nothing: 7 samples do not fill one batch of 8"):
        len(Feed(made(7, 3), TRAIN, 8, shuffle=True, drop_last=True))


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 23])
@pytest.mark.parametrize("world", [2, 3])
def test_validation_covers_each_row_once_over_the_ranks(made: Made, rows: int, world: int, lanes: bool) -> None:
    """Even with fewer rows than ranks."""
    whole = Feed(made(11, rows), VALID, 6, shuffle=False, lanes=lanes)
    covered = [row_id for rank in range(world) for row_id in flat(epoch_of(whole.shard(rank, world)))]
    assert Counter(covered) == Counter(flat(epoch_of(whole))) == Counter(whole.ids())


@pytest.mark.parametrize(("batch_size", "world"), [(1, 2), (2, 3), (0, 1)])
def test_a_batch_too_small_for_the_ranks(digits: Prepared, batch_size: int, world: int) -> None:
    with pytest.raises(UserError, match=f"at least {world}"):
        Feed(digits, TRAIN, batch_size, shuffle=True, world=world)
    with pytest.raises(UserError, match="at least 33"):
        Feed(digits, TRAIN, 32, shuffle=True).shard(0, 33)


# --- position ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_an_epoch_from_some_batch_on(made: Made, start: int, lanes: bool) -> None:
    feed = Feed(made(37, 5), TRAIN, 8, shuffle=True, lanes=lanes)
    feed.set_epoch(3)
    whole = list(feed)
    assert [b.ids for b in feed.batches(start=start)] == [b.ids for b in whole[start:]]
    assert all(torch.equal(b.keys, w.keys) for b, w in zip(feed.batches(start=start), whole[start:], strict=True))


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_state_goes_on_where_it_was(made: Made, taken: int) -> None:
    store = made(37, 5)
    feed = Feed(store, TRAIN, 8, shuffle=True)
    feed.set_epoch(2)
    iterator = iter(feed)
    for _ in range(taken):
        next(iterator)
    state = feed.state_dict()
    assert state == {"epoch": 2, "position": taken}
    rest = [b.ids for b in iterator]

    again = Feed(store, TRAIN, 8, shuffle=True)
    again.load_state_dict(state)
    again.set_epoch(state["epoch"])  # as a loop over epochs does
    assert again.state_dict() == state
    assert [b.ids for b in again] == rest
    assert epoch_of(again, 2) == epoch_of(feed, 2)  # the next iteration is a whole one
    again.load_state_dict(state)
    again.set_epoch(3)
    assert len(list(again)) == 5


# --- choosing rows -----------------------------------------------------------------------------------------------------


def test_weights_draw_each_row_as_often_as_they_say(made: Made) -> None:
    store = made(50, 10)
    weights = np.arange(50) % 5  # ten rows each of the weights 0 to 4
    feed = Feed(store, TRAIN, 10, shuffle=True, weights=weights)
    weight_of = dict(zip(feed.ids(), weights, strict=True))
    drawn = [weight_of[i] for epoch in range(100) for i in flat(epoch_of(feed, epoch))]
    assert len(drawn) == 5000
    for weight in range(5):
        assert abs(drawn.count(weight) / 5000 - weight / 10) < 0.03  # four standard deviations
    assert epoch_of(feed, 1) == epoch_of(replace(feed), 1) != epoch_of(feed, 2)


def test_a_row_drawn_twice_is_augmented_twice(made: Made) -> None:
    feed = Feed(made(20, 10), TRAIN, 10, shuffle=True, weights=[1.0] + [0.0] * 19)
    keys = torch.cat([batch.keys for batch in feed])
    assert len(set(flat(epoch_of(feed)))) == 1
    assert len(keys.unique()) == 20


@pytest.mark.parametrize("weights", [[1.0] * 19, [-1.0] + [1.0] * 19, [0.0] * 20, [float("nan")] * 20])
def test_weights_that_are_none(made: Made, weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights are"):
        len(Feed(made(20, 10), TRAIN, 10, shuffle=True, weights=weights))


def test_part_of_the_rows_each_epoch_others(made: Made) -> None:
    feed = Feed(made(50, 10), TRAIN, 8, shuffle=True, partial_n=20)
    first, second = flat(epoch_of(feed, 0)), flat(epoch_of(feed, 1))
    assert feed.n == len(set(first)) == len(set(second)) == 20
    assert set(first) != set(second)
    assert Feed(made(50, 10), TRAIN, 8, shuffle=True, partial_n=200).n == 50
    with pytest.raises(UserError, match="partial_n"):
        Feed(made(50, 10), TRAIN, 8, shuffle=True, partial_n=0)


# --- columns of differing length ---------------------------------------------------------------------------------------


def texts(n: int, longest: int = 40) -> dict[str, list[torch.Tensor]]:
    """Row n has the number n, so many times; every ninth is empty."""
    lengths = np.random.default_rng(1).integers(1, longest, n)
    lengths[::9] = 0
    x = [torch.full((int(length),), n + 10).as_subclass(TensorText) for n, length in enumerate(lengths)]
    return {"x": x, "y": [torch.tensor(n).as_subclass(TensorCategory) for n in range(n)]}


@pytest.mark.parametrize(("pad", "expected"), [({}, 1), ({"x": 7}, 7)])
def test_rows_are_padded_to_the_longest_of_the_batch(made: Made, pad: dict[str, float], expected: int) -> None:
    columns = texts(40)
    for batch in Feed(made(30, 10, columns=columns), TRAIN, 8, shuffle=True, pad=pad):
        x, _ = batch
        assert type(x) is TensorText
        rows = [columns["x"][int(i)] for i in batch.ids]
        assert x.shape == (len(rows), max(len(r) for r in rows))
        for found, row in zip(x, rows, strict=True):
            assert found[: len(row)].tolist() == row.tolist()
            assert set(found[len(row) :].tolist()) <= {expected}


def test_texts_of_about_one_length_share_a_batch(made: Made) -> None:
    store = made(400, 100, 50, texts(500))
    feed = Feed(store, TRAIN, 8, shuffle=True, sort_by_length="x")

    def padding(f: Feed) -> int:
        return sum(int((batch[0] == 1).sum()) for batch in f)

    assert padding(feed) < 0.1 * padding(replace(feed, sort_by_length=None))
    assert sorted(flat(epoch_of(feed, 1))) == sorted(feed.ids())
    assert epoch_of(feed, 1) != epoch_of(feed, 2)
    assert next(iter(feed))[0].shape[1] == max(batch[0].shape[1] for batch in feed)
    widths = [batch[0].shape[1] for batch in feed]
    assert widths != sorted(widths, reverse=True)
    valid = [batch[0].shape[1] for batch in Feed(store, VALID, 100, shuffle=False, sort_by_length="x")]
    assert valid == [max(valid)]


@pytest.mark.parametrize(
    "settings",
    [{"pad": {"z": 1}}, {"sort_by_length": "z"}, {"samples": Windows(3, columns=("x", "z"))}, {"samples": Streams(3, "z")}],
)
def test_a_column_that_is_not_there(made: Made, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="there is no column 'z'; there are x, y"):
        Feed(made(20, 10), TRAIN, 8, shuffle=True, **settings)


# --- item transforms of each epoch ---------------------------------------------------------------------------------------


@dataclass
class AddDrawn(RandTransform, registered=False):
    """Adds a random number to an image."""

    def draw(self, x: object, keys: torch.Tensor) -> torch.Tensor:
        return uniform(keys, 5, high=100.0)

    def encodes(self, x: TensorImage, drawn: torch.Tensor) -> TensorImage:
        return x + drawn.round().long()


def finishing(store: Prepared, *tfms: object) -> Prepared:
    encode = store.encode
    return replace(store, encode=replace(encode, each_epoch=type(encode.item_tfms).of(tfms)))  # type: ignore[arg-type]


def test_random_item_transforms_are_drawn_by_seed_epoch_and_row(made: Made) -> None:
    store = finishing(made(40, 10), AddDrawn())
    feed = Feed(store, TRAIN, 8, shuffle=True, seed=4)

    def values(f: Feed, epoch: int) -> dict[str, int]:
        f.set_epoch(epoch)
        return {i: int(x[0, 0, 0]) for batch in f for i, x in zip(batch.ids, batch[0], strict=True)}

    first = values(feed, 0)
    expected = uniform(sample_keys(4, 0, np.arange(50)), 5, high=100.0).round().long()
    assert first == {i: int(i) + int(expected[int(i)]) for i in feed.ids()}
    assert values(feed, 1) != first
    ranks = [values(feed.shard(rank, 3), 0) for rank in range(3)]
    assert ranks[0] | ranks[1] | ranks[2] == first
    valid = Feed(store, VALID, 8, shuffle=False)
    assert values(valid, 0) == {i: int(i) for i in valid.ids()}
    assert type(next(iter(feed))[0]) is TensorImage


@dataclass
class Measure(ItemTransform, registered=False):
    """An encoded file as its number of bytes, and as many tokens."""

    def encodes(self, x: tuple[bytes, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(len(x[0])), torch.arange(len(x[0])).as_subclass(TensorText)


def test_encoded_files_and_results_of_differing_length(made: Made) -> None:
    columns = {"x": [b"a" * n for n in range(30)], "y": [torch.tensor(n) for n in range(30)]}
    for batch in Feed(finishing(made(20, 10, columns=columns), Measure()), TRAIN, 8, shuffle=True):
        lengths, tokens = batch
        assert lengths.tolist() == [int(i) for i in batch.ids]
        assert type(tokens) is TensorText
        for n, row in zip(lengths.tolist(), tokens.tolist(), strict=True):
            assert row == list(range(n)) + [1] * (int(lengths.max()) - n)


def test_an_error_of_an_item_transform_names_the_row(made: Made) -> None:
    def fails(x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside") as caught:
        list(Feed(finishing(made(40, 10), fails), TRAIN, 8, shuffle=True))
    assert any("row '" in note for note in caught.value.__notes__)


@dataclass
class HalveTheOdd(ItemTransform, registered=False):
    """Makes images of odd rows smaller."""

    def encodes(self, x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        image, y = x
        return (image[:, :1] if int(y) % 2 else image), y


def test_item_transforms_that_end_with_two_sizes(made: Made) -> None:
    with pytest.raises(DataError, match=r"'x' holds .* in one batch"):
        list(Feed(finishing(made(40, 10), HalveTheOdd()), TRAIN, 8, shuffle=True))


# --- making batches ahead ------------------------------------------------------------------------------------------------


def feed_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fastray-feed")]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_ahead_is_in_order_and_leaves_no_thread(threads: int) -> None:
    assert list(ahead(lambda k: k * k, range(50), threads)) == [k * k for k in range(50)]
    assert not feed_threads()
    assert list(ahead(lambda k: k, [], threads)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_ahead_is_only_so_far_ahead(threads: int) -> None:
    began: list[int] = []

    def make(k: int) -> int:
        began.append(k)
        return k

    iterator: Iterator[int] = ahead(make, range(50), threads)
    for k in range(10):
        assert next(iterator) == k
        assert len(began) <= k + 1 + 2 + threads
    assert feed_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not feed_threads()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_is_raised_when_its_turn_comes(threads: int) -> None:
    def make(k: int) -> int:
        if k == 3:
            raise ValueError("the fourth")
        return k

    got = []
    with pytest.raises(ValueError, match="the fourth"):
        got += [k for k in ahead(make, range(50), threads) if got.append(k) is None]  # type: ignore[func-returns-value]
    assert got == [0, 1, 2]
    assert not feed_threads()


def test_with_a_gpu_batches_are_made_ahead_in_pinned_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here, so its two calls are stood in for."""
    pinned: list[str] = []

    def pin_memory(column: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return column

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    feed = Feed(made(30, 10), TRAIN, 8, shuffle=True)
    assert sorted(flat(epoch_of(feed))) == sorted(feed.ids())
    assert len(pinned) == 2 * len(feed)
    assert all(name.startswith("fastray-feed") for name in pinned)


def test_an_iterator_that_is_left_leaves_no_thread(made: Made) -> None:
    feed = Feed(made(50, 10), TRAIN, 8, shuffle=True, lanes=True)
    iterator = iter(feed)
    next(iterator)
    assert feed_threads()
    del iterator
    assert not feed_threads()
    assert flat(epoch_of(feed)) == flat(epoch_of(replace(feed)))


# --- travelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
def test_a_feed_travels(digits: Prepared, used: bool) -> None:
    """Small, without the data, also when it was drawn from before."""
    feed = Feed(digits, TRAIN, 16, shuffle=True, seed=4)
    feed.set_epoch(2)
    if used:
        list(feed)
    sent = pickle.dumps(feed)
    assert len(sent) < 10_000
    arrived = pickle.loads(sent)  # noqa: S301  our own bytes
    assert [b.ids for b in arrived] == [b.ids for b in feed]
    assert torch.equal(as_plain(next(iter(arrived))[0]), as_plain(next(iter(feed))[0]))


def test_a_shard_follows_the_epoch_it_is_told(digits: Prepared) -> None:
    feed = Feed(digits, TRAIN, 16, shuffle=True)
    share = feed.shard(1, 2)
    assert (share.rank, share.world) == (1, 2)
    assert epoch_of(share, 0) != epoch_of(share, 1)
    assert replace(share, rank=0, world=1).n == share.n == feed.n
