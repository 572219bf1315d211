"""Images as blocks: opening a file, resizing it on the item side, and the batch side from bytes to normalised floats."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from plum import dispatch

from blocks.datablock import TransformBlock
from blocks.errors import UnreadableRow
from blocks.pieces import ByPiece
from blocks.tensors import TensorImage, TensorImageBW
from blocks.transform import Transform

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PILImage(Image.Image):
    """A picture in colour (mode RGB)."""

    mode_wanted: ClassVar[str] = "RGB"

    @classmethod
    def create(cls, source: Any) -> Self:
        """Open a path, encoded bytes, a PIL image or an (h, w[, c]) uint8 array; upright by its EXIF orientation.

        UnreadableRow when the file is missing, empty, truncated or no picture.
        """
        try:
            with _opened(source) as image:
                upright = ImageOps.exif_transpose(image)
                converted = _eight_bits(upright).convert(cls.mode_wanted)
        # A damaged PNG raises SyntaxError, a truncated file OSError, an absurd size DecompressionBombError.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableRow(f"not a readable image: {error}") from error
        return cls.of(converted)

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """The same PIL image as this class."""
        image.__class__ = cls
        return image  # type: ignore[return-value]


class PILImageBW(PILImage):
    """A picture in shades of grey (mode L)."""

    mode_wanted: ClassVar[str] = "L"


def _opened(source: Any) -> Image.Image:
    match source:
        case Image.Image():
            return source.copy()
        case bytes() | bytearray() | memoryview():
            return Image.open(io.BytesIO(source))
        case np.ndarray():
            return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[-1] == 1 else source)
        case str() | Path():
            return Image.open(source)
    raise TypeError(f"an image is a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")


def _eight_bits(image: Image.Image) -> Image.Image:
    # PIL's own conversion cuts 16 bits off at 255, and warns of a palette with transparency.
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


@dataclass
class OpenImage(Transform):
    """A path, bytes or array becomes a `PILImage` (or, with mode "L", a `PILImageBW`)."""

    mode: str = "RGB"

    def encodes(self, x: object) -> Any:
        return (PILImageBW if self.mode == "L" else PILImage).create(x)


@dataclass
class Resize(Transform):
    """Scale the shorter side to `size` and crop the middle, so that each picture is (height, width) = `size`.

    fastai's `Resize(size, method="crop")` as it acts on validation data.
    """

    size: int | tuple[int, int]

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        sizes = tuple(self.size) if isinstance(self.size, tuple | list) else (self.size, self.size)
        if len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
            raise ValueError(f"Resize takes a side or (height, width) in pixels, at least 1, not {self.size!r}")
        self.size = sizes

    def encodes(self, x: Image.Image) -> Image.Image:
        height, width = self.size  # type: ignore[misc]
        if x.size == (width, height):
            return x
        return ImageOps.fit(x, (width, height), method=Image.Resampling.BILINEAR)


@dataclass
class ToTensor(Transform):
    """A PIL image becomes uint8 (channels, height, width), 0..255."""

    order: ClassVar[int] = 5

    @dispatch
    def encodes(self, x: PILImageBW) -> TensorImageBW:
        return _pixels(x).as_subclass(TensorImageBW)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: PILImage) -> TensorImage:  # noqa: F811
        return _pixels(x).as_subclass(TensorImage)


def _pixels(image: Image.Image) -> torch.Tensor:
    array = np.array(image)  # a copy: PIL's own buffer is read-only
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


@dataclass
class IntToFloatTensor(ByPiece, Transform):
    """uint8 pixels 0..255 become float32 0..1."""

    order: ClassVar[int] = 10

    def encodes(self, x: TensorImage) -> torch.Tensor:
        return x / 255  # of whole numbers too, this is float32

    def decodes(self, x: TensorImage) -> torch.Tensor:
        return x.clamp(0, 1).mul(255).round().to(torch.uint8)


@dataclass
class Normalize(Transform):
    """(x - mean) / std for each channel of float pixels; `mean` and `std` have one number a channel, in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    order: ClassVar[int] = 99

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"Normalize takes as many means as positive stds, not {self.mean!r} and {self.std!r}")

    @classmethod
    def from_stats(cls, mean: tuple[float, ...], std: tuple[float, ...]) -> "Normalize":
        """fastai's name for `Normalize(mean, std)`."""
        return cls(mean, std)

    def _as(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def shaped(values: tuple[float, ...]) -> torch.Tensor:
            return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)

        return shaped(self.mean), shaped(self.std)

    def encodes(self, x: TensorImage) -> torch.Tensor:
        mean, std = self._as(x)
        return (x - mean) / std

    def decodes(self, x: TensorImage) -> torch.Tensor:
        mean, std = self._as(x)
        return x * std + mean


def ImageBlock(cls: type[PILImage] = PILImage) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of pictures: opened as `cls`, stored as uint8, floats 0..1 on the batch side."""
    return TransformBlock(
        type_tfms=(OpenImage(mode=cls.mode_wanted),), item_tfms=(ToTensor(),), batch_tfms=(IntToFloatTensor(),)
    )
