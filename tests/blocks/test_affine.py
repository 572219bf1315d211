"""Random geometry of batches: the right places, everything of a sample together, each sample by its own key."""

import json
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from blocks import Pipeline, TensorBBox, TensorCategory, TensorImage, TensorMask, TensorPoint
from blocks.affine import AffineCoordTfm, Dihedral, Flip, RandomResizedCropGPU, Rotate, Warp, Zoom, random_crops
from blocks.augment import aug_transforms
from blocks.draws import sample_keys
from blocks.tensors import as_plain

ALL = {
    "Flip": Flip(p=0.5),
    "Dihedral": Dihedral(p=0.9),
    "Rotate": Rotate(40, p=0.9),
    "Zoom": Zoom(0.7, 1.5, p=0.9),
    "Warp": Warp(0.3, p=0.9),
    "RandomResizedCropGPU": RandomResizedCropGPU((20, 28), min_scale=0.4),
    "composed": Flip().compose_with(Rotate(30, p=1, size=(20, 28))).compose_with(Warp(p=1)).compose_with(Zoom(p=1)),
}


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, np.arange(n))


def pictures(n: int = 4, height: int = 12, width: int = 16, channels: int = 3) -> TensorImage:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, height, width, generator=generator).as_subclass(TensorImage)


def blobs(n: int, height: int, width: int) -> tuple[TensorImage, TensorPoint]:
    """Pictures of a soft spot each, and the points (-1..1) where they are."""
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(n, 1, 2, generator=generator) - 0.5
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    y = (torch.arange(height) + 0.5) * 2 / height - 1
    away = ((x - points[..., :1]) * width / 2)[:, :, None, :] ** 2 + ((y - points[..., 1:]) * height / 2)[:, :, :, None] ** 2
    return torch.exp(-away / (2 * 1.5**2)).as_subclass(TensorImage), points.as_subclass(TensorPoint)


def middle(pixels: torch.Tensor) -> torch.Tensor:
    """The centre of mass of each picture, (rows, 1, 2) in -1..1."""
    height, width = pixels.shape[-2:]
    mass = pixels / pixels.sum(dim=(-1, -2), keepdim=True)
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    y = (torch.arange(height) + 0.5) * 2 / height - 1
    return torch.stack([(mass * x).sum(dim=(-1, -2)), (mass * y[:, None]).sum(dim=(-1, -2))], dim=-1)


# --- where the pixels go -------------------------------------------------------------------------------------------------


def test_flip() -> None:
    x = pictures()
    flipped = Flip(p=1)(x, keys=keys(4))
    assert type(flipped) is TensorImage
    torch.testing.assert_close(as_plain(flipped), as_plain(x).flip(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("align_corners", [True, False])
def test_dihedral_is_each_of_the_eight(align_corners: bool) -> None:
    x = pictures(64, 8, 8)
    moved = as_plain(Dihedral(p=1, align_corners=align_corners)(x, keys=keys(64)))
    ways = [as_plain(x).rot90(k, (2, 3)).flip(d) for k in range(4) for d in ((), (-1,))]
    alike = torch.stack([(moved - way).abs().amax(dim=(1, 2, 3)) < 1e-4 for way in ways])
    assert (alike.sum(dim=0) == 1).all()
    assert (alike.sum(dim=1) > 0).all()


def test_rotate_as_kornia_does() -> None:
    from kornia.geometry.transform import rotate

    x = pictures(8, 12, 12)
    turn = Rotate(30, p=1, pad_mode="zeros")
    drawn = turn.draw(x, keys(8)).matrix
    angles = torch.rad2deg(torch.atan2(drawn[:, 0, 1], drawn[:, 0, 0]))
    assert angles.abs().max() <= 30
    assert angles.min() < -5 < 5 < angles.max()
    torch.testing.assert_close(
        as_plain(turn(x, keys=keys(8))),
        rotate(as_plain(x), -angles, padding_mode="zeros", align_corners=True),
        rtol=0,
        atol=1e-3,
    )


def test_a_turn_keeps_shapes_in_an_oblong_picture() -> None:
    """A circle stays one: the turn is of pixels, not of the square that coordinates make of the picture."""
    spot, _ = blobs(1, 20, 60)
    turned = as_plain(Rotate(45, p=1, pad_mode="zeros")(spot, keys=keys(1, seed=3)))
    assert float(turned.sum()) == pytest.approx(float(spot.sum()), rel=0.05)
    assert float((turned**2).sum()) == pytest.approx(float((as_plain(spot) ** 2).sum()), rel=0.1)


def test_zoom_stays_within_the_picture() -> None:
    matrix = Zoom(1.0, 2.0, p=1).matrix(keys(200), 10, 10)
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]) @ matrix.transpose(1, 2)
    assert corners.abs().max() <= 1 + 1e-6
    assert 0.5 <= float(matrix[:, 0, 0].min()) < 0.55
    assert 0.95 < float(matrix[:, 0, 0].max()) <= 1


