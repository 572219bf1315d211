"""Pictures and masks from files: opened upright, in the mode that is wanted, and made tensors of bytes."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from blocks.encode import from_stored, to_stored
from blocks.errors import UnreadableRow
from blocks.files import read_bytes
from blocks.storage import is_url
from blocks.tensors import TensorImage, TensorImageBW, TensorMask, as_plain
from blocks.transform import Transform, dispatch

ORIENTATION = Base.Orientation.value


class PILImage(Image.Image):
    """A picture in colour (mode RGB)."""

    mode_wanted: ClassVar[str] = "RGB"

    @classmethod
    def create(cls, source: Any) -> Self:
        """Open a path or URL, encoded bytes, a PIL image or an (h, w[, c]) uint8 array; upright by its EXIF orientation.

        UnreadableRow when the file is missing, empty, truncated or no picture.
        """
        with _reading(), _opened(source) as image:
            ImageOps.exif_transpose(image, in_place=True)  # it is ours
            return cls.of(cls.converted(image))

    @classmethod
    def converted(cls, image: Image.Image) -> Image.Image:
        """An upright picture of any mode in the mode of this class. ValueError when that cannot be."""
        return _eight_bits(image).convert(cls.mode_wanted)

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """The same PIL image as this class."""
        image.__class__ = cls
        return image  # type: ignore[return-value]


class PILImageBW(PILImage):
    """A picture in shades of grey (mode L)."""

    mode_wanted: ClassVar[str] = "L"


class PILMask(PILImage):
    """A picture whose pixels are class numbers 0..255 (mode L).

    Of a palette the numbers are kept, not the colours; white of a black-and-white picture is 1; a picture in colour is
    none, unless red, green and blue are the same, and neither is one with numbers above 255.
    """

    mode_wanted: ClassVar[str] = "L"

    @classmethod
    def converted(cls, image: Image.Image) -> Image.Image:
        numbers = np.asarray(image.getchannel("P") if image.mode == "PA" else image)
        if image.mode in ("RGB", "RGBA", "LA"):
            numbers = numbers[..., : 3 if image.mode.startswith("RGB") else 1]
            if (numbers != numbers[..., :1]).any():
                raise ValueError("a mask holds one class number a pixel, but this picture is in colour")
            numbers = numbers[..., 0]
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise ValueError(f"a mask holds one class number a pixel, but this picture has mode {image.mode}")
        if numbers.size and (numbers.min() < 0 or numbers.max() > 255):
            raise ValueError(f"a mask holds class numbers up to 255, but this picture goes up to {numbers.max()}")
        return Image.fromarray(numbers.astype(np.uint8))


class EncodedJpeg(PILImage, JpegImageFile):
    """A colour JPEG that is decoded when its pixels are first asked for: `reduced` decodes a smaller picture in less time."""

    retained: ClassVar[type[PILImage]] = PILImage  # what is made of it is decoded
    encoded: bytes

    @classmethod
    def of(cls, image: Image.Image) -> Any:
        """What was made of such a picture, as a picture."""
        return image if isinstance(image, cls) else PILImage.of(image)

    @classmethod
    def opened(cls, encoded: bytes) -> Self | None:
        """The picture of some bytes; None when they are something else, or have to be turned or converted first."""
        image = Image.open(io.BytesIO(encoded))
        if type(image) is not JpegImageFile or image.mode != cls.mode_wanted or image.getexif().get(ORIENTATION, 1) != 1:
            return None
        image.__class__ = cls
        image.encoded = encoded  # type: ignore[attr-defined]
        return image  # type: ignore[return-value]

    def load(self) -> Any:
        with _reading():
            return super().load()

    def reduced(self, at_least: tuple[float, float]) -> tuple[PILImage, int]:
        """The picture at 1/n of its size, n = 1, 2, 4 or 8, the smallest that has `at_least` = (height, width); and n."""
        by = next(n for n in (8, 4, 2, 1) if n == 1 or (self.height >= n * at_least[0] and self.width >= n * at_least[1]))
        small = self.opened(self.encoded) if by > 1 else None
        if small is None:
            return self, 1
        small.draft(self.mode, (self.width // by, self.height // by))
        return small, by


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    # A damaged PNG raises SyntaxError, a truncated file OSError, an absurd size DecompressionBombError.
    try:
        yield
    except UnidentifiedImageError as error:  # its own words name an address in memory
        raise UnreadableRow("not a readable image: of no format that PIL knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableRow(f"not a readable image: {error}") from error


def _opened(source: Any) -> Image.Image:
    match source:
        case Image.Image():
            return source.copy()
        case bytes() | bytearray() | memoryview():
            return Image.open(io.BytesIO(source))
        case np.ndarray():
            return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[-1] == 1 else source)
        case str() if is_url(source):
            return Image.open(io.BytesIO(read_bytes(source)))
        case str() | Path():
            return Image.open(source)
    raise TypeError(f"an image is a path, a URL, bytes, a PIL image or a uint8 array, not {type(source).__name__}")


def _eight_bits(image: Image.Image) -> Image.Image:
    # PIL's own conversion cuts 16 bits off at 255, and warns of a palette with transparency.
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


@dataclass
class OpenImage(Transform):
    """A path, bytes or array becomes a `PILImage` (or, with mode "L", a `PILImageBW`).

    A JPEG in colour is decoded only when its pixels are asked for, so that one that is damaged is found out then.
    """

    mode: str = "RGB"

    opens_file: ClassVar[bool] = True

    def encodes(self, x: object) -> Any:
        if self.mode == "L":
            return PILImageBW.create(x)
        if isinstance(x, str | Path):
            with _reading():
                x = read_bytes(x)
        if isinstance(x, bytes):
            with _reading():
                jpeg = EncodedJpeg.opened(x)
            if jpeg is not None:
                return jpeg
        return PILImage.create(x)


@dataclass
class OpenMask(Transform):
    """A path, bytes or array becomes a `PILMask`; `vocab` names the classes in the order of their numbers.

    div: what the stored numbers are divided by later. UnreadableRow when a number then has no name in `vocab`.
    """

    vocab: tuple[str, ...] = ()
    div: int = 1

    opens_file: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.vocab = tuple(str(v) for v in self.vocab)

    def encodes(self, x: object) -> Any:
        mask = PILMask.create(x)
        most = int(np.asarray(mask).max(initial=0)) // self.div
        if self.vocab and most >= len(self.vocab):
            raise UnreadableRow(f"the mask holds class {most}, but codes names {len(self.vocab)}: 0 to {len(self.vocab) - 1}")
        return mask


@dataclass
class ToTensor(Transform):
    """A PIL image becomes uint8 (channels, height, width), 0..255; a mask (height, width)."""

    order: ClassVar[int] = 5

    @dispatch
    def encodes(self, x: PILImageBW) -> TensorImageBW:
        return _pixels(x).as_subclass(TensorImageBW)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: PILMask) -> TensorMask:  # noqa: F811
        return _pixels(x)[0].as_subclass(TensorMask)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: PILImage) -> TensorImage:  # noqa: F811
        return _pixels(x).as_subclass(TensorImage)


def _pixels(image: Image.Image) -> torch.Tensor:
    array = np.array(image)  # a copy: PIL's own buffer is read-only
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def as_picture(x: torch.Tensor) -> PILImage:
    """What `ToTensor` made a tensor of: TensorImage, TensorImageBW or TensorMask, uint8, as a PIL image."""
    array = as_plain(x).numpy()
    match x:
        case TensorMask():
            return PILMask.of(Image.fromarray(array))
        case TensorImageBW():
            return PILImageBW.of(Image.fromarray(array[0]))
    return PILImage.of(Image.fromarray(array.transpose(1, 2, 0)))


# --- in the store, where steps of each epoch follow --------------------------------------------------------------------


class StoredImage(TensorImage):
    """The pixels of a `PILImage`, which is what the steps of each epoch take it for."""


class StoredImageBW(TensorImageBW):
    """The pixels of a `PILImageBW`."""


class StoredMask(TensorMask):
    """The numbers of a `PILMask`."""


@dispatch  # type: ignore[no-redef]
def to_stored(value: PILImage) -> torch.Tensor:  # noqa: F811
    kind = StoredMask if isinstance(value, PILMask) else StoredImageBW if isinstance(value, PILImageBW) else StoredImage
    return as_plain(ToTensor()(value)).as_subclass(kind)


@dispatch  # type: ignore[no-redef]
def from_stored(value: StoredImage | StoredImageBW | StoredMask) -> PILImage:  # noqa: F811
    return as_picture(value)
