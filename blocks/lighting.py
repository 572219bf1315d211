"""Random light and colour of a batch of pictures, and rectangles of noise over them.

Brightness, contrast and saturation are linear in the logit of a pixel, as in fastai: z becomes own * z + grey * (z's shade of
grey) + bias, three numbers a sample. Such maps compose to one, so neighbours in a Pipeline share one way to logits and back.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from blocks.draws import bernoulli, normal, randint, stream_of, uniform
from blocks.pieces import ByPiece, floats
from blocks.tensors import TensorImage
from blocks.transform import RandTransform, Transform, with_own_keys

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the shade of grey of red, green and blue; together 1


@dataclass(frozen=True)
class Light:
    """What becomes of the logits of each sample, float32 (rows,)."""

    own: torch.Tensor
    grey: torch.Tensor
    bias: torch.Tensor

    def __getitem__(self, rows: slice) -> "Light":
        return Light(self.own[rows], self.grey[rows], self.bias[rows])


@dataclass
class _Lighting(ByPiece, RandTransform, registered=False):
    """What they share. batch: draw once, for all samples of a batch alike."""

    batch: bool = field(default=False, kw_only=True)

    order: ClassVar[int] = 40
    mixes: ClassVar[bool] = False  # whether `grey` is anything but zero

    def light(self, keys: torch.Tensor) -> Light:
        """What becomes of each sample's logits."""
        raise NotImplementedError

    def draw(self, x: Any, keys: torch.Tensor) -> Light:
        return self.light(keys[:1].expand_as(keys) if self.batch else keys)

    def encodes(self, x: TensorImage, drawn: Light) -> torch.Tensor:
        own, grey, bias = (d.to(x.device)[:, None, None, None] for d in (drawn.own, drawn.grey, drawn.bias))
        # The logit with its sign turned, log(1/x - 1): a step less over all pixels. In place, in one buffer of its own.
        turned = floats(x).clamp(1e-7, 1 - 1e-7).reciprocal_().sub_(1).log_()
        if any(t.mixes for t in self.parts):
            shade = _shade(turned).mul_(grey)
            turned.mul_(own).add_(shade)
        else:
            turned.mul_(own)
        return turned.neg_().add_(bias).sigmoid_()

    def compose_with(self, other: Transform) -> Transform | None:
        if isinstance(other, _Lighting):
            return LightingTfm((*self.parts, *other.parts))
        return super().compose_with(other)

    @property
    def parts(self) -> "tuple[_Lighting, ...]":
        return (self,)


@dataclass
class LightingTfm(_Lighting):
    """Several changes of light in a row, as one."""

    tfms: tuple[_Lighting, ...]

    @property
    def parts(self) -> tuple[_Lighting, ...]:
        return self.tfms

    def light(self, keys: torch.Tensor) -> Light:
        one = torch.ones(len(keys), device=keys.device)
        own, grey, bias = one, torch.zeros_like(one), torch.zeros_like(one)
        for t, own_keys in with_own_keys(self.tfms, keys):
            then = t.draw(None, own_keys)
            grey = then.own * grey + then.grey * (own + grey)
            own = then.own * own
            bias = (then.own + then.grey) * bias + then.bias
        return Light(own, grey, bias)


def _shade(x: torch.Tensor) -> torch.Tensor:
    # The shade of grey of (rows, channels, height, width), as one channel.
    match x.shape[1]:
        case 1:
            return x.clone()
        case 3:
            return torch.einsum("nchw,c->nhw", x, torch.tensor(LUMA, dtype=x.dtype, device=x.device))[:, None]
    raise ValueError(f"colours are mixed in pictures of 1 or 3 channels, not {x.shape[1]}: leave Saturation out")