def test_warp_moves_the_corners_as_kornia_would() -> None:
    from kornia.geometry.transform import get_perspective_transform

    matrix = Warp(0.4, p=1).matrix(keys(16), 10, 10)
    square = torch.tensor([[[-1.0, -1], [1, -1], [1, 1], [-1, 1]]]).expand(16, 4, 2)
    homogeneous = torch.cat([square, torch.ones(16, 4, 1)], dim=-1) @ torch.linalg.inv(matrix).transpose(1, 2)
    corners = homogeneous[..., :2] / homogeneous[..., 2:]
    expected = torch.linalg.inv(get_perspective_transform(square, corners))
    torch.testing.assert_close(matrix / matrix[:, 2:, 2:], expected / expected[:, 2:, 2:], rtol=1e-3, atol=1e-4)
    a, b = -(corners[:, 0, 0] + 1), -(corners[:, 0, 1] + 1)  # how far the upper left corner went out
    x, y = square.unbind(-1)
    told = torch.stack([x * (1 - y * a[:, None]), y * (1 - x * b[:, None])], dim=-1)
    torch.testing.assert_close(corners, told, rtol=0, atol=1e-4)
    assert 0.2 < float(torch.maximum(a.abs(), b.abs()).max()) <= 0.4 + 1e-5


def test_random_crops_lie_within_the_picture_and_its_ratio() -> None:
    left, top, width, height = random_crops(keys(500), 30, 80, 0.1, 0.9, (3 / 4, 4 / 3)).unbind(-1)
    assert min(left.min(), top.min()) >= 0
    assert (left + width).max() <= 80 + 1e-4
    assert (top + height).max() <= 30 + 1e-4
    assert ((width / height).log().abs() <= math.log(4 / 3) + 1e-4).all()
    assert (width * height >= 0.1 * 2400 - 0.1).all()
    assert len(left.unique()) > 400


def test_a_picture_no_drawn_shape_fits_gives_its_middle() -> None:
    assert random_crops(keys(2), 10, 1000, 0.9, 1.0, (1.0, 1.0)).tolist() == [[495, 0, 10, 10]] * 2


@pytest.mark.parametrize("pad_mode", ["zeros", "border", "reflection"])
def test_what_lies_beyond_the_border(pad_mode: str) -> None:
    x = torch.ones(1, 1, 8, 8).as_subclass(TensorImage)
    smaller = as_plain(Zoom(0.5, 0.5, p=1, pad_mode=pad_mode)(x, keys=keys(1)))
    assert float(smaller.mean()) < 0.5 if pad_mode == "zeros" else torch.allclose(smaller, torch.ones(()))


