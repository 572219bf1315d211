"""DataLoaders: batches as the model sees them, back to what a person sees, and other iterables in the place of ours."""

import pickle
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from blocks import (
    Batch,
    CategoryBlock,
    ColReader,
    DataBlock,
    DataError,
    DataLoaders,
    ImageBlock,
    IntToFloatTensor,
    PILImage,
    PILImageBW,
    Pipeline,
    RegressionBlock,
    Resize,
    TensorCategory,
    TensorImage,
    TensorImageBW,
    TensorText,
    Transform,
    TransformBlock,
)
from blocks.dataloaders import class_weights, input_tensors
from blocks.draws import sample_keys, uniform
from blocks.shards import as_array
from blocks.splits import TRAIN, VALID
from blocks.transform import RandTransform


@pytest.fixture
def dls(digits_block: DataBlock, few_digits: Path) -> DataLoaders:
    return digits_block.dataloaders(few_digits, batch_size=16)


def stored(dls: DataLoaders) -> dict[str, np.ndarray]:
    assert dls.prepared is not None
    return {row_id: x for t in dls.prepared.tables() for row_id, x in zip(t["id"].to_pylist(), as_array(t, "x"), strict=True)}


@pytest.mark.parametrize("part", [TRAIN, VALID])
def test_one_batch_is_transformed(dls: DataLoaders, part: int) -> None:
    batch = dls.one_batch(part)
    x, y = batch
    assert type(x) is TensorImage
    assert x.dtype == torch.float32
    assert tuple(x.shape) == (16, 3, 16, 16)
    assert float(x.min()) == -1.0
    assert 0.9 < float(x.max()) <= 1.0
    assert type(y) is TensorCategory
    assert y.dtype == torch.int64
    pixels = torch.from_numpy(np.stack([stored(dls)[i] for i in batch.ids]))
    torch.testing.assert_close(x.as_subclass(torch.Tensor), (pixels / 255 - 0.5) / 0.5)
    assert dls.vocab == ("0", "1", "2")
    assert [dls.vocab[int(i)] for i in y] == [i.partition("/")[0] for i in batch.ids]


def test_one_batch_is_of_the_part_that_was_asked_for(dls: DataLoaders) -> None:
    assert dls.prepared is not None
    parts = {i: p for t in dls.prepared.tables() for i, p in zip(t["id"].to_pylist(), t["part"].to_pylist(), strict=True)}
    for part in (TRAIN, VALID):
        assert {parts[i] for i in dls.one_batch(part).ids} == {part}


@pytest.mark.parametrize("part", [TRAIN, VALID])
def test_decode_batch_gives_back_the_stored_pixels_and_names(dls: DataLoaders, part: int) -> None:
    batch = dls.one_batch(part)
    samples = dls.decode_batch(batch)
    assert len(samples) == 16
    for row_id, (pixels, label) in zip(batch.ids, samples, strict=True):
        assert type(pixels) is TensorImage
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.numpy(), stored(dls)[row_id])
        assert label == row_id.partition("/")[0]


def test_grey_pictures(digits_block: DataBlock, few_digits: Path) -> None:
    block = replace(digits_block, blocks=(ImageBlock(PILImageBW), CategoryBlock()), batch_tfms=())
    dls = block.dataloaders(few_digits, batch_size=16)
    batch = dls.one_batch()
    assert type(batch[0]) is TensorImageBW
    assert tuple(batch[0].shape) == (16, 1, 16, 16)
    assert type(dls.decode_batch(batch)[0][0]) is TensorImageBW
    assert isinstance(dls.show_batch(), Figure)


def test_train_transforms_act_on_training_batches_only(digits_block: DataBlock, few_digits: Path) -> None:
    class Blank(Transform):
        split_idx = TRAIN

        def encodes(self, x: TensorImage) -> torch.Tensor:
            return torch.zeros_like(x)

    dls = replace(digits_block, batch_tfms=Blank()).dataloaders(few_digits, batch_size=16)
    assert not dls.one_batch(TRAIN)[0].any()
    assert dls.one_batch(VALID)[0].any()


