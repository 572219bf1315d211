"""The usual augmentation of pictures, by one call."""

from collections.abc import Sequence
from typing import Any

from blocks.affine import Dihedral, Flip, RandomResizedCropGPU, Rotate, Warp, Zoom
from blocks.lighting import Brightness, Contrast
from blocks.transform import Transform, TransformLike


def aug_transforms(
    mult: float = 1.0,
    do_flip: bool = True,
    flip_vert: bool = False,
    max_rotate: float = 10.0,
    min_zoom: float = 1.0,
    max_zoom: float = 1.1,
    max_lighting: float = 0.2,
    max_warp: float = 0.2,
    p_affine: float = 0.75,
    p_lighting: float = 0.75,
    xtra_tfms: TransformLike | Sequence[TransformLike] | None = None,
    size: int | tuple[int, int] | None = None,
    mode: str = "bilinear",
    pad_mode: str = "reflection",
    align_corners: bool = True,
    batch: bool = False,
    min_scale: float = 1.0,
) -> list[TransformLike]:
    """Flip, warp, rotate, zoom, brightness and contrast with fastai's defaults, for `batch_tfms`.

    mult: times max_rotate, max_lighting and max_warp. flip_vert: the eight ways of `Dihedral` instead of left-right flips.
    size: what the pictures end up as, from larger ones made on the item side, so that what turns in at the corners is seen
    (presizing). min_scale: below 1, a part of at least this area is cut out as well. xtra_tfms: more, after these. The
    rest is told at `Flip`, `Warp`, `Rotate`, `Zoom`, `Brightness` and `Contrast`.
    """
    how: dict[str, Any] = {"mode": mode, "pad_mode": pad_mode, "align_corners": align_corners, "batch": batch}
    sized = how | {"size": size if min_scale == 1 else None}
    tfms: list[Transform] = []
    if do_flip:
        tfms.append(Dihedral(p=0.5, **sized) if flip_vert else Flip(p=0.5, **sized))
    if max_warp * mult:
        tfms.append(Warp(max_warp * mult, p=p_affine, **sized))
    if max_rotate * mult:
        tfms.append(Rotate(max_rotate * mult, p=p_affine, **sized))
    if min_zoom < 1 or max_zoom > 1:
        tfms.append(Zoom(min_zoom, max_zoom, p=p_affine, **sized))
    if max_lighting * mult:
        tfms.append(Brightness(max_lighting * mult, p=p_lighting, batch=batch))
        tfms.append(Contrast(max_lighting * mult, p=p_lighting, batch=batch))
    if min_scale != 1:
        if size is None:
            raise ValueError("aug_transforms with min_scale cuts parts out and needs the size they are scaled to: size=...")
        tfms.append(RandomResizedCropGPU(size, min_scale=min_scale, ratio=(1, 1), **how))
    extra = [xtra_tfms] if callable(xtra_tfms) else xtra_tfms or ()
    return [*tfms, *extra]
