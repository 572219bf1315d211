"""The feed: each row once an epoch, the same global batches on any number of ranks, and copies, not the data."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from blocks import Batch, CategoryBlock, DataBlock, DataError, Feed, Prepared, TensorCategory, TensorImage, prepare
from blocks.errors import UserError
from blocks.shards import typed_column, write_shard
from blocks.splits import TRAIN, VALID
from blocks.tensors import as_plain


@pytest.fixture
def digits(digits_block: DataBlock, few_digits: Path) -> Prepared:
    return prepare(digits_block.plan(few_digits))


def made(folder: Path, train: int, valid: int, per_shard: int = 7) -> Prepared:
    """A store of so many rows in small shards: row i has the id "i", the value i, and every fourth or so validates."""
    rows = train + valid
    parts = np.zeros(rows, np.uint8)
    parts[np.random.default_rng(0).permutation(rows)[:valid]] = VALID
    shards = []
    folder.mkdir(parents=True)
    for start in range(0, rows, per_shard):
        numbers = range(start, min(start + per_shard, rows))
        x_field, x = typed_column("x", [torch.full((1, 2, 2), n, dtype=torch.int64).as_subclass(TensorImage) for n in numbers])
        y_field, y = typed_column("y", [torch.tensor(n).as_subclass(TensorCategory) for n in numbers])
        schema = pa.schema([pa.field("id", pa.string()), pa.field("part", pa.uint8()), x_field, y_field])
        columns = [pa.array([str(n) for n in numbers]), pa.array(parts[numbers.start : numbers.stop]), x, y]
        file = f"{len(shards):06d}.arrow"
        write_shard(folder / file, pa.Table.from_arrays(columns, schema=schema))
        shards.append({"file": file, "rows": len(numbers), "bytes": (folder / file).stat().st_size})
    block = DataBlock(
        (CategoryBlock(), CategoryBlock()), get_items=lambda source: ["a", "b"], splitter=lambda items: ([0], [1])
    )
    encode = block.plan(folder).encode_with([])
    return Prepared(folder, {"shards": shards, "bad_rows": []}, encode, reused=False)


def epoch_of(feed: Feed, epoch: int = 0) -> list[list[str]]:
    """The ids of each batch."""
    feed.set_epoch(epoch)
    return [batch.ids for batch in feed]


def flat(batches: list[list[str]]) -> list[str]:
    return [row_id for batch in batches for row_id in batch]


# --- rows and order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "shuffle"), [(TRAIN, True), (VALID, False)])
def test_each_row_once_an_epoch(digits: Prepared, part: int, shuffle: bool) -> None:
    rows = [i for t in digits.tables() for i, p in zip(t["id"].to_pylist(), t["part"].to_pylist(), strict=True) if p == part]
    feed = Feed(digits, part, 16, shuffle=shuffle)
    assert feed.n == len(rows)
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
        assert len(batch.ids) == len(x) == len(y) == batch.global_rows
        for row_id, pixels, code in zip(batch.ids, x, y, strict=True):
            assert np.array_equal(pixels.numpy(), stored[row_id][0])
            assert int(code) == stored[row_id][1] == int(Path(row_id).parent.name)
            assert (few_digits / row_id).exists()


def test_changing_a_batch_does_not_change_the_data(digits: Prepared) -> None:
    feed = Feed(digits, TRAIN, 16, shuffle=True)
    before = [as_plain(batch[0]).clone() for batch in feed]
    for batch in feed:
        batch[0].zero_()
    assert all(torch.equal(as_plain(batch[0]), x) for batch, x in zip(feed, before, strict=True))
    assert any(x.any() for x in before)


def test_mapping_a_batch_keeps_its_rows(digits: Prepared) -> None:
    batch = next(iter(Feed(digits, TRAIN, 16, shuffle=True)))
    mapped = batch.map(lambda column: column.float())
    assert type(mapped) is Batch
    assert mapped.ids == batch.ids
    assert mapped.global_rows == batch.global_rows
    assert mapped[0].dtype == torch.float32


def test_the_ids_of_each_batch_stay_its_own(digits: Prepared) -> None:
    batches = list(Feed(digits, TRAIN, 16, shuffle=True))
    assert len(set(flat([b.ids for b in batches]))) == sum(len(b[0]) for b in batches)


# --- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [31, 61, 97, 96])
@pytest.mark.parametrize("batch_size", [8, 10])
def test_global_batches_do_not_depend_on_the_ranks(tmp_path: Path, world: int, rows: int, batch_size: int) -> None:
    """Save the last one of a training epoch, which may have joined the one before."""
    whole = Feed(made(tmp_path / "store", rows, 20), TRAIN, batch_size, shuffle=True, seed=3)
    alone = epoch_of(whole, 1)
    ranks = [epoch_of(whole.shard(rank, world), 1) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(whole.shard(rank, world)) for rank in range(world)} == {len(ranks[0])}
    together = [flat(list(batch)) for batch in zip(*ranks, strict=True)]
    for one, many in list(zip(alone, together, strict=False))[: len(together) - 1]:
        assert Counter(one) == Counter(many)
    assert Counter(flat(together)) == Counter(flat(alone))
    assert max(Counter(flat(together)).values()) == 1
    assert len(flat(together)) == rows
    assert min(len(batch) for batches in ranks for batch in batches) >= 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_a_batch_are_nearly_equal_and_know_the_whole(tmp_path: Path, world: int) -> None:
    whole = Feed(made(tmp_path / "store", 31, 5), TRAIN, 8, shuffle=True)
    for batches in zip(*(whole.shard(rank, world) for rank in range(world)), strict=True):
        sizes = [len(b[0]) for b in batches]
        assert max(sizes) - min(sizes) <= 1
        assert {b.global_rows for b in batches} == {sum(sizes)}


@pytest.mark.parametrize(
    ("rows", "batch_size", "world", "sizes"),
    [
        (32, 8, 1, [8, 8, 8, 8]),
        (33, 8, 1, [8, 8, 8, 9]),
        (34, 8, 1, [8, 8, 8, 8, 2]),
        (34, 8, 2, [8, 8, 8, 10]),
        (37, 8, 3, [8, 8, 8, 13]),
        (38, 8, 3, [8, 8, 8, 8, 6]),
        (5, 8, 1, [5]),
        (9, 8, 1, [9]),
        (2, 8, 1, [2]),
    ],
)
def test_a_small_last_batch_joins_the_one_before(
    tmp_path: Path, rows: int, batch_size: int, world: int, sizes: list[int]
) -> None:
    feed = Feed(made(tmp_path / "store", rows, 3), TRAIN, batch_size, shuffle=True).shard(0, world)
    assert [batch.global_rows for batch in feed] == sizes
    assert len(feed) == len(sizes)


def test_a_small_last_batch_of_validation_stays(tmp_path: Path) -> None:
    feed = Feed(made(tmp_path / "store", 10, 9), VALID, 8, shuffle=False)
    assert [batch.global_rows for batch in feed] == [8, 1]


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_each_row_once_over_the_ranks(tmp_path: Path, rows: int, world: int) -> None:
    """Even with fewer rows than ranks."""
    whole = Feed(made(tmp_path / "store", 11, rows), VALID, 6, shuffle=False)
    covered = [row_id for rank in range(world) for row_id in flat(epoch_of(whole.shard(rank, world)))]
    assert Counter(covered) == Counter(flat(epoch_of(whole)))
    assert len(set(covered)) == rows


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (3, 2), (5, 3), (0, 1)])
def test_a_batch_too_small_for_the_ranks(digits: Prepared, batch_size: int, world: int) -> None:
    with pytest.raises(UserError, match=f"at least {2 * world}"):
        Feed(digits, TRAIN, batch_size, shuffle=True, world=world)
    with pytest.raises(UserError, match="at least 34"):
        Feed(digits, TRAIN, 32, shuffle=True).shard(0, 17)


def test_too_few_rows_for_the_ranks(tmp_path: Path) -> None:
    store = made(tmp_path / "store", 5, 2)
    assert len(Feed(store, TRAIN, 8, shuffle=True).shard(0, 2)) == 1
    with pytest.raises(DataError, match="5 rows, too few for 3 workers"):
        len(Feed(store, TRAIN, 8, shuffle=True).shard(0, 3))


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