@pytest.mark.parametrize("n", [1, 5, 9])
def test_show_batch(dls: DataLoaders, n: int) -> None:
    figure = dls.show_batch(n=n)
    assert isinstance(figure, Figure)
    shown = [axis for axis in figure.axes if axis.get_images()]
    samples = dls.decode_batch(dls.one_batch(TRAIN))[:n]
    assert [axis.get_title() for axis in shown] == [label for _, label in samples]
    for axis, (pixels, _) in zip(shown, samples, strict=True):
        assert np.array_equal(axis.get_images()[0].get_array(), pixels.numpy().transpose(1, 2, 0))


def test_an_input_is_encoded_as_it_was_for_training(dls: DataLoaders, few_digits: Path) -> None:
    """A path, the same bytes and the same picture: each is what was stored."""
    assert dls.encode is not None
    row_id, pixels = next(iter(stored(dls).items()))
    file = few_digits / row_id
    for item in (file, file.read_bytes(), PILImage.create(file)):
        (tensor,) = input_tensors(dls.encode, item)
        assert type(tensor) is TensorImage
        assert np.array_equal(tensor.numpy(), pixels)


def test_sharded(dls: DataLoaders) -> None:
    shares = [dls.shard(rank, 2) for rank in range(2)]
    for part in ("train", "valid"):
        whole = Counter(i for batch in getattr(dls, part) for i in batch.ids)
        assert Counter(i for share in shares for batch in getattr(share, part) for i in batch.ids) == whole
    assert shares[0].vocab == dls.vocab
    assert shares[0].batch_tfms == dls.batch_tfms


def test_they_travel(dls: DataLoaders) -> None:
    arrived = pickle.loads(pickle.dumps(dls))  # noqa: S301  our own bytes
    assert arrived.vocab == dls.vocab
    assert torch.equal(arrived.one_batch(TRAIN)[0], dls.one_batch(TRAIN)[0])


def test_repr_says_how_many(dls: DataLoaders) -> None:
    assert dls.train.n + dls.valid.n == 120  # type: ignore[attr-defined]
    assert repr(dls).startswith(f"DataLoaders(train={dls.train.n} rows, valid={dls.valid.n} rows, ")  # type: ignore[attr-defined]


# --- from something else -----------------------------------------------------------------------------------------------

BATCHES = [(torch.full((4, 2), float(k)), torch.arange(4) + k) for k in range(3)]


def test_a_list_of_batches() -> None:
    dls = DataLoaders(BATCHES, BATCHES[1:])
    assert torch.equal(dls.one_batch(TRAIN)[0], BATCHES[0][0])
    assert torch.equal(dls.one_batch(VALID)[0], BATCHES[1][0])
    assert [int(y) for _, y in dls.decode_batch(BATCHES[1])] == [1, 2, 3, 4]
    assert dls.vocab == ()
    assert repr(dls) == "DataLoaders(train=list, valid=list, batch_tfms=nothing)"


def test_a_list_of_batches_is_transformed() -> None:
    images = [(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8).as_subclass(TensorImage), torch.tensor([0, 1]))]
    dls = DataLoaders(images, batch_tfms=Pipeline.of(IntToFloatTensor()))
    x, y = dls.one_batch(TRAIN)
    assert not isinstance((x, y), Batch)
    assert bool((x == 1).all())
    assert y.tolist() == [0, 1]


def test_a_torch_dataloader() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    x, y = DataLoaders(torch.utils.data.DataLoader(data, batch_size=4)).one_batch(TRAIN)
    assert torch.equal(x, torch.arange(8.0).view(4, 2))
    assert y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("valid", ["feed", "list"])
def test_what_cannot_be_divided(dls: DataLoaders, valid: Any) -> None:
    with pytest.raises(TypeError, match="not from list"):
        DataLoaders(BATCHES, dls.valid if valid == "feed" else BATCHES).shard(0, 2)


def test_what_cannot_be_divided_is_named(dls: DataLoaders) -> None:
    """It is the validation part that is in the way."""
    with pytest.raises(TypeError, match="not from list"):
        DataLoaders(dls.train, BATCHES).shard(0, 2)


def test_a_batch_is_as_large_as_asked(digits_block: DataBlock, few_digits: Path) -> None:
    assert len(replace(digits_block, item_tfms=Resize(4)).dataloaders(few_digits, batch_size=10).one_batch()[0]) == 10


# --- drawn in another way ----------------------------------------------------------------------------------------------