# --- everything of a sample together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("align_corners", [True, False])
def test_a_spot_stays_under_its_point(name: str, align_corners: bool) -> None:
    x, points = blobs(24, 48, 64)
    boxes = torch.cat([points - 0.02, points + 0.02], dim=-1).as_subclass(TensorBBox)
    t = replace(ALL[name], align_corners=align_corners, pad_mode="zeros")
    if isinstance(t, AffineCoordTfm):
        t = replace(t, tfms=tuple(replace(p, align_corners=align_corners) for p in t.tfms))
    label = torch.arange(24).as_subclass(TensorCategory)
    moved, at, around, same = t((x, points, boxes, label), keys=keys(24))
    assert [type(v) for v in (moved, at, around)] == [TensorImage, TensorPoint, TensorBBox]
    assert same is label
    inside = (as_plain(at).abs() < 0.7).all(dim=-1)[:, 0]  # the whole spot is still there
    assert inside.sum() > 4
    pixels = torch.tensor([moved.shape[-1], moved.shape[-2]]) / 2
    off = (middle(as_plain(moved)) - as_plain(at))[inside] * pixels
    assert off.abs().max() < 0.5
    assert (around[inside][..., :2] < at[inside]).all()
    assert (around[inside][..., 2:] > at[inside]).all()


@pytest.mark.parametrize("name", ALL)
def test_a_mask_moves_as_its_picture(name: str) -> None:
    mask = torch.randint(0, 5, (6, 24, 32), generator=torch.Generator().manual_seed(0))
    t = replace(ALL[name], mode="nearest")
    image, moved = t((mask[:, None].float().as_subclass(TensorImage), mask.as_subclass(TensorMask)), keys=keys(6))
    assert type(moved) is TensorMask
    assert moved.dtype == torch.int64
    assert torch.equal(as_plain(image)[:, 0].long(), as_plain(moved))


def test_boxes_end_at_the_border() -> None:
    boxes = torch.tensor([[[-0.9, -0.9, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]]]).as_subclass(TensorBBox)
    zoomed = Zoom(3, 3, p=1)((pictures(1), boxes), keys=keys(1))[1]
    assert zoomed.abs().max() <= 1
    left, top, right, bottom = zoomed[0, 1].tolist()
    assert (left, top) == pytest.approx((right, bottom), abs=1e-6)  # padding still has no area


