"""Points and boxes of pictures on the item side: made tensors, scaled to -1..1, cut off at the border, given their labels."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from blocks.category import Category, LabelLists
from blocks.errors import DataError
from blocks.resize import size_of
from blocks.tensors import TensorBBox, TensorBBoxLabel, TensorPoint, as_plain
from blocks.transform import ItemTransform


@dataclass
class MakePoints(ItemTransform):
    """Pairs of numbers (x, y) become a `TensorPoint` (n, 2), in pixels of the upright picture."""

    def encodes(self, x: object) -> TensorPoint:
        return TensorPoint.create(x)


@dataclass
class MakeBoxes(ItemTransform):
    """Rows of (left, top, right, bottom) become a `TensorBBox` (n, 4), in pixels of the upright picture."""

    def encodes(self, x: object) -> TensorBBox:
        return TensorBBox.create(x)


@dataclass
class PointScaler(ItemTransform):
    """Points and boxes in pixels become -1..1 over width and height of the first picture of their sample.

    do_scale: False for what is scaled already. y_first: True for (y, x). Without a picture their `img_size` counts.
    """

    do_scale: bool = True
    y_first: bool = False

    order: ClassVar[int] = 4  # once the picture has its size, before it is a tensor

    def encodes(self, x: object) -> Any:
        return self._each(x, size_of(x), self._scaled)

    def decodes(self, x: object) -> Any:
        return self._each(x, size_of(x), _in_pixels)

    def _each(self, x: Any, size: tuple[int, int] | None, f: Any) -> Any:
        if type(x) is tuple:
            return tuple(self._each(e, size, f) for e in x)
        if not isinstance(x, TensorPoint):
            return x
        width, height = (size[1], size[0]) if size else getattr(x, "img_size", None) or (None, None)
        if width is None:
            raise DataError(
                f"{type(x).__name__} is scaled by the size of its picture, but there is none in the sample: add an ImageBlock, "
                "or give it in TensorPoint.create(points, img_size=(width, height))"
            )
        pairs = as_plain(x).reshape(-1, 2)
        return f(pairs, torch.tensor([width, height])).reshape(x.shape).as_subclass(type(x))

    def _scaled(self, pairs: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        pairs = pairs.flip(-1) if self.y_first else pairs
        return pairs * 2 / size - 1 if self.do_scale else pairs


def _in_pixels(pairs: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return (pairs + 1) * size / 2


@dataclass
class ClipBoxes(ItemTransform):
    """Scaled boxes end at the border of the picture; those that lie beyond it go, with the labels that follow them."""

    order: ClassVar[int] = 4

    def encodes(self, x: object) -> Any:
        return _each_clipped(x)

    def decodes(self, x: object) -> Any:
        return _each_clipped(x)  # without what only filled up the batch


def _each_clipped(x: Any) -> Any:
    if isinstance(x, TensorBBox):
        return _clipped(x)[0]
    if type(x) is not tuple:
        return x
    values, kept = [], None
    for value in x:
        if isinstance(value, TensorBBox):
            value, kept = _clipped(value)
        elif isinstance(value, TensorBBoxLabel) and kept is not None:
            if len(value) != len(kept):
                raise DataError(f"there are {len(kept)} boxes but {len(value)} labels for them")
            value, kept = value[kept], None
        values.append(value)
    return tuple(values)


def _clipped(boxes: TensorBBox) -> tuple[Any, torch.Tensor]:
    clipped = as_plain(boxes).clamp(-1, 1)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
    return clipped[kept].as_subclass(TensorBBox), kept


@dataclass
class BBoxCategorize(LabelLists):
    """The list of labels of a picture's boxes becomes their indices in the vocabulary, in the order of the boxes."""

    def encodes(self, x: object) -> TensorBBoxLabel:
        return torch.tensor(self.indices_in(x), dtype=torch.int64).as_subclass(TensorBBoxLabel)

    def decodes(self, x: TensorBBoxLabel) -> list[Category]:
        return [Category(self.vocab[int(i)]) for i in x]
