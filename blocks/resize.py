"""Sizes on the item side: pictures, masks, points and boxes of a sample are scaled, cropped, padded and turned together.

A transform says which part of a picture is looked at (`View`), by the picture's own size; points and boxes follow the first
picture of their sample. What is drawn at random is drawn once a sample, and runs each epoch; the rest runs once.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from blocks.affine import PAD_MODES, checked_crop, height_and_width, middle_crop, random_crops
from blocks.draws import bernoulli, randint, stream_of, uniform
from blocks.images import EncodedJpeg, PILImage, PILMask, ToTensor, as_picture
from blocks.tensors import TensorBBox, TensorImage, TensorMask, TensorPoint, as_plain
from blocks.transform import ItemTransform, Pipeline, RandTransform, dispatch

GAP = 2.0  # a picture is first made smaller cheaply, but stays at least so many times as large as it has to become
METHODS = ("crop", "pad", "squish")
_NUMPY_MODE = {"reflection": "reflect", "border": "edge", "zeros": "constant"}


@dataclass(frozen=True)
class View:
    """A part of a picture, `box` = (left, top, right, bottom) in its pixels, and the (height, width) it is scaled to.

    A box may reach beyond the picture, by `pad_mode`, where nothing is scaled.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    pad_mode: str = "zeros"


@dispatch
def look(x: object, view: View) -> object:
    """What becomes of a value of a sample when its picture is seen by `view`. Add a method for a type of your own."""
    return x


@dispatch  # type: ignore[no-redef]
def look(x: Image.Image, view: View) -> Image.Image:  # noqa: F811
    left, top, right, bottom = view.box
    height, width = view.size
    if min(left, top) < 0 or right > x.width or bottom > x.height:
        return _padded(x, view)
    if (left, top, right, bottom) == (0, 0, width, height) == (0, 0, *x.size):
        return x
    if isinstance(x, PILMask):
        return PILMask.of(x.resize((width, height), Image.Resampling.NEAREST, box=view.box))
    if isinstance(x, EncodedJpeg):
        by = GAP * max(width / (right - left), height / (bottom - top))
        x, n = x.reduced((x.height * by, x.width * by))
        left, top, right, bottom = left / n, top / n, min(right / n, x.width), min(bottom / n, x.height)
    seen = _scaled(x, (left, top, right, bottom), height, width)
    return type(x).of(seen) if isinstance(x, PILImage) else seen


@dispatch  # type: ignore[no-redef]
def look(x: TensorImage | TensorMask, view: View) -> torch.Tensor:  # noqa: F811
    return ToTensor()(look(as_picture(x), view))


@dispatch  # type: ignore[no-redef]
def look(x: TensorPoint, view: View) -> TensorPoint:  # noqa: F811
    left, top, right, bottom = view.box
    height, width = view.size
    scale = torch.tensor([width / (right - left), height / (bottom - top)])
    return (as_plain(x) - torch.tensor([left, top])).mul_(scale).as_subclass(type(x))


@dispatch  # type: ignore[no-redef]
def look(x: TensorBBox, view: View) -> TensorBBox:  # noqa: F811
    corners = as_plain(x).reshape(-1, 2).as_subclass(TensorPoint)
    return as_plain(look(corners, view)).view(-1, 4).as_subclass(type(x))


def _scaled(x: Image.Image, box: tuple[float, float, float, float], height: int, width: int) -> Image.Image:
    if x.mode not in ("RGB", "L") or any(edge != int(edge) for edge in box):
        return x.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=GAP)
    # The same sums as PIL's in a third of the time: torch does them for several pixels at once.
    pixels = torch.from_numpy(np.array(x.crop(box))).view(1, int(box[3] - box[1]), int(box[2] - box[0]), -1)
    seen = F.interpolate(pixels.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True)
    return Image.fromarray(seen[0].permute(1, 2, 0).squeeze(-1).numpy())


def _padded(x: Image.Image, view: View) -> Image.Image:
    left, top, right, bottom = (round(edge) for edge in view.box)
    assert (bottom - top, right - left) == view.size
    inner = x.crop((max(left, 0), max(top, 0), min(right, x.width), min(bottom, x.height)))
    margins = [(max(-top, 0), max(bottom - x.height, 0)), (max(-left, 0), max(right - x.width, 0))]
    array = np.asarray(inner)
    margins += [(0, 0)] * (array.ndim - 2)
    padded = Image.fromarray(np.pad(array, margins, mode=_NUMPY_MODE[view.pad_mode]))  # type: ignore[call-overload]
    return type(x).of(padded) if isinstance(x, PILImage) else padded


def size_of(x: Any) -> tuple[int, int] | None:
    """Height and width of the first picture of a sample, a PIL image or a tensor of pixels; None when there is none."""
    if isinstance(x, tuple):
        return next((size for e in x if (size := size_of(e)) is not None), None)
    if isinstance(x, Image.Image):
        return x.height, x.width
    return (int(x.shape[-2]), int(x.shape[-1])) if isinstance(x, TensorImage | TensorMask) else None


