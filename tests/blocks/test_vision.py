"""Pictures: opened from anything upright and in the right mode, resized, made tensors, normalised and back."""

import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blocks import (
    IMAGENET_STATS,
    ImageBlock,
    IntToFloatTensor,
    MaskBlock,
    Normalize,
    OpenImage,
    PILImage,
    PILImageBW,
    PILMask,
    Pipeline,
    Resize,
    TensorImage,
    TensorImageBW,
    TensorMask,
    ToTensor,
    Transform,
    UnreadableRow,
)
from blocks.images import EncodedJpeg
from blocks.pixels import PixelMoments
from blocks.tensors import as_plain

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(COLOURS).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "text path", "bytes", "bytearray", "memoryview", "array", "pil"])
def test_opened_from_anything(kind: str, tmp_path: Path) -> None:
    data = encoded(picture())
    file = tmp_path / "a.png"
    file.write_bytes(data)
    sources: dict[str, Any] = {
        "path": file,
        "text path": str(file),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "array": COLOURS,
        "pil": picture(),
    }
    image = PILImage.create(sources[kind])
    assert type(image) is PILImage
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), COLOURS)


def test_what_is_no_source_of_an_image() -> None:
    with pytest.raises(TypeError, match="not int"):
        PILImage.create(3)


def test_a_given_picture_is_left_alone() -> None:
    given = picture()
    PILImage.create(given).putpixel((0, 0), (1, 2, 3))
    assert type(given) is Image.Image
    assert np.array_equal(np.asarray(given), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "PA", "I;16", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_colour(mode: str) -> None:
    image = PILImage.create(picture("L").convert(mode))
    assert type(image) is PILImage
    assert image.mode == "RGB"
    assert image.size == (8, 6)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "TIFF"), ("L", "GIF"), ("RGB", "BMP")]
)
def test_pixels_of_files_in_other_modes(mode: str, kind: str) -> None:
    stored = picture(mode)
    image = PILImage.create(encoded(stored, kind))
    assert np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))


def test_alpha_is_dropped_and_the_colours_stay() -> None:
    alpha = picture("RGBA")
    alpha.putalpha(Image.fromarray(COLOURS[..., 0]))
    assert np.array_equal(np.asarray(PILImage.create(encoded(alpha))), COLOURS)


def test_palette() -> None:
    palette = picture().quantize(256)
    assert palette.mode == "P"
    assert np.array_equal(np.asarray(PILImage.create(encoded(palette))), np.asarray(palette.convert("RGB")))


