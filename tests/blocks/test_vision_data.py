"""Pictures with masks, points and boxes from files to batches: prepared once, what is random drawn each epoch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blocks import (
    BBoxBlock,
    BBoxLblBlock,
    DataBlock,
    FlipItem,
    ImageBlock,
    IndexSplitter,
    IntToFloatTensor,
    MaskBlock,
    Normalize,
    PILImageBW,
    Pipeline,
    PointBlock,
    RandomResizedCrop,
    Resize,
    TensorBBox,
    TensorBBoxLabel,
    TensorImage,
    TensorImageBW,
    TensorMask,
    TensorPoint,
    aug_transforms,
    get_image_files,
)
from blocks.images import from_stored, to_stored
from blocks.tensors import as_plain

ROWS, WIDTH, HEIGHT = 12, 60, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one bright square each; beside each its mask, and one file that says where all squares are."""
    root = tmp_path_factory.mktemp("squares")
    (root / "ünïcode dir").mkdir()
    squares = {}
    for i in range(ROWS):
        left, top = 5 + 3 * i, 4 + 2 * (i % 7)
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[top : top + 12, left : left + 12] = 255
        name = f"ünïcode dir/{i:02}.png"
        Image.fromarray(pixels).save(root / name)
        Image.fromarray((pixels > 0).astype(np.uint8)).save(root / name.replace(".png", ".mask"), "PNG")
        squares[name] = [left, top, left + 12, top + 12]
    (root / "squares.json").write_text(json.dumps(squares))
    return root


def mask_of(file: Path) -> Path:
    return file.with_suffix(".mask")


def box_of(file: Path) -> list[float]:
    squares = json.loads((file.parents[1] / "squares.json").read_text())
    return squares[f"ünïcode dir/{file.name}"]


def middle_of(file: Path) -> list[float]:
    left, top, right, bottom = box_of(file)
    return [(left + right) / 2, (top + bottom) / 2]


def boxes_of(file: Path) -> list[list[float]]:
    beyond = [WIDTH + 1, 0, WIDTH + 9, 9]  # lies outside the picture
    return [box_of(file), beyond] if int(file.stem) % 2 else [box_of(file)] * 2


def labels_of(file: Path) -> list[str]:
    return ["square", "beyond"] if int(file.stem) % 2 else ["square", "twice"]


def block(*blocks: Any, **settings: Any) -> DataBlock:
    return DataBlock(blocks=blocks, get_items=get_image_files, splitter=IndexSplitter([0, 1, 2]), **settings)


def middles(pixels: torch.Tensor) -> torch.Tensor:
    """The centre of mass of each picture (rows, 1, height, width), as points (rows, 1, 2) of -1..1."""
    height, width = pixels.shape[-2:]
    x, y = (torch.arange(n) * 2 + 1 - n for n in (width, height))
    mass = pixels / pixels.sum(dim=(-1, -2), keepdim=True)
    return torch.stack([(mass * x).sum(dim=(-1, -2)) / width, (mass * y[:, None]).sum(dim=(-1, -2)) / height], dim=-1)


def test_pictures_and_masks(folder: Path) -> None:
    data = block(ImageBlock(PILImageBW), MaskBlock(["sky", "square"]), get_y=mask_of, item_tfms=Resize(32))
    dls = data.dataloaders(folder, batch_size=4)
    assert dls.vocab == ("sky", "square")
    image, mask = dls.one_batch()
    assert (type(image), type(mask)) == (TensorImageBW, TensorMask)
    assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert float(image.max()) == 1
    agree = (as_plain(image)[:, 0] > 0.5) == (as_plain(mask) == 1)
    assert agree.double().mean() > 0.97


def test_what_two_blocks_bring_runs_once(folder: Path) -> None:
    tfms = block(ImageBlock(), MaskBlock(div_mask=255), get_y=mask_of, item_tfms=Resize(32)).plan(folder).batch_tfms
    assert tfms == Pipeline.of(IntToFloatTensor(div_mask=255))


@pytest.mark.parametrize(
    "item_tfms",
    [Resize((40, 48)), [Resize((40, 48)), FlipItem()], RandomResizedCrop((40, 48), min_scale=0.9, ratio=(1.2, 1.8))],
    ids=["once", "stored pixels, then each epoch", "stored files, then each epoch"],
)
def test_points_follow_their_pictures(folder: Path, item_tfms: Any) -> None:
    data = block(ImageBlock(PILImageBW), PointBlock(), get_y=middle_of, item_tfms=item_tfms)
    dls = data.dataloaders(folder, batch_size=9)
    for epoch in range(2):
        dls.train.set_epoch(epoch)
        (batch,) = dls.train
        image, point = Pipeline.of([IntToFloatTensor()])(tuple(batch))
        assert (type(image), type(point)) == (TensorImageBW, TensorPoint)
        assert image.shape == (9, 1, 40, 48)
        whole = (as_plain(point).abs() < 0.6).all(dim=-1)[:, 0]
        assert (middles(as_plain(image)) - as_plain(point))[whole].abs().max() < 0.05