def _seen(x: Any, first: tuple[int, int], views: Any) -> Any:
    # Every value of a sample by the views that `views(height, width)` gives, one after the other.
    if type(x) is tuple:
        return tuple(_seen(e, first, views) for e in x)
    for view in views(*(size_of(x) or first)):
        x = look(x, view)
    return x


@dataclass
class _Sized(ItemTransform, registered=False):
    """A transform that gives pictures a size in the same way always."""

    order: ClassVar[int] = 1

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """By which views, one after the other, a picture of this size is seen."""
        raise NotImplementedError

    def encodes(self, x: object) -> Any:
        first = size_of(x)
        return x if first is None else _seen(x, first, self.views)


@dataclass
class Resize(_Sized):
    """Each picture becomes (height, width) = `size`.

    method: "crop" scales so that the picture fills it and cuts off what is too much, in the middle; "pad" scales so that
    it fits in and fills up by `pad_mode` ("reflection", "border" or "zeros"); "squish" scales both ways. fastai crops
    training pictures at a random place; here nothing is random that runs once: for that, RandomResizedCrop or RandomCrop.
    """

    size: int | tuple[int, int]
    method: str = "crop"
    pad_mode: str = "reflection"

    fixes_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.size = height_and_width(self.size, "Resize")
        if self.method not in METHODS or self.pad_mode not in PAD_MODES:
            raise ValueError(
                f"Resize: method is one of {', '.join(METHODS)} and pad_mode one of {', '.join(PAD_MODES)}, not "
                f"{self.method!r} and {self.pad_mode!r}"
            )

    def views(self, height: int, width: int) -> tuple[View, ...]:
        size = height_and_width(self.size, "Resize")
        match self.method:
            case "squish":
                return (View((0, 0, width, height), size),)
            case "pad":
                by = min(size[0] / height, size[1] / width)
                fitting = (max(1, round(height * by)), max(1, round(width * by)))
                return View((0, 0, width, height), fitting), _middle_view(fitting, size, self.pad_mode)
        by = max(size[0] / height, size[1] / width)
        w, h = min(width, max(1, round(size[1] / by))), min(height, max(1, round(size[0] / by)))
        left, top = (width - w) // 2, (height - h) // 2
        return (View((left, top, left + w, top + h), size),)


@dataclass
class CropPad(_Sized):
    """The middle of a picture in (height, width) = `size`, without scaling; what it lacks is filled up by `pad_mode`."""

    size: int | tuple[int, int]
    pad_mode: str = "zeros"

    fixes_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.size = height_and_width(self.size, "CropPad")
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"CropPad: pad_mode is one of {', '.join(PAD_MODES)}, not {self.pad_mode!r}")

    def views(self, height: int, width: int) -> tuple[View, ...]:
        return (_middle_view((height, width), height_and_width(self.size, "CropPad"), self.pad_mode),)


@dataclass
class RatioResize(_Sized):
    """The longer side becomes `max_sz`, the other keeps the picture's shape."""

    max_sz: int

    def __post_init__(self) -> None:
        height_and_width(self.max_sz, "RatioResize")

    def views(self, height: int, width: int) -> tuple[View, ...]:
        by = self.max_sz / max(height, width)
        return (View((0, 0, width, height), (max(1, round(height * by)), max(1, round(width * by)))),)


