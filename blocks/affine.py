"""Random geometry of a batch: flips, turns, zooms, warps and crops, all as ONE sampling of the picture.

Each transform gives a projective matrix a sample, from where a pixel goes to where it comes from, in coordinates from -1 to
1 over width and height. Matrices multiply, so neighbours in a Pipeline become one `AffineCoordTfm`, and the pixels are read
once: bilinear for pictures, nearest for masks. Points and boxes go through the inverse of the same matrix. (torchvision's
transforms move all of them together too, but draw once for a whole batch.)
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812

from blocks.draws import bernoulli, randint, stream_of, uniform
from blocks.pieces import ByPiece, floats
from blocks.tensors import TensorBBox, TensorImage, TensorMask, TensorPoint, as_plain
from blocks.transform import RandTransform, Transform, dispatch, with_own_keys

PAD_MODES = ("reflection", "border", "zeros")
MODES = ("bilinear", "nearest", "bicubic")


@dataclass(frozen=True)
class Drawn:
    """How each sample of a batch moves: `matrix` (rows, 3, 3), float32, and the (height, width) before and after."""

    matrix: torch.Tensor
    before: tuple[int, int]
    after: tuple[int, int]

    def __getitem__(self, rows: slice) -> "Drawn":
        # Outside training one matrix stands for all samples.
        return self if len(self.matrix) == 1 else replace(self, matrix=self.matrix[rows])


@dataclass
class _Geometry(ByPiece, RandTransform, registered=False):
    """What all of them share, in fastai's words.

    p: how often it acts on a sample. size: height and width afterwards, a side or a pair; None leaves them. mode: how
    pictures are read between pixels. pad_mode: what lies beyond their border. align_corners: whether -1 and 1 are the centres
    of the outermost pixels or their outer edges. batch: draw once, for all samples of a batch alike.
    """

    size: int | tuple[int, int] | None = field(default=None, kw_only=True)
    mode: str = field(default="bilinear", kw_only=True)
    pad_mode: str = field(default="reflection", kw_only=True)
    align_corners: bool = field(default=True, kw_only=True)
    batch: bool = field(default=False, kw_only=True)

    order: ClassVar[int] = 30
    split_idx: ClassVar[int | None] = None  # validation data gets its size here, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            self.size = height_and_width(self.size, type(self).__name__)
        if self.pad_mode not in PAD_MODES or self.mode not in MODES:
            raise ValueError(
                f"{type(self).__name__}: pad_mode is one of {', '.join(PAD_MODES)} and mode one of {', '.join(MODES)}, not "
                f"{self.pad_mode!r} and {self.mode!r}"
            )

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Where the pixels of each sample come from, float32 (rows, 3, 3), for pictures of this size."""
        raise NotImplementedError

    def steady_matrix(self, height: int, width: int) -> torch.Tensor:
        """The same outside training, float32 (1, 3, 3)."""
        return torch.eye(3)[None]

    @property
    def parts(self) -> "tuple[_Geometry, ...]":
        return (self,)

    @property
    def closest(self) -> float:
        """The smallest part of a picture's side that may fill a whole side afterwards."""
        return 1.0

    @property
    def _after(self) -> tuple[int, int] | None:
        return self.size  # type: ignore[return-value]  # __post_init__ made it a pair

    def draw(self, x: Any, keys: torch.Tensor) -> Drawn:
        before = _height_and_width_of(x)
        matrix = self.matrix(keys[:1].expand_as(keys) if self.batch else keys, *before)
        return Drawn(matrix, before, self._after or before)

    def steady(self, x: Any) -> Drawn | None:
        if self._after is None:
            return None
        before = _height_and_width_of(x)
        return Drawn(self.steady_matrix(*before), before, self._after)

    @dispatch
    def encodes(self, x: TensorImage, drawn: Drawn) -> torch.Tensor:
        return _sampled(self._shrunk(floats(x), drawn), drawn, self.mode, self.pad_mode, self.align_corners)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorMask, drawn: Drawn) -> torch.Tensor:  # noqa: F811
        pixels = as_plain(x)[:, None].to(torch.float32)  # exact for class numbers up to 2**24
        return _sampled(pixels, drawn, "nearest", self.pad_mode, self.align_corners)[:, 0].to(x.dtype)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorPoint, drawn: Drawn) -> torch.Tensor:  # noqa: F811
        return _points_moved(as_plain(x), drawn, self.align_corners)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorBBox, drawn: Drawn) -> torch.Tensor:  # noqa: F811
        boxes = as_plain(x)
        corners = torch.stack([boxes[..., [i, j]] for i in (0, 2) for j in (1, 3)], dim=-2)  # (rows, n, 4, 2)
        moved = _points_moved(corners.flatten(1, 2), drawn, self.align_corners).view_as(corners)
        # Cut off at the border: a box that has left the picture has no area, as padding has none.
        return torch.cat([moved.amin(dim=-2), moved.amax(dim=-2)], dim=-1).clamp_(-1, 1)

    def _shrunk(self, x: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        # Reading one pixel in two or more leaves out the rest: average first, to twice of what is asked for.
        times = min(b / a for b, a in zip(drawn.before, drawn.after, strict=True)) / 2 * self.closest
        return F.interpolate(x, scale_factor=1 / times, mode="area") if times > 1 else x

    def compose_with(self, other: Transform) -> Transform | None:
        if not isinstance(other, _Geometry):
            return super().compose_with(other)
        sizes = {t.size for t in (self, other)} - {None}
        ways = {(t.mode, t.pad_mode, t.align_corners) for t in (self, other)}
        if len(sizes) > 1 or len(ways) > 1:
            return None  # what the second draws depends on the size the first one leaves
        return AffineCoordTfm(
            (*self.parts, *other.parts),
            size=next(iter(sizes), None),
            mode=self.mode,
            pad_mode=self.pad_mode,
            align_corners=self.align_corners,
        )

    def _drawn(self, keys: torch.Tensor, what: str, low: float, high: float, neutral: float) -> torch.Tensor:
        # A number a sample, float32 (rows,): between low and high with probability p, else the neutral one.
        name = type(self).__name__
        drawn = uniform(keys, stream_of(f"{name}.{what}"), low, high)
        return torch.where(bernoulli(keys, stream_of(f"{name}.{what}.p"), self.p), drawn, neutral)


@dataclass
class AffineCoordTfm(_Geometry):
    """Several geometric transforms in a row, as one sampling: the product of their matrices."""

    tfms: tuple[_Geometry, ...]

    @property
    def parts(self) -> tuple[_Geometry, ...]:
        return self.tfms

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        product = torch.eye(3, device=keys.device).expand(len(keys), 3, 3)
        for t, own in with_own_keys(self.tfms, keys):
            product = product @ t.matrix(own[:1].expand_as(own) if t.batch else own, height, width)
        return product

    def steady_matrix(self, height: int, width: int) -> torch.Tensor:
        product = torch.eye(3)[None]
        for t in self.tfms:
            product = product @ t.steady_matrix(height, width)
        return product

    @property
    def closest(self) -> float:
        return math.prod(t.closest for t in self.tfms)


@dataclass
class Flip(_Geometry):
    """Left becomes right."""

    p: float = field(default=0.5, kw_only=True)

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return _rows(1 - 2 * bernoulli(keys, stream_of("Flip.p"), self.p).to(torch.float32), 0, 0, 0, 1, 0)


@dataclass
class Dihedral(_Geometry):
    """One of the eight ways a square lies on itself, each as often; a picture that is no square is stretched when it turns."""

    p: float = field(default=0.5, kw_only=True)

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        way = randint(keys, stream_of("Dihedral.way"), 8)
        way = torch.where(bernoulli(keys, stream_of("Dihedral.p"), self.p), way, 0)
        across, down, turned = ((way >> bit & 1).to(torch.float32) for bit in range(3))
        x, y = 1 - 2 * across, 1 - 2 * down
        return _rows(x * (1 - turned), x * turned, 0, y * turned, y * (1 - turned), 0)


@dataclass
class Rotate(_Geometry):
    """A turn by up to `max_deg` degrees either way, about the middle."""

    max_deg: float = 10.0
    p: float = field(default=0.5, kw_only=True)

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        angle = torch.deg2rad(self._drawn(keys, "angle", -self.max_deg, self.max_deg, 0.0))
        cos, sin = angle.cos(), angle.sin()
        return _rows(cos, sin * (height / width), 0, -sin * (width / height), cos, 0)


@dataclass
class Zoom(_Geometry):
    """Enlarged by `min_zoom` to `max_zoom` times, about a point drawn with it; below 1, smaller."""

    min_zoom: float = 1.0
    max_zoom: float = 1.1
    p: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_zoom <= self.max_zoom:
            raise ValueError(f"Zoom takes 0 < min_zoom <= max_zoom, not {self.min_zoom!r} and {self.max_zoom!r}")

    @property
    def closest(self) -> float:
        return 1 / self.max_zoom

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        part = 1 / self._drawn(keys, "zoom", self.min_zoom, self.max_zoom, 1.0)
        across, down = uniform(keys, stream_of("Zoom.middle"), -1, 1, n=2).unbind(-1)
        return _rows(part, 0, (1 - part) * across, 0, part, (1 - part) * down)


@dataclass
class Warp(_Geometry):
    """Seen from aside: the left or upper edge grows and the other shrinks, by up to `magnitude` of its length."""

    magnitude: float = 0.2
    p: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.magnitude < 0.5:
            raise ValueError(f"Warp takes a magnitude from 0 to less than 0.5, not {self.magnitude!r}")

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        # The corners (x, y) of the square go to (x - x y a, y - x y b): this symmetric matrix is the projection that does so.
        a = self._drawn(keys, "a", -self.magnitude, self.magnitude, 0.0)
        b = self._drawn(keys, "b", -self.magnitude, self.magnitude, 0.0)
        there = torch.stack([1 - a * a, -a * b, b, -a * b, 1 - b * b, a, b, a, torch.ones_like(a)], dim=-1)
        return inverse(there.view(-1, 3, 3))


@dataclass
class RandomResizedCropGPU(_Geometry):
    """A part of the picture, drawn by its area and its shape, becomes the whole of one of `size`.

    min_scale, max_scale: of the area. ratio: width by height, drawn evenly in its logarithm. Outside training the largest
    part in the middle within `ratio`, `valid_scale` of it.
    """

    size: int | tuple[int, int] = 224
    min_scale: float = 0.08
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    max_scale: float = 1.0
    valid_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ratio = checked_crop(type(self).__name__, self.min_scale, self.max_scale, self.ratio)

    @property
    def closest(self) -> float:
        return math.sqrt(self.min_scale / max(*self.ratio, *(1 / r for r in self.ratio)))

    def matrix(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        drawn = random_crops(keys, height, width, self.min_scale, self.max_scale, self.ratio)
        whole = torch.tensor([[0.0, 0.0, width, height]], device=keys.device)
        acts = bernoulli(keys, stream_of("RandomResizedCropGPU.p"), self.p)
        return _of_box(torch.where(acts[:, None], drawn, whole), height, width)

    def steady_matrix(self, height: int, width: int) -> torch.Tensor:
        w, h = middle_crop(height, width, self.ratio)
        w, h = w * self.valid_scale, h * self.valid_scale
        return _of_box(torch.tensor([[(width - w) / 2, (height - h) / 2, w, h]]), height, width)


# --- crops, on the item side as well -------------------------------------------------------------------------------------


def checked_crop(name: str, min_scale: float, max_scale: float, ratio: Any) -> tuple[float, float]:
    """The ratio as a pair. ValueError when it or the scales are out of their range."""
    low, high = tuple(ratio)
    if not (0 < min_scale <= max_scale <= 1 and 0 < low <= high):
        raise ValueError(
            f"{name} takes 0 < min_scale <= max_scale <= 1 and a ratio (low, high) above 0, not {min_scale!r}, "
            f"{max_scale!r} and {ratio!r}"
        )
    return low, high


def middle_crop(height: int, width: int, ratio: tuple[float, float]) -> tuple[float, float]:
    """Width and height of the largest part whose width by height lies within `ratio`."""
    return min(width, height * ratio[1]), min(height, width / ratio[0])


def random_crops(
    keys: torch.Tensor, height: int, width: int, min_scale: float, max_scale: float, ratio: tuple[float, float]
) -> torch.Tensor:
    """A part of a picture for each key, as (left, top, width, height) in pixels, float32 (rows, 4).

    The first of ten drawn shapes that fits into the picture, else the largest in the middle within `ratio`
    (Szegedy et al., "Going deeper with convolutions", 2014).
    """
    tries = 10
    area = uniform(keys, stream_of("crop.area"), min_scale, max_scale, n=tries) * (height * width)
    shape = uniform(keys, stream_of("crop.ratio"), math.log(ratio[0]), math.log(ratio[1]), n=tries).exp()
    w, h = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (w <= width) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    across, down = uniform(keys, stream_of("crop.place"), n=2).unbind(-1)
    drawn = torch.stack([(width - w) * across, (height - h) * down, w, h], dim=-1)
    mw, mh = middle_crop(height, width, ratio)
    middle = torch.tensor([(width - mw) / 2, (height - mh) / 2, mw, mh], device=keys.device)
    return torch.where(fits.any(dim=1, keepdim=True), drawn, middle)


def _of_box(box: torch.Tensor, height: int, width: int) -> torch.Tensor:
    left, top, w, h = box.unbind(-1)
    x, y = w / width, h / height
    return _rows(x, 0, (2 * left + w) / width - 1, 0, y, (2 * top + h) / height - 1)


# --- moving --------------------------------------------------------------------------------------------------------------


def height_and_width(size: Any, name: str) -> tuple[int, int]:
    """A side or a pair as (height, width). ValueError when it is neither."""
    sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
        raise ValueError(f"{name} takes a side or (height, width) in pixels, at least 1, not {size!r}")
    return sizes


def _height_and_width_of(x: Any) -> tuple[int, int]:
    # Of the first picture or mask; points alone are taken to lie on a square.
    found = _pictures(x)
    return (int(found[0].shape[-2]), int(found[0].shape[-1])) if found else (1, 1)


def _pictures(x: Any) -> list[Any]:
    if isinstance(x, tuple):
        return [p for e in x for p in _pictures(e)]
    return [x] if isinstance(x, TensorImage | TensorMask) else []


def _rows(*entries: torch.Tensor | float) -> torch.Tensor:
    # The six entries of an affine matrix, each a number or (rows,), as (rows, 3, 3).
    first = next(e for e in entries if isinstance(e, torch.Tensor))
    full = [e if isinstance(e, torch.Tensor) else torch.full_like(first, e) for e in (*entries, 0, 0, 1)]
    return torch.stack(full, dim=-1).view(-1, 3, 3)


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The way back of projective matrices (rows, 3, 3), up to a factor, which such matrices do not know."""
    # By cross products: torch's own inverse would wait for the GPU to say whether there is one.
    a, b, c = matrix.unbind(dim=1)
    return torch.stack([torch.linalg.cross(*pair) for pair in ((b, c), (c, a), (a, b))], dim=-1)


def _sampled(x: torch.Tensor, drawn: Drawn, mode: str, pad_mode: str, align_corners: bool) -> torch.Tensor:
    # As two planes, not as pairs: half the time of torch's affine_grid and its multiplication of 3 by 2 matrices.
    matrix = drawn.matrix.to(x.device)
    height, width = drawn.after
    across, down = (_steps(n, align_corners, x.device) for n in (width, height))
    along_x = matrix[:, :, 0, None] * across  # (rows, 3, width)
    along_y = matrix[:, :, 1, None] * down + matrix[:, :, 2, None]  # (rows, 3, height)
    coordinates = along_x[:, :2, None, :] + along_y[:, :2, :, None]  # (rows, 2, height, width)
    coordinates /= along_x[:, 2:, None, :] + along_y[:, 2:, :, None]
    grid = coordinates.permute(0, 2, 3, 1).expand(len(x), -1, -1, -1).to(x.dtype)
    return F.grid_sample(x, grid, mode=mode, padding_mode=pad_mode, align_corners=align_corners)


def _steps(n: int, align_corners: bool, device: torch.device) -> torch.Tensor:
    edge = 1.0 if align_corners and n > 1 else 1 - 1 / n
    return torch.linspace(-edge, edge, n, device=device)


def _points_moved(points: torch.Tensor, drawn: Drawn, align_corners: bool) -> torch.Tensor:
    # Points lie between the outer edges of a picture; where the matrix counts between the centres of its outermost pixels,
    # they are scaled on the way in and out.
    back = inverse(drawn.matrix).to(points.device)
    there, here = (_scale(size, align_corners, points) for size in (drawn.before, drawn.after))
    x, y = (points * there).unbind(-1)
    u, v, w = (back[:, i, 0, None] * x + back[:, i, 1, None] * y + back[:, i, 2, None] for i in range(3))
    return torch.stack([u / w, v / w], dim=-1) / here


def _scale(size: tuple[int, int], align_corners: bool, like: torch.Tensor) -> torch.Tensor:
    height, width = size
    scale = [n / (n - 1) if align_corners and n > 1 else 1.0 for n in (width, height)]
    return torch.tensor(scale, dtype=like.dtype, device=like.device)
