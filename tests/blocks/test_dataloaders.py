"""DataLoaders: batches as the model sees them, back to what a person sees, and other iterables in the place of ours."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from blocks import (
    Batch,
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IntToFloatTensor,
    PILImage,
    PILImageBW,
    Pipeline,
    Resize,
    TensorCategory,
    TensorImage,
    TensorImageBW,
    Transform,
)
from blocks.dataloaders import input_tensor
from blocks.shards import as_array
from blocks.show import show_samples
from blocks.splits import TRAIN, VALID


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


def test_show_samples_with_titles_and_of_other_things() -> None:
    figure = show_samples([("some text", 1), ("more", 2)], titles=["a", "b"])
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["some text", "more"]


def test_an_input_is_encoded_as_it_was_for_training(dls: DataLoaders, few_digits: Path) -> None:
    """A path, the same bytes and the same picture: each is what was stored."""
    assert dls.encode is not None
    row_id, pixels = next(iter(stored(dls).items()))
    file = few_digits / row_id
    for item in (file, file.read_bytes(), PILImage.create(file)):
        tensor = input_tensor(dls.encode, item)
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