def test_palette_with_transparency() -> None:
    """A common kind of PNG; PIL warns of it where it goes to RGB directly."""
    palette = picture().quantize(4)
    image = PILImage.create(encoded(palette, transparency=b"\x00\x80"))
    assert np.array_equal(np.asarray(image), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", [PILImage, PILImageBW])
def test_sixteen_bits_are_scaled_to_eight(kind: type[PILImage]) -> None:
    """A ramp of 16 bits comes out as the ramp of 8 bits, and not as white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(kind.create(encoded(Image.fromarray(ramp)))).reshape(16, 16, -1)[..., 0]
    assert np.abs(pixels.astype(int) - ramp / 257).max() <= 1


def test_black_and_white() -> None:
    image = PILImageBW.create(encoded(picture()))
    assert type(image) is PILImageBW
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.asarray(picture("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_comes_out_upright(orientation: int) -> None:
    """A camera stores the pixels turned, and says so; the red corner is upper left again."""
    upright = Image.new("RGB", (12, 8), "blue")
    upright.paste("red", (0, 0, 4, 4))
    turned_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turned_back[orientation]) if orientation in turned_back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = PILImage.create(encoded(stored, exif=exif.tobytes()))
    assert image.size == (12, 8)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_one_channel_array() -> None:
    image = PILImage.create(COLOURS[..., 0])
    assert np.array_equal(np.asarray(image), np.repeat(COLOURS[..., :1], 3, axis=2))


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    """The file is closed as well, or a ResourceWarning fails this test."""
    file = tmp_path / "two.gif"
    picture("P").save(file, save_all=True, append_images=[Image.new("P", (8, 6), 3)])
    with Image.open(file) as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(PILImage.create(file)), expected)


# --- masks ---------------------------------------------------------------------------------------------------------------

NUMBERS = np.array([[0, 1, 2], [3, 4, 250]], np.uint8)


def mask_files() -> dict[str, bytes]:
    palette = Image.fromarray(NUMBERS, "L").convert("P")
    palette.putpalette([(7 * i) % 256 for i in range(768)])  # colours that say nothing of the numbers
    alpha = Image.merge("LA", [Image.fromarray(NUMBERS), Image.new("L", (3, 2), 9)])
    return {
        "grey": encoded(Image.fromarray(NUMBERS)),
        "palette": encoded(palette),
        "sixteen bits": encoded(Image.fromarray(NUMBERS.astype(np.uint16))),
        "grey with alpha": encoded(alpha),
        "grey in three channels": encoded(Image.fromarray(NUMBERS).convert("RGB")),
        "and alpha": encoded(Image.fromarray(NUMBERS).convert("RGBA")),
    }


@pytest.mark.parametrize("name", mask_files())
def test_a_mask_keeps_its_numbers(name: str) -> None:
    mask = Pipeline.of(MaskBlock().type_tfms)(mask_files()[name])
    assert type(mask) is PILMask
    tensor = ToTensor()(mask)
    assert type(tensor) is TensorMask
    assert tensor.dtype == torch.uint8
    assert np.array_equal(tensor.numpy(), NUMBERS)


def test_white_of_black_and_white_is_one() -> None:
    assert np.asarray(PILMask.create(encoded(Image.fromarray(NUMBERS > 2)))).tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (picture(), "in colour"),
        (picture("CMYK"), "mode CMYK"),
        (Image.fromarray(np.full((2, 2), 256, np.uint16)), "up to 256"),
        (Image.fromarray(np.full((2, 2), 0.5, np.float32)), "mode F"),
    ],
)
def test_pictures_that_are_no_masks(image: Image.Image, reason: str) -> None:
    with pytest.raises(UnreadableRow, match=reason):
        PILMask.create(encoded(image, "TIFF"))


def test_a_damaged_mask() -> None:
    with pytest.raises(UnreadableRow, match="not a readable image"):
        PILMask.create(b"nothing")


def test_masks_on_the_batch_side() -> None:
    stored = torch.tensor([[[0, 255]]], dtype=torch.uint8).as_subclass(TensorMask)
    (to_float,) = MaskBlock(div_mask=255).batch_tfms
    numbers = to_float(stored)
    assert type(numbers) is TensorMask
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [[[0, 1]]]
    assert torch.equal(to_float.decode(numbers), stored)


# --- what cannot be opened ---------------------------------------------------------------------------------------------


def damaged() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpeg = encoded(noise), encoded(noise, "JPEG")
    return {
        "empty.png": b"",
        "text.jpg": b"this is no picture\n",
        "header only.png": png[:8],
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "checksum.png": png[:40] + bytes(8) + png[48:],
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(damaged()[name])
    with pytest.raises(UnreadableRow, match="not a readable image"):
        PILImage.create(file)
    with pytest.raises(UnreadableRow, match="not a readable image"):
        PILImage.create(damaged()[name])
    with pytest.raises(UnreadableRow, match="not a readable image"):
        ToTensor()(OpenImage()(file))


def photo(height: int, width: int) -> Image.Image:
    """Light that changes slowly, an edge, and some noise."""
    rng = np.random.default_rng(0)
    light = Image.fromarray(rng.integers(30, 220, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(light).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = 255
    return Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("height", "width", "n"), [(600, 800, 2), (1203, 1601, 4), (240, 320, 1), (2400, 3200, 8)])
def test_a_jpeg_is_decoded_no_larger_than_it_has_to_be(height: int, width: int, n: int) -> None:
    data = encoded(photo(height, width), "JPEG", quality=95)
    opened = OpenImage()(data)
    assert isinstance(opened, EncodedJpeg)
    assert opened.reduced((2 * 128 * height / min(height, width),) * 2)[1] == n
    quick = np.asarray(Resize(128)(opened)).astype(int)
    slow = np.asarray(Resize(128)(PILImage.create(data))).astype(int)
    assert opened.size == (width, height)  # as it was
    assert np.abs(quick - slow).mean() < 1
    assert np.percentile(np.abs(quick - slow), 99) <= 4


def test_what_is_made_of_an_encoded_jpeg_is_a_picture() -> None:
    @dataclass
    class Turn(Transform):
        def encodes(self, x: PILImage) -> Image.Image:
            return x.rotate(90)

    opened = OpenImage()(encoded(photo(60, 80), "JPEG"))
    for made in (Turn()(opened), Resize(16)(opened), Resize((60, 80))(Turn()(opened)), opened.copy()):
        assert type(made) in (PILImage, Image.Image)
        assert np.asarray(made).std() > 1
    assert np.array_equal(np.asarray(Resize((60, 80))(opened)), np.asarray(opened))


@pytest.mark.parametrize("kind", ["grey", "cmyk", "turned"])
def test_jpegs_that_need_more_than_decoding_are_opened_at_once(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    image = photo(30, 40).convert({"grey": "L", "cmyk": "CMYK", "turned": "RGB"}[kind])
    opened = OpenImage()(encoded(image, "JPEG", exif=exif))
    assert type(opened) is PILImage
    assert opened.mode == "RGB"
    assert opened.size == ((30, 40) if kind == "turned" else (40, 30))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(20, 30), (100, 130), (7, 7)])
def test_pixels_are_scaled_as_pil_scales_them(mode: str, size: tuple[int, int]) -> None:
    image = photo(60, 80).convert(mode)
    ours = np.asarray(Resize(size, method="squish")(image)).astype(int)
    assert np.abs(ours - np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)).max() <= 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRow, match=r"gone\.png"):
        PILImage.create(tmp_path / "gone.png")


def test_a_picture_of_absurd_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableRow):
        PILImage.create(encoded(picture()))


# --- Resize, ToTensor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(4, (4, 4)), ((4, 10), (4, 10)), ([10, 4], (10, 4)), (16, (16, 16))])
def test_resize_gives_height_and_width(size: Any, expected: tuple[int, int]) -> None:
    resized = Resize(size)(PILImage.create(picture()))
    assert type(resized) is PILImage
    assert (resized.height, resized.width) == expected


def test_resize_crops_the_middle() -> None:
    wide = Image.new("RGB", (30, 10), "blue")
    wide.paste("red", (10, 0, 20, 10))
    assert np.array_equal(np.asarray(Resize(10)(PILImage.create(wide))), np.full((10, 10, 3), (255, 0, 0)))
    assert np.array_equal(
        np.asarray(Resize(10)(PILImage.create(wide.rotate(90, expand=True)))), np.full((10, 10, 3), (255, 0, 0))
    )


def test_resize_to_the_same_size_changes_nothing() -> None:
    assert np.array_equal(np.asarray(Resize((6, 8))(PILImage.create(picture()))), COLOURS)


def test_a_side_means_a_square() -> None:
    assert Resize(7) == Resize((7, 7))


def test_resize_keeps_grey_pictures_grey() -> None:
    assert type(Resize(4)(PILImageBW.create(picture()))) is PILImageBW


@pytest.mark.parametrize("size", [0, -1, (0, 4), (4,), (4, 4, 4), ()])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Resize(size)


@pytest.mark.parametrize(
    ("kind", "tensor", "channels"), [(PILImage, TensorImage, 3), (PILImageBW, TensorImageBW, 1)], ids=["colour", "grey"]
)
def test_to_tensor(kind: type[PILImage], tensor: type[TensorImage], channels: int) -> None:
    image = kind.create(picture())
    pixels = ToTensor()(image)
    assert type(pixels) is tensor
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape) == (channels, 6, 8)
    assert np.array_equal(pixels.numpy().transpose(1, 2, 0), np.asarray(image).reshape(6, 8, channels))


def test_a_tensor_does_not_share_memory_with_its_picture() -> None:
    image = PILImage.create(picture())
    ToTensor()(image).zero_()
    assert np.array_equal(np.asarray(image), COLOURS)


@pytest.mark.parametrize(("block", "kind"), [(ImageBlock(), PILImage), (ImageBlock(PILImageBW), PILImageBW)])
def test_an_image_block_opens_as_its_class(block: Any, kind: type[PILImage]) -> None:
    assert type(Pipeline.of(block.type_tfms)(encoded(picture()))) is kind


def test_open_image_takes_any_source() -> None:
    assert type(OpenImage()(COLOURS)) is PILImage
    assert type(OpenImage(mode="L")(COLOURS)) is PILImageBW


# --- the batch side ----------------------------------------------------------------------------------------------------


def batch(channels: int = 3) -> TensorImage:
    """Every byte in every channel."""
    return torch.arange(256, dtype=torch.uint8).repeat(2, channels, 1).view(2, channels, 16, 16).as_subclass(TensorImage)


def test_bytes_to_floats_and_back() -> None:
    floats = IntToFloatTensor()(batch())
    assert type(floats) is TensorImage
    assert floats.dtype == torch.float32
    assert (float(floats.min()), float(floats.max())) == (0.0, 1.0)
    back = IntToFloatTensor().decode(floats)
    assert back.dtype == torch.uint8
    assert torch.equal(back, batch())


def test_decoding_floats_stays_within_bytes() -> None:
    decoded = IntToFloatTensor().decode(torch.tensor([-0.5, 0.0, 1.0, 1.5]).as_subclass(TensorImage))
    assert decoded.tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("stats", [IMAGENET_STATS, ((0.5,) * 3, (0.5,) * 3)])
def test_normalize_and_back(stats: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    floats = IntToFloatTensor()(batch())
    normalize = Normalize(*stats)
    normal = normalize(floats)
    assert type(normal) is TensorImage
    for c, (mean, std) in enumerate(zip(*stats, strict=True)):
        torch.testing.assert_close(as_plain(normal[:, c]), (as_plain(floats[:, c]) - mean) / std)
    torch.testing.assert_close(as_plain(normalize.decode(normal)), as_plain(floats))


def test_every_byte_survives_the_batch_side() -> None:
    pipeline = Pipeline.of([Normalize(*IMAGENET_STATS), IntToFloatTensor()])
    assert torch.equal(pipeline.decode(pipeline(batch())), batch())


def test_one_picture_is_transformed_as_in_a_batch() -> None:
    pipeline = Pipeline.of([Normalize(*IMAGENET_STATS), IntToFloatTensor()])
    assert torch.equal(pipeline(batch()[1]), pipeline(batch())[1])


def test_the_batch_side_leaves_its_argument_alone() -> None:
    pixels, floats = batch(), batch().float()
    IntToFloatTensor()(pixels)
    IntToFloatTensor()(floats)
    Normalize(*IMAGENET_STATS)(floats)
    assert torch.equal(pixels, batch())
    assert torch.equal(floats, batch().float())


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))])
def test_bad_stats(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="as many means as positive stds"):
        Normalize(mean, std)


# --- statistics of the training part -------------------------------------------------------------------------------------


def moments(pixels: np.ndarray) -> PixelMoments:
    found = PixelMoments()
    for i, p in enumerate(pixels):
        found.observe(torch.from_numpy(p).as_subclass(TensorImage), str(i))
    return found


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=3), st.randoms())
def test_statistics_of_parts_make_those_of_the_whole(cuts: list[int], random: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 3, 4, 5), dtype=np.uint8)
    bounds = sorted({0, *cuts, 11})
    parts = [moments(pixels[a:b]) for a, b in itertools.pairwise(bounds)] + [PixelMoments()]
    random.shuffle(parts)
    merged = PixelMoments()
    for part in parts:
        merged.merge(PixelMoments.from_plain(json.loads(json.dumps(part.to_plain()))))
    assert merged == moments(pixels)
    mean, std = merged.mean_and_std()
    assert mean == pytest.approx(pixels.mean(axis=(0, 2, 3)) / 255, rel=1e-12)
    assert std == pytest.approx(pixels.std(axis=(0, 2, 3)) / 255, rel=1e-12)


def test_normalize_learns_from_the_training_part() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    normalize = Normalize()
    assert not normalize.fitted
    with pytest.raises(ValueError, match="has not learned"):
        normalize(batch().float())
    assert normalize.setups(moments(pixels), PixelMoments()) == set()
    assert normalize.fitted
    normal = normalize(IntToFloatTensor()(torch.from_numpy(pixels).as_subclass(TensorImage)))
    torch.testing.assert_close(as_plain(normal).mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(as_plain(normal).var(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-4)


def test_a_channel_that_never_changes_becomes_zero() -> None:
    normalize = Normalize()
    normalize.setups(moments(np.full((2, 1, 3, 3), 7, np.uint8)), PixelMoments())
    assert normalize.std == (1.0,)
