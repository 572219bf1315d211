"""Random light, colour and erasing: the formulas, each sample by its own key, and many pictures piece by piece."""

import colorsys
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from blocks import IntToFloatTensor, Pipeline, TensorCategory, TensorImage, TensorImageBW, TensorMask, Transform
from blocks.affine import AffineCoordTfm, Flip, Rotate
from blocks.augment import aug_transforms
from blocks.draws import sample_keys
from blocks.lighting import LUMA, Brightness, Contrast, Hue, LightingTfm, RandomErasing, Saturation
from blocks.pieces import PIECE_BYTES, InPieces
from blocks.tensors import as_plain

ALL = {
    "Brightness": Brightness(0.5, p=0.8),
    "Contrast": Contrast(0.5, p=0.8),
    "Saturation": Saturation(0.5, p=0.8),
    "composed": Saturation(0.5).compose_with(Brightness(0.4)).compose_with(Contrast(0.3)).compose_with(Saturation(0.2)),
    "Hue": Hue(0.3, p=0.8),
    "RandomErasing": RandomErasing(sl=0.1, sh=0.4, max_count=3, p=0.8),
}


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, np.arange(n))


def pictures(n: int = 6, height: int = 10, width: int = 8, channels: int = 3) -> TensorImage:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0)).as_subclass(TensorImage)


# --- the formulas --------------------------------------------------------------------------------------------------------


def test_brightness_adds_to_logits() -> None:
    x = pictures()
    moved = torch.logit(as_plain(Brightness(0.2, p=1)(x, keys=keys(6, seed=1)))) - torch.logit(as_plain(x))
    assert torch.allclose(moved, moved[:, :1, :1, :1].expand_as(moved), atol=1e-3)
    half = torch.sigmoid(moved[:, 0, 0, 0])
    assert ((half >= 0.4) & (half <= 0.6)).all()
    assert half.min() < 0.48 < 0.52 < half.max()


def test_contrast_multiplies_logits() -> None:
    x = pictures()
    times = torch.logit(as_plain(Contrast(0.2, p=1)(x, keys=keys(6)))) / torch.logit(as_plain(x))
    assert torch.allclose(times, times[:, :1, :1, :1].expand_as(times), atol=1e-2)
    assert ((times >= 0.79) & (times <= 1.26)).all()


def test_saturation_moves_logits_from_their_grey() -> None:
    x = pictures()
    before, after = torch.logit(as_plain(x)), torch.logit(as_plain(Saturation(0.5, p=1)(x, keys=keys(6))))
    weights = torch.tensor(LUMA)[:, None, None]
    grey = (before * weights).sum(1, keepdim=True)
    torch.testing.assert_close((after * weights).sum(1, keepdim=True), grey, rtol=1e-3, atol=1e-3)
    times = (after - grey) / (before - grey)
    assert (times.flatten(1).quantile(0.9, dim=1) - times.flatten(1).quantile(0.1, dim=1)).abs().max() < 0.01
    assert ((times.flatten(1).median(dim=1).values > 0.49) & (times.flatten(1).median(dim=1).values < 2.01)).all()


def test_neighbours_become_one() -> None:
    tfms = [Saturation(0.5, p=1), Brightness(0.5, p=1), Contrast(0.5, p=1)]
    (one,) = Pipeline.of(tfms).transforms
    assert isinstance(one, LightingTfm)
    assert one.parts == tuple(tfms)
    in_turn: Any = pictures()
    for t in tfms:
        in_turn = t(in_turn, keys=keys(6))
    torch.testing.assert_close(as_plain(one(pictures(), keys=keys(6))), as_plain(in_turn), rtol=0, atol=1e-4)


