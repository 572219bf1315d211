"""Random item transforms of pictures: what is stored, and what is made of it each epoch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks import (
    CategoryBlock,
    DataBlock,
    DataError,
    DataLoaders,
    FlipItem,
    ImageBlock,
    MaskBlock,
    PILImage,
    PILImageBW,
    PILMask,
    RandomResizedCrop,
    Resize,
    TensorImage,
    TensorMask,
    prepare,
)
from blocks.dataloaders import input_tensors
from blocks.encode import from_stored, to_stored


def batches(dls: DataLoaders, epoch: int) -> dict[str, torch.Tensor]:
    dls.train.set_epoch(epoch)  # type: ignore[attr-defined]
    return {row_id: x for batch in dls.train for row_id, x in zip(batch.ids, batch[0], strict=True)}


def test_a_random_size_keeps_the_encoded_files(digits_block: DataBlock, few_digits: Path) -> None:
    block = digits_block.new(item_tfms=RandomResizedCrop(12))
    plan = block.plan(few_digits)
    assert "x: the_item -> the encoded file" in plan.explain()
    assert "x: OpenImage(mode='RGB'); RandomResizedCrop(" in plan.explain()
    dls = block.dataloaders(few_digits, batch_size=16, seed=3)
    assert dls.prepared is not None
    for table in dls.prepared.tables():
        for row_id, content in zip(table["id"].to_pylist(), table["x"].to_pylist(), strict=True):
            assert content == (few_digits / row_id).read_bytes()
    first, second = batches(dls, 0), batches(dls, 1)
    assert {x.shape for x in first.values()} == {(3, 12, 12)}
    assert {type(x) for x in first.values()} == {TensorImage}
    assert any(not torch.equal(first[i], second[i]) for i in first)
    again = batches(block.dataloaders(few_digits, batch_size=7, seed=3), 0)
    assert all(torch.equal(first[i], again[i]) for i in first)


def test_validation_and_prediction_are_not_random(digits_block: DataBlock, few_digits: Path) -> None:
    dls = digits_block.new(item_tfms=RandomResizedCrop(12)).dataloaders(few_digits, batch_size=64)
    assert dls.encode is not None
    for batch in dls.valid:
        for row_id, x in zip(batch.ids, batch[0], strict=True):
            assert torch.equal(x, input_tensors(dls.encode, few_digits / row_id)[0])


def test_classes_are_balanced_where_files_are_kept(digits_block: DataBlock, few_digits: Path) -> None:
    """Only the column that is asked for is read: encoded files are no column of a batch, and pictures may not fit in memory."""
    dls = digits_block.new(item_tfms=RandomResizedCrop(12)).dataloaders(few_digits, batch_size=16)
    assert len(dls.train.column(-1)) == dls.train.n  # type: ignore[attr-defined]
    assert sum(len(batch[0]) for batch in dls.weighted().train) == dls.train.n  # type: ignore[attr-defined]


def test_pictures_of_one_size_are_kept_as_pixels(digits_block: DataBlock, few_digits: Path) -> None:
    block = digits_block.new(item_tfms=[Resize(16), FlipItem(p=1.0)])
    dls = block.dataloaders(few_digits, batch_size=16)
    plain = prepare(digits_block.plan(few_digits))
    assert dls.prepared is not None
    assert "x: the_item -> OpenImage" in dls.plan_text
    assert dls.prepared.tables()[0]["x"].type.shape == [3, 16, 16]
    pixels = {i: x for t in plain.tables() for i, x in zip(t["id"].to_pylist(), t["x"].to_pylist(), strict=True)}
    for row_id, x in batches(dls, 0).items():
        assert np.array_equal(x.flip(-1).flatten(), pixels[row_id])


def test_a_mask_of_random_size_goes_with_its_picture(few_digits: Path) -> None:
    block = DataBlock(
        (ImageBlock(), MaskBlock()),
        get_items=lambda source: sorted(source.rglob("*.png"))[:20],
        item_tfms=RandomResizedCrop(12),
    )
    dls = block.dataloaders(few_digits, batch_size=5)
    assert dls.prepared is not None
    assert dls.prepared.tables()[0]["y"].type == dls.prepared.tables()[0]["x"].type
    y = next(iter(dls.train))[1]
    assert type(y) is TensorMask
    assert tuple(y.shape) == (5, 12, 12)


def test_what_has_no_file_cannot_be_kept(digits_block: DataBlock, few_digits: Path) -> None:
    block = digits_block.new(item_tfms=RandomResizedCrop(12), get_x=lambda item: np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"gives ndarray, not a path.*Add Resize"):
        block.dataloaders(few_digits)


def test_a_file_that_is_no_picture_is_found_when_it_is_prepared(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    for i, file in enumerate(sorted(few_digits.rglob("*.png"))[::20]):
        (tmp_path / "a" / f"{i}.png").write_bytes(file.read_bytes() if i else b"none")
    block = replace(digits_block, item_tfms=RandomResizedCrop(12), blocks=(ImageBlock(), CategoryBlock(vocab=("a", "b"))))
    with pytest.raises(DataError, match=r"1 rows cannot be read, 0 are allowed:\n  a/0\.png: not a readable image"):
        block.dataloaders(tmp_path)


@pytest.mark.parametrize("kind", [PILImage, PILImageBW, PILMask])
def test_a_picture_comes_back_as_it_was(kind: Any, few_digits: Path) -> None:
    image = kind.create(next(few_digits.rglob("*.png")))
    back = from_stored(to_stored(image))
    assert type(back) is kind
    assert np.array_equal(np.asarray(back), np.asarray(image))
