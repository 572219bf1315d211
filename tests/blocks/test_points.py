"""Points and boxes: scaled by their picture and back, cut off at the border, with their labels."""

from typing import Any

import pytest
import torch
from PIL import Image

from blocks import (
    BBoxBlock,
    DataError,
    PILImage,
    Pipeline,
    PointBlock,
    PointScaler,
    Resize,
    TensorBBox,
    TensorBBoxLabel,
    TensorImage,
    TensorPoint,
    ToTensor,
)
from blocks.points import ClipBoxes

PICTURE = PILImage.create(Image.new("RGB", (40, 20)))


def test_points_become_parts_of_the_picture() -> None:
    corners = TensorPoint.create([[0, 0], [40, 20], [20, 10], [10, 15]])
    _, scaled = PointScaler()((PICTURE, corners))
    assert type(scaled) is TensorPoint
    assert scaled.tolist() == [[-1, -1], [1, 1], [0, 0], [-0.5, 0.5]]
    image, back = PointScaler().decode((ToTensor()(PICTURE), scaled))
    assert type(image) is TensorImage
    assert torch.equal(back, corners)


def test_other_ways_to_give_points() -> None:
    _, scaled = PointScaler(y_first=True)((PICTURE, TensorPoint.create([[5, 10]])))
    assert scaled.tolist() == [[-0.5, -0.5]]
    _, scaled = PointScaler(do_scale=False)((PICTURE, TensorPoint.create([[0.25, -0.5]])))
    assert scaled.tolist() == [[0.25, -0.5]]


def test_the_size_given_with_the_points_counts_where_there_is_no_picture() -> None:
    assert PointScaler()(TensorPoint.create([[10, 10]], img_size=(40, 20))).tolist() == [[-0.5, 0]]
    with pytest.raises(DataError, match="none in the sample"):
        PointScaler()(TensorPoint.create([[10, 10]]))


@pytest.mark.parametrize(
    ("kind", "given", "shape"),
    [
        (TensorPoint, [1, 2], (1, 2)),
        (TensorPoint, [[1, 2], [3, 4]], (2, 2)),
        (TensorPoint, [], (0, 2)),
        (TensorBBox, [[1, 2, 3, 4]], (1, 4)),
        (TensorBBox, [], (0, 4)),
        (TensorBBox, torch.zeros(3, 4, dtype=torch.int64), (3, 4)),
    ],
)
def test_created_from_numbers(kind: Any, given: Any, shape: tuple[int, ...]) -> None:
    created = kind.create(given)
    assert type(created) is kind
    assert created.dtype == torch.float32
    assert tuple(created.shape) == shape


@pytest.mark.parametrize(("kind", "given"), [(TensorPoint, [1, 2, 3]), (TensorBBox, [[1, 2], [3, 4]]), (TensorBBox, [1] * 6)])
def test_created_from_too_few_numbers(kind: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} takes rows of"):
        kind.create(given)


def test_created_points_do_not_share_memory() -> None:
    given = torch.zeros(2, 2)
    TensorPoint.create(given).add_(1)
    assert given.sum() == 0


def test_boxes_are_cut_off_and_go_with_their_labels() -> None:
    boxes = TensorBBox.create([[0, 0, 20, 20], [30, 5, 60, 10], [50, 0, 60, 10]])
    labels = torch.tensor([1, 2, 3]).as_subclass(TensorBBoxLabel)
    block = BBoxBlock()
    _, clipped, kept = Pipeline.of(block.item_tfms)((PICTURE, boxes, labels))
    assert type(clipped) is TensorBBox
    assert type(kept) is TensorBBoxLabel
    assert clipped.tolist() == [[-1, -1, 0, 1], [0.5, -0.5, 1, 0]]
    assert kept.tolist() == [1, 2]


def test_boxes_alone_and_all_gone() -> None:
    assert ClipBoxes()(torch.tensor([[2.0, 2, 3, 3]]).as_subclass(TensorBBox)).shape == (0, 4)
    with pytest.raises(DataError, match="1 boxes but 2 labels"):
        ClipBoxes()((TensorBBox.create([0, 0, 1, 1]), torch.zeros(2).as_subclass(TensorBBoxLabel)))


def test_points_follow_a_resized_picture() -> None:
    block = PointBlock()
    tfms = Pipeline.of([Resize(20), *block.item_tfms])  # cuts 10 off at either side
    point = Pipeline.of(block.type_tfms)([[15, 5]])
    image, scaled = tfms((PICTURE, point))
    assert image.size == (20, 20)
    assert scaled.tolist() == [[-0.5, -0.5]]