def test_hue_as_the_standard_library_turns_it() -> None:
    x = pictures(3, 4, 5)
    hue = Hue(0.4, p=1)
    turned, drawn = as_plain(hue(x, keys=keys(3))), hue.draw(x, keys(3))
    assert drawn.abs().max() <= 0.4
    for i, c in np.ndindex(3, 20):
        r, g, b = as_plain(x)[i].flatten(1)[:, c].tolist()
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        expected = colorsys.hsv_to_rgb((h + float(drawn[i])) % 1, s, v)
        assert turned[i].flatten(1)[:, c].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Saturation", "composed", "Hue"])
@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white_stay_so(name: str, channels: int) -> None:
    x = torch.tensor([0.0, 1.0]).expand(4, channels, 3, 2).as_subclass(TensorImage)
    torch.testing.assert_close(as_plain(ALL[name](x, keys=keys(4))), as_plain(x), rtol=0, atol=1e-4)


def test_pictures_of_four_channels_have_no_colour() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        Saturation(p=1)(pictures(channels=4), keys=keys(6))
    assert Brightness(p=1)(pictures(channels=4), keys=keys(6)).shape == (6, 4, 10, 8)


def test_erased_rectangles_are_noise() -> None:
    x = torch.full((64, 3, 40, 40), 7.0).as_subclass(TensorImage)
    result = as_plain(RandomErasing(sl=0.2, sh=0.3, p=0.5)(x, keys=keys(64)))
    erased = (result != 7).any(dim=1)
    share = erased.double().mean(dim=(1, 2))
    assert float((share > 0).double().mean()) == pytest.approx(0.5, abs=0.15)
    assert ((share[share > 0] > 0.1) & (share < 0.33)[share > 0]).all()
    noise = result.permute(0, 2, 3, 1)[erased].double()
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    for one in erased[share > 0]:  # a rectangle is its rows times its columns
        assert torch.equal(one, one.any(dim=1)[:, None] & one.any(dim=0))