def _middle_view(have: tuple[int, int], want: tuple[int, int], pad_mode: str) -> View:
    return _view_at((have[0] - want[0]) // 2, (have[1] - want[1]) // 2, want, pad_mode)


def _view_at(top: int, left: int, size: tuple[int, int], pad_mode: str) -> View:
    return View((left, top, left + size[1], top + size[0]), size, pad_mode)


def in_own_pixels(x: TensorPoint, tfms: Pipeline, size: tuple[int, int]) -> TensorPoint:
    """Points or boxes of -1..1 in the picture that the item transforms `tfms` made, in pixels of the one they were given.

    size: height and width of that one. What these transforms draw at random on training data is not undone.
    """
    views: list[View] = []
    for t in tfms.transforms:
        if isinstance(t, _Sized | _RandomlySized):
            views += t.views(*size) if isinstance(t, _Sized) else t.views(*size, None)
            size = views[-1].size
    pairs = (as_plain(x).reshape(-1, 2) + 1) * torch.tensor([size[1], size[0]]) / 2
    for view in reversed(views):
        left, top, right, bottom = view.box
        scale = torch.tensor([(right - left) / view.size[1], (bottom - top) / view.size[0]])
        pairs = pairs * scale + torch.tensor([left, top])
    return pairs.reshape(x.shape).as_subclass(type(x))


# --- drawn each epoch ----------------------------------------------------------------------------------------------------


@dataclass
class _RandomlySized(RandTransform, registered=False):
    """A transform that gives pictures a size by what is drawn, on validation data too: there by none."""

    order: ClassVar[int] = 1
    split_idx: ClassVar[int | None] = None

    def views(self, height: int, width: int, key: torch.Tensor | None) -> tuple[View, ...]:
        """By which views a picture of this size is seen; key: of the sample, int64 (1,), None outside training."""
        raise NotImplementedError

    def draw(self, x: Any, keys: torch.Tensor) -> Any:
        return size_of(x), keys

    def steady(self, x: Any) -> Any:
        return size_of(x), None

    def encodes(self, x: object, drawn: Any) -> Any:
        first, key = drawn
        return x if first is None else _seen(x, first, lambda height, width: self.views(height, width, key))


@dataclass
class RandomCrop(_RandomlySized):
    """A part of (height, width) = `size` at a random place, without scaling; outside training the middle."""

    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = height_and_width(self.size, "RandomCrop")

    def views(self, height: int, width: int, key: torch.Tensor | None) -> tuple[View, ...]:
        size = height_and_width(self.size, "RandomCrop")
        if key is None:
            return (_middle_view((height, width), size, "zeros"),)
        down, across = uniform(key, stream_of("RandomCrop"), n=2)[0].tolist()
        free = (height - size[0], width - size[1])
        # Where the picture is too small it lies in the middle.
        top, left = (int(u * (f + 1)) if f > 0 else f // 2 for u, f in zip((down, across), free, strict=True))
        return (_view_at(top, left, size, "zeros"),)


@dataclass
class RandomResizedCrop(_RandomlySized):
    """A part of the picture, drawn by its area and its shape, becomes the whole of one of `size`.

    min_scale, max_scale: of the area. ratio: width by height. Outside training the middle, less a margin of `val_xtra` of
    the size.
    """

    size: int | tuple[int, int]
    min_scale: float = 0.08
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    val_xtra: float = 0.14
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = height_and_width(self.size, "RandomResizedCrop")
        self.ratio = checked_crop("RandomResizedCrop", self.min_scale, self.max_scale, self.ratio)

    def views(self, height: int, width: int, key: torch.Tensor | None) -> tuple[View, ...]:
        size = height_and_width(self.size, "RandomResizedCrop")
        if key is None:
            w, h = (side / (1 + self.val_xtra) for side in middle_crop(height, width, self.ratio))
            left, top = (width - w) / 2, (height - h) / 2
        else:
            crop = random_crops(key, height, width, self.min_scale, self.max_scale, self.ratio)
            left, top, w, h = crop[0].tolist()
        return (View((left, top, min(left + w, width), min(top + h, height)), size),)


@dataclass
class FlipItem(RandTransform):
    """Left becomes right."""

    p: float = field(default=0.5, kw_only=True)

    order: ClassVar[int] = 2  # once a size is given, or the resizing would have to run each epoch as well

    def draw(self, x: Any, keys: torch.Tensor) -> Any:
        return size_of(x), int(bernoulli(keys, stream_of("FlipItem"), self.p))

    def encodes(self, x: object, drawn: Any) -> Any:
        return turned(x, *drawn)


@dataclass
class DihedralItem(RandTransform):
    """One of the eight ways a rectangle lies on itself or its sides exchanged, each as often."""

    order: ClassVar[int] = 2

    def draw(self, x: Any, keys: torch.Tensor) -> Any:
        way = int(randint(keys, stream_of("DihedralItem"), 8)) * int(bernoulli(keys, stream_of("DihedralItem.p"), self.p))
        return size_of(x), way

    def encodes(self, x: object, drawn: Any) -> Any:
        return turned(x, *drawn)


@dispatch
def turned(x: object, size: Any, way: int) -> object:
    """A value of a sample when its picture of `size` is turned: bit 4 of `way` exchanges the sides, then 1 left and right, 2
    top and bottom. Add a method for a type of your own."""
    return x


@dispatch  # type: ignore[no-redef]
def turned(x: Image.Image, size: Any, way: int) -> Image.Image:  # noqa: F811
    kind, result = type(x), x
    for bit, step in (
        (4, Image.Transpose.TRANSPOSE),
        (1, Image.Transpose.FLIP_LEFT_RIGHT),
        (2, Image.Transpose.FLIP_TOP_BOTTOM),
    ):
        if way & bit:
            result = result.transpose(step)
    return kind.of(result) if isinstance(x, PILImage) else result


@dispatch  # type: ignore[no-redef]
def turned(x: TensorImage | TensorMask, size: Any, way: int) -> torch.Tensor:  # noqa: F811
    return ToTensor()(turned(as_picture(x), size, way))


@dispatch  # type: ignore[no-redef]
def turned(x: TensorPoint, size: Any, way: int) -> TensorPoint:  # noqa: F811
    height, width = size
    points = as_plain(x).clone()
    if way & 4:
        points, height, width = points.flip(-1), width, height
    if way & 1:
        points[..., 0] = width - points[..., 0]
    if way & 2:
        points[..., 1] = height - points[..., 1]
    return points.as_subclass(type(x))


@dispatch  # type: ignore[no-redef]
def turned(x: TensorBBox, size: Any, way: int) -> TensorBBox:  # noqa: F811
    corners = as_plain(turned(as_plain(x).reshape(-1, 2).as_subclass(TensorPoint), size, way)).view(-1, 2, 2)
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=-1).as_subclass(type(x))