# --- by the keys, and by nothing else ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_alone_as_in_a_batch(name: str) -> None:
    x, points = pictures(7), torch.rand(7, 3, 2).as_subclass(TensorPoint)
    batch = ALL[name]((x, points), keys=keys(7))
    for i in range(7):
        alone = ALL[name]((x[i : i + 1], points[i : i + 1]), keys=keys(7)[i : i + 1])
        for a, b in zip(alone, batch, strict=True):
            torch.testing.assert_close(as_plain(a[0]), as_plain(b[i]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_argument_is_left_alone_and_samples_differ(name: str) -> None:
    x = torch.stack([as_plain(pictures(1))[0]] * 12).as_subclass(TensorImage)
    before = x.clone()
    moved = as_plain(ALL[name](x, keys=keys(12)))
    assert torch.equal(x, before)
    assert len({m.numpy().tobytes() for m in moved}) > 1
    assert torch.equal(moved, as_plain(ALL[name](x, keys=keys(12))))


def test_how_often_it_acts() -> None:
    for t in (Flip(p=0.25), Rotate(p=0.25), Zoom(p=0.25), Dihedral(p=0.25 * 8 / 7)):
        moved = (t.matrix(keys(4000), 9, 9) - torch.eye(3)).abs().amax(dim=(1, 2)) > 1e-5
        assert float(moved.double().mean()) == pytest.approx(0.25, abs=0.03)


def test_drawn_once_for_a_batch() -> None:
    x = torch.stack([as_plain(pictures(1))[0]] * 5).as_subclass(TensorImage)
    moved = Pipeline.of([Rotate(p=1, batch=True), Zoom(p=1, batch=True)])(x, split_idx=0, keys=keys(5))
    assert (as_plain(moved) == as_plain(moved)[:1]).all()


# --- composed ------------------------------------------------------------------------------------------------------------


def test_neighbours_become_one_sampling() -> None:
    tfms = [Flip(p=1), Rotate(p=1), Zoom(p=1), Warp(p=1)]
    (one,) = Pipeline.of(tfms).transforms
    assert isinstance(one, AffineCoordTfm)
    assert one.parts == tuple(tfms)
    x = F.interpolate(as_plain(pictures(4, 6, 6)), size=48, mode="bicubic").as_subclass(TensorImage)
    in_turn: Any = x
    for t in tfms:
        in_turn = t(in_turn, keys=keys(4))
    at_once = as_plain(one(x, keys=keys(4)))
    inner = (..., slice(12, 36), slice(12, 36))  # where nothing comes from beyond the border
    torch.testing.assert_close(at_once[inner], as_plain(in_turn)[inner], rtol=0, atol=0.05)


def test_two_of_a_kind_draw_apart() -> None:
    twice = Rotate(p=1).compose_with(Rotate(p=1))
    once = Rotate(p=1).matrix(keys(50), 9, 9)
    assert not torch.allclose(twice.matrix(keys(50), 9, 9), once @ once, atol=1e-3)


def test_what_reads_pixels_another_way_stays_apart() -> None:
    assert len(Pipeline.of([Flip(), Rotate(pad_mode="zeros"), Zoom(pad_mode="zeros")]).transforms) == 2
    assert len(Pipeline.of([Flip(size=8), Rotate(size=9)]).transforms) == 2
    assert Pipeline.of([Flip(), Rotate(size=9)]).transforms[0].size == (9, 9)


# --- a size, for validation too ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_idx", [1, None])
def test_outside_training_only_the_size_is_given(split_idx: int | None) -> None:
    x, points = pictures(3, 32, 48), torch.rand(3, 2, 2).as_subclass(TensorPoint)
    pipeline = Pipeline.of(aug_transforms(size=(24, 30), max_lighting=0, max_zoom=1.0))
    sized, same = pipeline((x, points), split_idx=split_idx, keys=keys(3))
    expected = F.interpolate(as_plain(x), size=(24, 30), mode="bilinear", align_corners=True)
    torch.testing.assert_close(as_plain(sized), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(as_plain(same), as_plain(points), rtol=0, atol=0.05)
    assert Pipeline.of([Flip(p=1)])(x, split_idx=split_idx) is x


def test_outside_training_a_crop_is_the_middle() -> None:
    x = pictures(2, 16, 32)
    cropped = RandomResizedCropGPU(16, ratio=(1, 1)).outside_training(x)
    torch.testing.assert_close(as_plain(cropped), as_plain(x)[..., 8:24], rtol=0, atol=0.3)
    assert cropped.shape == (2, 3, 16, 16)


def test_shrinking_averages() -> None:
    """A fine chequerboard becomes grey, and not whichever squares the sampling happens to meet."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().expand(1, 1, 64, 64)
    small = as_plain(Flip(size=8)(board.as_subclass(TensorImage), keys=keys(1)))
    assert (small - 0.5).abs().max() < 0.01


# --- as data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_as_json_and_pickle(name: str) -> None:
    pipeline = Pipeline.of(ALL[name])
    assert Pipeline.from_plain(json.loads(json.dumps(pipeline.to_plain()))) == pipeline
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline  # noqa: S301  our own bytes


@pytest.mark.parametrize(
    "make",
    [
        lambda: Flip(p=1.5),
        lambda: Flip(pad_mode="mirror"),
        lambda: Flip(mode="cubic"),
        lambda: Flip(size=0),
        lambda: Zoom(1.2, 1.1),
        lambda: Warp(0.5),
        lambda: RandomResizedCropGPU(8, min_scale=0),
        lambda: RandomResizedCropGPU(8, ratio=(2, 1)),
        lambda: aug_transforms(min_scale=0.5),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"not |needs the size"):
        make()


def test_the_middle_of_ratio_and_scale_bounds() -> None:
    assert RandomResizedCropGPU(8, min_scale=0.25, ratio=(1, 1)).closest == 0.5
    assert math.isclose(Zoom(max_zoom=2).closest, 0.5)