# --- by the keys, on pictures only ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_alone_as_in_a_batch(name: str) -> None:
    x = pictures()
    before, batch = x.clone(), ALL[name](x, keys=keys(6))
    assert type(batch) is TensorImage
    assert torch.equal(x, before)
    assert not torch.equal(batch, x)
    for i in range(6):
        torch.testing.assert_close(ALL[name](x[i : i + 1], keys=keys(6)[i : i + 1])[0], batch[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [*ALL.values(), Flip(p=1)], ids=lambda t: type(t).__name__)
def test_bytes_are_no_floats(t: Any) -> None:
    """As they come from a plain list of batches."""
    with pytest.raises(ValueError, match="add IntToFloatTensor"):
        t(torch.zeros(6, 3, 4, 4, dtype=torch.uint8).as_subclass(TensorImage), keys=keys(6))


@pytest.mark.parametrize("name", ALL)
def test_other_types_pass(name: str) -> None:
    mask = torch.ones(6, 4, 4, dtype=torch.int64).as_subclass(TensorMask)
    label = torch.ones(6).as_subclass(TensorCategory)
    grey = pictures(channels=1).as_subclass(TensorImageBW)
    x, m, y = ALL[name]((grey, mask, label), keys=keys(6))
    assert (type(x), m, y) == (TensorImageBW, mask, label)


@pytest.mark.parametrize("name", ALL)
def test_on_training_data_only(name: str) -> None:
    x = pictures()
    assert Pipeline.of(ALL[name])(x, split_idx=1, keys=keys(6)) is x


def test_drawn_once_for_a_batch() -> None:
    x = torch.full((5, 3, 2, 2), 0.3).as_subclass(TensorImage)
    moved = Pipeline.of([Brightness(p=1, batch=True), Hue(p=1, batch=True)])(x, split_idx=0, keys=keys(5))
    assert (as_plain(moved) == as_plain(moved)[:1]).all()


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_as_json_and_pickle(name: str) -> None:
    pipeline = Pipeline.of(ALL[name])
    assert Pipeline.from_plain(json.loads(json.dumps(pipeline.to_plain()))) == pipeline
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline  # noqa: S301  our own bytes


@pytest.mark.parametrize(
    "make", [lambda: Brightness(1.0), lambda: Contrast(-0.1), lambda: RandomErasing(sh=1.2), lambda: RandomErasing(max_count=0)]
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match="takes"):
        make()


# --- the usual augmentation, piece by piece ----------------------------------------------------------------------------


def test_the_usual_augmentation_is_one_transform() -> None:
    pipeline = Pipeline.of([*aug_transforms(), Hue(), IntToFloatTensor()])
    (one,) = pipeline.transforms
    assert isinstance(one, InPieces)
    assert str(pipeline) == "IntToFloatTensor+Flip+Warp+Rotate+Zoom+Brightness+Contrast+Hue"
    assert [type(t) for t in one.tfms] == [IntToFloatTensor, AffineCoordTfm, LightingTfm, Hue]
    assert Pipeline.from_plain(json.loads(json.dumps(pipeline.to_plain()))) == pipeline


def test_transforms_added_later_run_in_their_place() -> None:
    """What was composed comes apart again, or a step between the two would run after both."""

    class Between(Transform, registered=False):
        order = 35

    names = [type(t).__name__ for t in (Pipeline.of([Brightness(), Flip(), Rotate()]) + Pipeline.of(Between())).transforms]
    assert names == ["AffineCoordTfm", "Between", "Brightness"]


@pytest.mark.parametrize("split_idx", [0, 1])
def test_in_pieces_as_at_once(split_idx: int) -> None:
    n = 5 * PIECE_BYTES // (4 * 3 * 64 * 64) // 2
    x = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8).as_subclass(TensorImage)
    mask = torch.randint(0, 9, (n, 64, 64)).as_subclass(TensorMask)
    pipeline = Pipeline.of([IntToFloatTensor(), *aug_transforms(size=32, batch=True), Hue(batch=True)])
    image, moved = pipeline((x, mask), split_idx=split_idx, keys=keys(n))
    at_once: Any = (x, mask)
    for t in pipeline.transforms[0].tfms:  # type: ignore[attr-defined]
        at_once = Pipeline((t,))(at_once, split_idx=split_idx, keys=keys(n))
    assert type(image) is TensorImage
    torch.testing.assert_close(as_plain(image), as_plain(at_once[0]), rtol=0, atol=1e-5)
    assert torch.equal(moved, at_once[1])


def test_decoded_as_one_by_one() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).as_subclass(TensorImage)
    pipeline = Pipeline.of([IntToFloatTensor(), *aug_transforms()])
    assert torch.equal(pipeline.decode(pipeline(x, split_idx=1)), x)


def test_the_defaults_are_fastais() -> None:
    told = {type(t).__name__: t for t in aug_transforms()}
    assert list(told) == ["Flip", "Warp", "Rotate", "Zoom", "Brightness", "Contrast"]
    values: Any = told
    assert [told[n].p for n in told] == [0.5, 0.75, 0.75, 0.75, 0.75, 0.75]  # type: ignore[attr-defined]
    assert (values["Rotate"].max_deg, values["Zoom"].max_zoom, values["Warp"].magnitude) == (10.0, 1.1, 0.2)
    assert (values["Brightness"].max_lighting, values["Flip"].pad_mode) == (0.2, "reflection")


def test_settings_of_the_usual_augmentation() -> None:
    def names(**settings: Any) -> list[str]:
        return [type(t).__name__ for t in aug_transforms(**settings)]

    assert names(flip_vert=True)[0] == "Dihedral"
    assert names(do_flip=False, max_warp=0, max_rotate=0, max_zoom=1.0, max_lighting=0) == []
    assert names(mult=0, max_zoom=1.0) == ["Flip"]
    assert names(size=32, min_scale=0.5)[-1] == "RandomResizedCropGPU"
    assert names(xtra_tfms=RandomErasing())[-1] == names(xtra_tfms=[RandomErasing()])[-1] == "RandomErasing"