def test_boxes_of_different_numbers_fill_a_batch(folder: Path) -> None:
    data = block(ImageBlock(), BBoxBlock(), BBoxLblBlock(), get_y=[boxes_of, labels_of], n_inp=1, item_tfms=Resize(40))
    dls = data.dataloaders(folder, batch_size=9)
    assert dls.vocab == ("#na#", "beyond", "square", "twice")
    (batch,) = dls.train
    _, boxes, labels = batch
    assert (type(boxes), type(labels)) == (TensorBBox, TensorBBoxLabel)
    assert boxes.shape == (9, 2, 4)
    alone = as_plain(labels)[:, 1] == 0
    assert alone.sum() == sum(int(Path(i).stem) % 2 for i in batch.ids)
    assert (boxes[alone][:, 1] == 0).all()
    assert (boxes.abs() <= 1).all()


def test_the_usual_augmentation_of_a_training_batch(folder: Path) -> None:
    tfms = aug_transforms(max_lighting=0, size=32, pad_mode="zeros")
    data = block(ImageBlock(PILImageBW), PointBlock(), get_y=middle_of, item_tfms=Resize(40, method="squish"), batch_tfms=tfms)
    dls = data.dataloaders(folder, batch_size=9)
    (batch,) = dls.train
    moved, at = dls.batch_tfms(tuple(batch), split_idx=0, keys=batch.keys)
    assert torch.equal(moved, dls.one_batch(part=0)[0])
    assert type(moved) is TensorImageBW
    whole = (as_plain(at).abs() < 0.5).all(dim=-1)[:, 0]
    assert whole.sum() > 2
    assert (middles(as_plain(moved)) - as_plain(at))[whole].abs().max() < 0.05
    sized, _ = dls.one_batch()
    assert sized.shape == (3, 1, 32, 32)


def test_a_picture_is_stored_and_comes_back_as_what_it_was() -> None:
    for kind in (PILImageBW, *PILImageBW.__mro__[1:2]):
        picture = kind.create(np.arange(12, dtype=np.uint8).reshape(3, 4))
        stored = to_stored(picture)
        assert isinstance(stored, TensorImage)
        back = from_stored(stored)
        assert type(back) is kind
        assert np.array_equal(np.asarray(back), np.asarray(picture))


def test_a_corrupt_mask_is_a_bad_row(folder: Path, tmp_path: Path) -> None:
    def broken(file: Path) -> Any:
        return b"" if file.stem == "05" else mask_of(file)

    data = block(ImageBlock(), MaskBlock(), get_y=broken, item_tfms=Resize(32))
    with pytest.raises(ValueError, match=r"05\.png: not a readable image"):
        data.dataloaders(folder)
    assert data.dataloaders(folder, max_bad_rows=1).train.n == ROWS - 4


def test_decoded_and_shown(folder: Path) -> None:
    """Points and boxes in pixels of the picture as the model sees it, without what only filled up the batch."""
    data = block(ImageBlock(), BBoxBlock(), BBoxLblBlock(), get_y=[boxes_of, labels_of], n_inp=1, item_tfms=Resize(40))
    dls = data.dataloaders(folder, batch_size=9)
    batch = dls.one_batch(part=0)
    files = [folder / i for i in batch.ids]
    for (image, boxes, labels), file in zip(dls.decode_batch(batch), files, strict=True):
        assert image.dtype == torch.uint8
        left, top, right, bottom = box_of(file)
        expected = [max(left - 10, 0), top, min(right - 10, 40), bottom]
        assert labels == (["square"] if int(file.stem) % 2 else ["square", "twice"])
        torch.testing.assert_close(as_plain(boxes), torch.tensor([expected] * len(labels)).float(), rtol=0, atol=1e-3)
    (axis, *_) = dls.show_batch(n=2).axes
    assert len(axis.patches) == len(axis.texts) > 0
    masks = block(ImageBlock(), MaskBlock(), get_y=mask_of, item_tfms=Resize(32)).dataloaders(folder)
    assert len(masks.show_batch(n=1).axes[0].images) == 2
    points = block(ImageBlock(), PointBlock(), get_y=middle_of, item_tfms=Resize(40, method="squish")).dataloaders(folder)
    (image, point), file = points.decode_batch(points.one_batch())[0], folder / points.one_batch().ids[0]
    x, y = middle_of(file)
    assert point[0].tolist() == pytest.approx([x * 40 / WIDTH, y], abs=1e-3)


def test_normalize_learns_from_the_stored_training_rows(folder: Path) -> None:
    data = block(ImageBlock(PILImageBW), PointBlock(), get_y=middle_of, item_tfms=Resize(32), batch_tfms=Normalize())
    dls = data.dataloaders(folder, batch_size=9)
    (batch,) = dls.train
    pixels = as_plain(batch[0]).double() / 255
    normalize = dls.batch_tfms.transforms[-1]
    assert isinstance(normalize, Normalize)
    assert normalize.mean == pytest.approx([float(pixels.mean())], rel=1e-12)
    assert normalize.std == pytest.approx([float(pixels.std(correction=0))], rel=1e-12)
