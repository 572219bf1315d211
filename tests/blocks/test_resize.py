"""Sizes on the item side: pictures, masks, points and boxes of a sample stay together, at random by the key only."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blocks import (
    CropPad,
    DihedralItem,
    FlipItem,
    PILImage,
    PILImageBW,
    PILMask,
    Pipeline,
    PointBlock,
    RandomCrop,
    RandomResizedCrop,
    RatioResize,
    Resize,
    TensorBBox,
    TensorMask,
    TensorPoint,
    ToTensor,
)
from blocks.draws import sample_keys
from blocks.resize import in_own_pixels, turned
from blocks.tensors import as_plain

SIZED = {
    "crop": Resize((20, 24)),
    "pad": Resize((40, 20), method="pad", pad_mode="border"),
    "pad with zeros": Resize((40, 20), method="pad", pad_mode="zeros"),
    "squish": Resize((24, 20), method="squish"),
    "CropPad smaller": CropPad((24, 40)),
    "CropPad larger": CropPad((50, 70), pad_mode="border"),
    "RatioResize": RatioResize(40),
}
RANDOM = {
    "RandomCrop": RandomCrop(24),
    "RandomCrop larger": RandomCrop((20, 80)),
    "RandomResizedCrop": RandomResizedCrop((20, 24), min_scale=0.5),
    "FlipItem": FlipItem(p=0.5),
    "DihedralItem": DihedralItem(),
}
ALL: dict[str, Any] = SIZED | RANDOM


def key(n: int = 0) -> torch.Tensor:
    return sample_keys(0, 0, np.array([n]))


def sample(width: int = 64, height: int = 48, x: float = 30, y: float = 20) -> tuple[Any, ...]:
    """A picture with a soft spot, the mask and the box around it, the point in its middle."""
    across, down = np.arange(width) + 0.5 - x, np.arange(height)[:, None] + 0.5 - y
    spot = np.exp(-(across**2 + down**2) / (2 * 3**2))
    grey = PILImageBW.create((spot * 255).astype(np.uint8))
    mask = PILMask.create((spot > 0.5).astype(np.uint8))
    return grey, mask, TensorPoint.create([[x, y]]), TensorBBox.create([[x - 4, y - 4, x + 4, y + 4]])


def middle(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(float)
    return np.array([(pixels.sum(axis) * (np.arange(pixels.shape[1 - axis]) + 0.5)).sum() for axis in (0, 1)]) / pixels.sum()


@pytest.mark.parametrize("name", ALL)
def test_everything_of_a_sample_moves_together(name: str) -> None:
    for n in range(6):
        pipeline = Pipeline.of([ALL[name]])
        image, mask, point, box = pipeline(sample(), split_idx=0, keys=key(n))
        assert [type(v) for v in (image, mask, point, box)] == [PILImageBW, PILMask, TensorPoint, TensorBBox]
        assert image.size == mask.size
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
        (x, y), (left, top, right, bottom) = point[0].tolist(), box[0].tolist()
        assert left < x < right
        assert top < y < bottom
        if 8 < x < image.width - 8 and 8 < y < image.height - 8:
            assert middle(image) == pytest.approx([x, y], abs=0.4)
            assert middle(mask) == pytest.approx([x, y], abs=0.8)


@pytest.mark.parametrize("name", ["crop", "pad", "RandomCrop", "RandomResizedCrop", "DihedralItem"])
def test_tensors_of_bytes_are_seen_as_their_pictures_are(name: str) -> None:
    """What was stored for the steps of each epoch goes on as what it was."""
    image, mask, *_ = sample()
    seen = Pipeline.of([ALL[name]])((image, mask), split_idx=0, keys=key())
    tensors = Pipeline.of([ALL[name]])(ToTensor()((image, mask)), split_idx=0, keys=key())
    assert isinstance(tensors[1], TensorMask)
    for a, b in zip(ToTensor()(seen), tensors, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b)


@pytest.mark.parametrize(("width", "height"), [(30, 10), (10, 30), (7, 7), (64, 48), (1, 50)])
@pytest.mark.parametrize("method", ["crop", "pad", "squish"])
def test_resize_gives_the_size_whatever_comes(width: int, height: int, method: str) -> None:
    seen = Resize((12, 20), method=method)(PILImage.create(Image.new("RGB", (width, height), "red")))
    assert type(seen) is PILImage
    assert seen.size == (20, 12)


def test_methods_of_resize() -> None:
    wide = Image.new("L", (30, 10), 0)
    wide.paste(200, (10, 0, 20, 10))
    wide = PILImageBW.of(wide)
    crop, pad, squish = (np.asarray(Resize(10, method=m, pad_mode="zeros")(wide)) for m in ("crop", "pad", "squish"))
    assert (crop == 200).all()
    assert (pad[[0, 1, 8, 9]] == 0).all()
    assert (pad[4:6, 4:6] == 200).all()
    assert (squish[:, 4:6] == 200).all()
    assert (squish[:, [0, 1, 8, 9]] == 0).all()


@pytest.mark.parametrize(
    ("pad_mode", "expected"), [("zeros", [0, 1, 2, 0]), ("border", [1, 1, 2, 2]), ("reflection", [2, 1, 2, 1])]
)
def test_what_lies_beyond_the_picture(pad_mode: str, expected: list[int]) -> None:
    padded = CropPad((1, 4), pad_mode=pad_mode)(PILImageBW.create(np.array([[1, 2]], np.uint8)))
    assert np.asarray(padded).tolist() == [expected]


def test_ratio_resize_keeps_the_shape() -> None:
    assert RatioResize(32)(PILImage.create(Image.new("RGB", (64, 48)))).size == (32, 24)
    assert RatioResize(32)(PILImage.create(Image.new("RGB", (48, 64)))).size == (24, 32)


def test_two_pictures_of_a_sample_are_seen_by_their_own_sizes() -> None:
    first, second = PILImage.create(Image.new("RGB", (30, 10))), PILImage.create(Image.new("RGB", (64, 48)))
    assert [i.size for i in Resize(16)((first, second))] == [(16, 16)] * 2
    assert [i.size for i in RandomResizedCrop(16)(((first, second),), keys=key())[0]] == [(16, 16)] * 2


def test_a_value_without_a_picture_passes() -> None:
    assert Resize(8)(3) == 3
    assert RandomCrop(8)((3, "label"), keys=key()) == (3, "label")


# --- at random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
def test_by_the_key_and_nothing_else(name: str) -> None:
    views = {np.asarray(RANDOM[name](sample(), keys=key(n))[0]).tobytes() for n in range(20)}
    assert len(views) > 1
    again = [np.asarray(RANDOM[name](sample(), keys=key(3))[0]) for _ in range(2)]
    assert np.array_equal(*again)


@pytest.mark.parametrize("split_idx", [1, None])
def test_outside_training_the_middle(split_idx: int | None) -> None:
    wide = Image.new("L", (30, 10), 0)
    wide.paste(200, (10, 0, 20, 10))
    for t in (RandomCrop(8), RandomResizedCrop(8, ratio=(1, 1))):
        seen = Pipeline.of(t)(PILImageBW.of(wide.copy()), split_idx=split_idx, keys=key())
        assert (np.asarray(seen) == np.full((8, 8), 200)).all()
    assert np.array_equal(Pipeline.of([FlipItem(p=1)])(wide, split_idx=split_idx), wide)


def test_where_crops_lie() -> None:
    positions = PILImageBW.create(np.arange(256, dtype=np.uint8).reshape(16, 16))
    corners = [int(np.asarray(RandomCrop(8)(positions, keys=key(n)))[0, 0]) for n in range(300)]
    assert {c % 16 for c in corners} == {c // 16 for c in corners} == set(range(9))


def test_every_way_of_a_dihedral() -> None:
    positions = PILImageBW.create(np.arange(6, dtype=np.uint8).reshape(2, 3))
    point = TensorPoint.create([[0.5, 0.5]])  # the middle of pixel 0
    seen = {}
    for way in range(8):
        pixels, (x, y) = np.asarray(turned(positions, (2, 3), way)), turned(point, (2, 3), way)[0].tolist()
        assert pixels[int(y), int(x)] == 0
        seen[pixels.tobytes(), pixels.shape] = way
    assert len(seen) == 8
    drawn = {int(DihedralItem().draw(positions, key(n))[1]) for n in range(100)}
    assert drawn == set(range(8))


def test_boxes_keep_their_corners_in_order() -> None:
    box = TensorBBox.create([[1, 2, 3, 5], [0, 0, 1, 1]])
    for way in range(8):
        left, top, right, bottom = as_plain(turned(box, (10, 20), way)).unbind(-1)
        assert (left < right).all()
        assert (top < bottom).all()
    assert turned(TensorBBox.create([]), (10, 20), 3).shape == (0, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resize(8, method="stretch"),
        lambda: Resize(8, pad_mode="mirror"),
        lambda: CropPad(0),
        lambda: CropPad(8, pad_mode=""),
        lambda: RatioResize(0),
        lambda: RandomCrop((1, 2, 3)),
        lambda: RandomResizedCrop(8, min_scale=2),
        lambda: FlipItem(p=2),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"not "):
        make()


def test_a_picture_far_larger_is_seen_as_all_its_pixels_are() -> None:
    """PIL skims over most of them, and comes to the same."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)).resize((1600, 1200))
    quick = np.asarray(Resize(100, method="squish")(PILImage.create(noise))).astype(float)
    slow = np.asarray(noise.resize((100, 100), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(quick - slow).mean() < 3


@pytest.mark.parametrize("method", ["crop", "pad", "squish"])
def test_points_come_back_to_the_pixels_of_their_own_picture(method: str) -> None:
    points = TensorPoint.create([[30, 20], [45, 31]])
    tfms = Pipeline.of([Resize((48, 32), method=method), *PointBlock().item_tfms])
    _, scaled = tfms((PILImage.of(Image.new("RGB", (80, 50))), points))
    torch.testing.assert_close(in_own_pixels(scaled, tfms, (50, 80)), points, rtol=0, atol=1e-3)
