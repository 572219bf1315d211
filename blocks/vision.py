"""The blocks of pictures and of what belongs to them: masks, points, boxes and their labels."""

from collections.abc import Sequence

import blocks.augment  # noqa: F401  registers its transforms, for exports that name them
from blocks.datablock import TransformBlock
from blocks.images import OpenImage, OpenMask, PILImage, ToTensor
from blocks.pixels import IntToFloatTensor
from blocks.points import BBoxCategorize, ClipBoxes, MakeBoxes, MakePoints, PointScaler


def ImageBlock(cls: type[PILImage] = PILImage) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of pictures: opened as `cls`, stored as uint8, floats 0..1 on the batch side."""
    return TransformBlock(
        type_tfms=(OpenImage(mode=cls.mode_wanted),), item_tfms=(ToTensor(),), batch_tfms=(IntToFloatTensor(),)
    )


def MaskBlock(codes: Sequence[str] = (), div_mask: int = 1) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of masks, a class number a pixel: stored as uint8, int64 on the batch side.

    codes: the names of the classes in the order of their numbers. div_mask: what the stored numbers are divided by, 255 for
    masks in black and white.
    """
    return TransformBlock(
        type_tfms=(OpenMask(tuple(codes), div_mask),), item_tfms=(ToTensor(),), batch_tfms=(IntToFloatTensor(div_mask),)
    )


def PointBlock() -> TransformBlock:  # noqa: N802  fastai's name
    """A block of points (x, y) in pixels of their upright picture; -1..1 over its width and height from then on."""
    return TransformBlock(type_tfms=(MakePoints(),), item_tfms=(PointScaler(),))


def BBoxBlock() -> TransformBlock:  # noqa: N802  fastai's name
    """A block of boxes (left, top, right, bottom) in pixels of their upright picture; -1..1 as points are from then on."""
    return TransformBlock(type_tfms=(MakeBoxes(),), item_tfms=(PointScaler(), ClipBoxes()))


def BBoxLblBlock(vocab: Sequence[str] = (), add_na: bool = True) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of the labels of a `BBoxBlock` before it, a list as long as that of the boxes.

    add_na: the class "#na#", number 0, for labels that are not known and for boxes that only fill up a batch.
    """
    return TransformBlock(type_tfms=(BBoxCategorize(tuple(vocab), add_na=add_na),))