def test_new_draws_the_same_data_in_another_way(dls: DataLoaders) -> None:
    other = dls.new(batch_size=7, drop_last=True, seed=5)
    assert {len(b[0]) for b in other.train} == {7}
    assert next(iter(other.valid))[0].shape[0] == 7
    assert sum(len(b[0]) for b in other.valid) == sum(len(b[0]) for b in dls.valid)
    assert other.train.seed == 5  # type: ignore[attr-defined]
    assert next(iter(dls.train))[0].shape[0] == 16


def test_added_transforms_come_in_their_order(dls: DataLoaders) -> None:
    class First(Transform, registered=False):
        order = -5

        def encodes(self, x: TensorImage) -> torch.Tensor:
            return torch.full_like(x, 255)

    more = dls.add_tfms(First())
    assert bool((more.one_batch(TRAIN)[0] == 1).all())  # then scaled and normalised
    assert not bool((dls.one_batch(TRAIN)[0] == 1).all())


def test_new_with_a_word_that_is_none(dls: DataLoaders) -> None:
    with pytest.raises(TypeError, match="'bs' is not a setting of a feed; there are batch_size"):
        dls.new(bs=7)
    with pytest.raises(TypeError, match="not from list"):
        DataLoaders(BATCHES).new(batch_size=2)