@dataclass
class _UpTo(_Lighting, registered=False):
    """max_lighting: how far it goes; p: how often it acts on a sample."""

    max_lighting: float = 0.2
    p: float = field(default=0.75, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_lighting < 1:
            raise ValueError(f"{type(self).__name__} takes max_lighting from 0 to less than 1, not {self.max_lighting!r}")

    def _drawn(self, keys: torch.Tensor, low: float, high: float) -> torch.Tensor:
        # Zero where it does not act.
        name = type(self).__name__
        return uniform(keys, stream_of(name), low, high) * bernoulli(keys, stream_of(f"{name}.p"), self.p)

    def _times(self, keys: torch.Tensor) -> torch.Tensor:
        most = -math.log1p(-self.max_lighting)
        return self._drawn(keys, -most, most).exp()


@dataclass
class Brightness(_UpTo):
    """Lighter or darker: half grey becomes up to (1 +- max_lighting) / 2."""

    def light(self, keys: torch.Tensor) -> Light:
        half = 0.5 + self._drawn(keys, -self.max_lighting / 2, self.max_lighting / 2)
        one = torch.ones_like(half)
        return Light(one, torch.zeros_like(half), torch.logit(half))


@dataclass
class Contrast(_UpTo):
    """Logits times 1 - max_lighting to 1 / (1 - max_lighting), drawn evenly in the logarithm."""

    def light(self, keys: torch.Tensor) -> Light:
        times = self._times(keys)
        return Light(times, torch.zeros_like(times), torch.zeros_like(times))


@dataclass
class Saturation(_UpTo):
    """Logits away from their shade of grey, or towards it, by factors as `Contrast` has them."""

    mixes: ClassVar[bool] = True

    def light(self, keys: torch.Tensor) -> Light:
        times = self._times(keys)
        return Light(times, 1 - times, torch.zeros_like(times))


@dataclass
class Hue(ByPiece, RandTransform):
    """Colours turned around the circle of hues, by up to `max_hue` of it either way; pictures of 3 channels, 0..1."""

    max_hue: float = 0.1
    p: float = field(default=0.75, kw_only=True)
    batch: bool = field(default=False, kw_only=True)

    order: ClassVar[int] = 41  # after the transforms that work on logits, which can then be one

    def draw(self, x: Any, keys: torch.Tensor) -> torch.Tensor:
        if self.batch:
            keys = keys[:1].expand_as(keys)
        turn = uniform(keys, stream_of("Hue"), -self.max_hue, self.max_hue)
        return turn * bernoulli(keys, stream_of("Hue.p"), self.p)

    def encodes(self, x: TensorImage, drawn: torch.Tensor) -> torch.Tensor:
        plain = floats(x)
        if plain.shape[1] != 3:
            return plain  # grey has no hue
        hue, chroma, value = _hue_chroma_value(plain)
        hue = hue + 6 * drawn.to(x.device)[:, None, None]
        # Each channel falls from `value` by `chroma` as its own hue is further away (Smith, "Color gamut transform pairs",
        # 1978).
        away = hue[:, None] + torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
        away -= (away / 6).floor_().mul_(6)
        fall = torch.minimum(away, 4 - away).clamp_(0, 1)
        return torch.addcmul(value[:, None], chroma[:, None], fall, value=-1)


def _hue_chroma_value(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Of (rows, 3, height, width); the hue in sixths of the circle, red at 0.
    red, green, blue = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    # From the largest channel's place, as far as the one after it is larger than the one before.
    above, at = torch.where(green == value, blue - red, red - green), torch.where(green == value, 2.0, 4.0)
    above, at = torch.where(red == value, green - blue, above), torch.where(red == value, 0.0, at)
    return above / torch.where(chroma > 0, chroma, 1) + at, chroma, value


@dataclass
class RandomErasing(RandTransform):
    """Rectangles of normal noise over a picture that is normalised already.

    A picture gets one to `max_count` of them, each of `sl` to `sh` of its share of the area and a width by height between
    `min_aspect` and its inverse (Zhong et al., "Random erasing data augmentation", 2017).
    """

    sl: float = 0.0
    sh: float = 0.3
    min_aspect: float = 0.3
    max_count: int = 1
    p: float = field(default=0.5, kw_only=True)

    order: ClassVar[int] = 100  # after Normalize

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.sl <= self.sh <= 1 and 0 < self.min_aspect <= 1 and self.max_count >= 1):
            raise ValueError(
                f"RandomErasing takes 0 <= sl <= sh <= 1, 0 < min_aspect <= 1 and max_count of at least 1, not {self!r}"
            )

    def draw(self, x: Any, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rectangles as fractions (area, aspect, across, down), float32 (rows, max_count, 4), area 0 for none; the keys."""
        n = self.max_count
        count = 1 + randint(keys, stream_of("RandomErasing.count"), n)
        acts = bernoulli(keys, stream_of("RandomErasing.p"), self.p)
        used = (torch.arange(n, device=keys.device) < count[:, None]) & acts[:, None]
        area = uniform(keys, stream_of("RandomErasing.area"), self.sl, self.sh, n=n) / count[:, None] * used
        most = -math.log(self.min_aspect)
        aspect = uniform(keys, stream_of("RandomErasing.aspect"), -most, most, n=n).exp()
        place = uniform(keys, stream_of("RandomErasing.place"), n=2 * n)
        return torch.stack([area, aspect, place[:, :n], place[:, n:]], dim=-1), keys

    def encodes(self, x: TensorImage, drawn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rectangles, keys = (d.to(x.device) for d in drawn)
        height, width = x.shape[-2:]
        area, aspect, across, down = rectangles.unbind(-1)
        in_columns = _inside(width, (area * aspect * height * width).sqrt(), across)
        in_rows = _inside(height, (area / aspect * height * width).sqrt(), down)
        erased = (in_rows[..., :, None] & in_columns[..., None, :]).any(dim=1)  # (rows, height, width)
        row, y, pixel_x = erased.nonzero(as_tuple=True)
        result = floats(x).clone()
        noise = normal(keys[row] + y * width + pixel_x, stream_of("RandomErasing.noise"), n=x.shape[1])
        result[row, :, y, pixel_x] = noise.to(x.dtype)
        return result


def _inside(n: int, length: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    # Which of n pixels a rectangle of this length covers, bool (rows, count, n).
    length = length.round().clamp(max=n)
    start = ((n - length + 1) * place).floor()
    at = torch.arange(n, device=length.device)
    return (at >= start[..., None]) & (at < (start + length)[..., None])