def test_lanes_are_chosen_by_memory_and_said(
    digits_block: DataBlock, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = digits_block.dataloaders(few_digits, batch_size=16)
    assert not resident.train.lanes  # type: ignore[attr-defined]
    assert "resident, any order" in resident.plan_text
    monkeypatch.setattr("blocks.prepared.memory", lambda: 10_000)
    larger = digits_block.dataloaders(few_digits, batch_size=16)
    assert larger.train.lanes  # type: ignore[attr-defined]
    assert larger.valid.lanes  # type: ignore[attr-defined]
    assert "in lanes" in larger.plan_text
    assert sorted(i for b in larger.train for i in b.ids) == sorted(i for b in resident.train for i in b.ids)


def test_weighted_balances_the_classes(dls: DataLoaders) -> None:
    train: Any = dls.train
    rare = [i for i in train.ids() if i.startswith("2/")][5:]
    unbalanced = dls.weighted([0.0 if i in rare else 1.0 for i in train.ids()])
    drawn = [i for b in unbalanced.train for i in b.ids]
    assert not set(drawn) & set(rare)

    counts: Counter[str] = Counter()
    balanced: Any = dls.weighted().train
    for epoch in range(40):
        balanced.set_epoch(epoch)
        counts.update(i.partition("/")[0] for b in balanced for i in b.ids)
    total = sum(counts.values())
    assert all(abs(n / total - 1 / 3) < 4 * (2 / 9 / total) ** 0.5 for n in counts.values())


def test_class_weights_are_one_over_the_size_of_the_class(dls: DataLoaders) -> None:
    train: Any = dls.train
    sizes = Counter(i.partition("/")[0] for i in train.ids())
    assert class_weights(train).tolist() == [1 / sizes[i.partition("/")[0]] for i in train.ids()]
    with pytest.raises(TypeError, match="the last column is TensorImage"):
        class_weights(_FirstColumn(train))  # type: ignore[arg-type]


class _FirstColumn:
    def __init__(self, feed: Any):
        self.column = lambda number: feed.column(0)


# --- new items ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_labels", [False, True])
def test_new_items_are_encoded_as_the_validation_part(dls: DataLoaders, few_digits: Path, with_labels: bool) -> None:
    valid: Any = dls.valid
    items = [few_digits / i for i in valid.ids()][::-1]
    batches = dls.test(items, with_labels=with_labels)
    assert (batches.n, len(batches)) == (len(items), -(-len(items) // 16))
    found = list(batches)
    assert [i for b in found for i in b.ids] == [str(item) for item in items]
    assert {len(b) for b in found} == {2 if with_labels else 1}
    pixels = torch.cat([b[0] for b in found])
    assert type(pixels) is TensorImage
    assert np.array_equal(pixels.numpy(), np.stack([stored(dls)[i] for i in valid.ids()[::-1]]))
    if with_labels:
        assert [dls.vocab[int(y)] for b in found for y in b[1]] == [item.parent.name for item in items]
    samples = dls.decode_batch(dls.batch_tfms(tuple(found[0]), split_idx=VALID))
    assert np.array_equal(samples[0][0], pixels[0])
    assert all(len(s) == (2 if with_labels else 1) for s in samples)


def test_new_items_that_are_no_files(digits_block: DataBlock, few_digits: Path, dls: DataLoaders) -> None:
    items = [(few_digits / "0" / "0000.png").read_bytes()] * 3
    (batch,) = dls.test(items)
    assert batch.ids == ["0", "1", "2"]
    assert batch[0].shape == (3, 3, 16, 16)
    assert list(dls.test([])) == []


def test_a_new_item_that_cannot_be_read_is_named(dls: DataLoaders, few_digits: Path) -> None:
    with pytest.raises(DataError, match=r"the item .*nothing\.png cannot be read"):
        list(dls.test([few_digits / "0" / "0000.png", few_digits / "nothing.png"]))


def test_new_items_need_a_datablock() -> None:
    with pytest.raises(TypeError, match="only data made by a DataBlock"):
        DataLoaders(BATCHES).test([1])


def test_random_batch_transforms_draw_by_the_keys_of_the_rows(digits_block: DataBlock, few_digits: Path) -> None:
    @dataclass
    class Brighter(RandTransform, registered=False):
        order = 99  # after the pixels became floats

        def draw(self, x: Any, keys: torch.Tensor) -> torch.Tensor:
            return uniform(keys, 3)[:, None, None, None]

        def encodes(self, x: TensorImage, drawn: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x, dtype=torch.float32) + drawn

    dls = replace(digits_block, batch_tfms=Brighter()).dataloaders(few_digits, batch_size=16, seed=2)
    batch = dls.one_batch(TRAIN)
    drawn = uniform(sample_keys(2, 0, batch.samples), 3)
    assert torch.equal(batch[0][:, 0, 0, 0].as_subclass(torch.Tensor), drawn)
    assert torch.equal(dls.one_batch(VALID)[0], next(iter(dls.valid))[0] / 255)
    plain = DataLoaders([(batch[0], batch[1])], batch_tfms=dls.batch_tfms).one_batch(TRAIN)
    assert plain[0][:, 0, 0, 0].tolist() == uniform(sample_keys(0, 0, np.arange(16)), 3).tolist()


def test_new_rows_of_a_table() -> None:
    frame = pd.DataFrame({"size": np.arange(40.0), "kind": ["a", "b"] * 20})
    block = DataBlock((RegressionBlock(), CategoryBlock()), get_x=ColReader("size"), get_y=ColReader("kind"))
    dls = block.dataloaders(frame, batch_size=8)
    new = frame[["size"]].iloc[::-1]
    (first, *_) = batches = list(dls.test(new))
    assert first.ids == [str(i) for i in range(8)]
    assert torch.cat([b[0] for b in batches]).tolist() == new["size"].tolist()
    (_, y), *_ = dls.test(frame, with_labels=True)
    assert [dls.vocab[int(i)] for i in y] == ["a", "b"] * 4


def test_a_block_brings_settings_of_the_feed(few_digits: Path, digits_block: DataBlock) -> None:
    """Of each block its own padding; the other settings hold for all of the data."""
    labels = TransformBlock(type_tfms=(lambda n: torch.arange(n).as_subclass(TensorText),), dls_kwargs={"pad": -1})
    numbers = TransformBlock(type_tfms=(lambda n: torch.arange(n).as_subclass(TensorText),), dls_kwargs={"drop_last": True})
    dls = DataBlock((numbers, labels), get_items=lambda source: range(20)).dataloaders("numbers", batch_size=4)
    assert dls.train.drop_last  # type: ignore[attr-defined]
    x, y = next(iter(dls.train))
    assert set(x[y == -1].tolist()) == {1}
    assert bool((y == -1).any())


def test_what_needs_all_rows_is_never_in_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself: a person may not ask for both."""
    monkeypatch.setattr("blocks.prepared.memory", lambda: 10)
    texts = TransformBlock(type_tfms=(lambda n: torch.arange(n).as_subclass(TensorText),), dls_kwargs={"sort_by_length": True})
    dls = DataBlock((texts, RegressionBlock()), get_items=lambda source: range(20)).dataloaders("numbers", batch_size=4)
    assert not dls.train.lanes  # type: ignore[attr-defined]
    assert "resident, any order: the store is larger than memory" in dls.plan_text
    assert next(iter(dls.train))[0].shape[1] == max(x.shape[1] for x, _ in dls.train)
