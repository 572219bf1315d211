"""U-Net over any encoder: what it saw at each size comes back on the way up (Ronneberger et al., arXiv:1505.04597)."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks.errors import UserError
from training.layers import ConvLayer, PixelShuffle_ICNR, ResBlock, SelfAttention, SigmoidRange
from training.models import image_model, model_builder
from training.transfer import create_body, layers_of, num_features

PROBE = (64, 96)  # the size of the picture on which the encoder's layers are measured


class DynamicUnet(nn.Module):
    """A prediction for each pixel, from the features of `encoder`: (rows, n_in, h, w) -> (rows, n_out, h, w).

    Any h and w: what is larger or smaller by rounding is brought to the size of what it meets. self_attention: one layer of it,
    three sizes from the end. blur: against the pattern of growing pixels. y_range: squeezes the output into it. fastai's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_out: int,
        n_in: int = 3,
        self_attention: bool = False,
        blur: bool = False,
        y_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        channels = num_features(encoder, n_in)
        above = sizes_of(encoder, n_in)[1:]
        if not above:
            raise UserError(
                f"{type(encoder).__name__} gives all of its layers' outputs in one size: a U-Net has nothing to go back to"
            )
        self._skips, widths = [size.layer for size in above], [size.channels for size in above]
        self.middle = nn.Sequential(ConvLayer(channels, channels * 2), ConvLayer(channels * 2, channels))
        ups: list[nn.Module] = []
        for i, width in enumerate(widths):
            ups.append(_Up(channels, width, blur, self_attention and i == max(len(widths) - 3, 0)))
            channels = (channels // 2 + width) // 2
        self.ups = nn.ModuleList(ups)
        self.last = PixelShuffle_ICNR(channels, blur=blur)
        self.out = nn.Sequential(
            ResBlock(1, channels + n_in, channels + n_in), ConvLayer(channels + n_in, n_out, ks=1, norm=None, act_cls=None)
        )
        if y_range is not None:
            self.out.append(SigmoidRange(*y_range))

    def forward(self, x: Tensor) -> Tensor:
        y, seen = seen_on_the_way(self.encoder, self._skips, x)
        y = self.middle(F.relu(y))
        for up, n in zip(self.ups, self._skips, strict=True):
            y = up(y, seen[n])
        if y.shape[2:] != x.shape[2:]:
            y = _as_large_as(self.last(y), x)
        return self.out(torch.cat([y, x], dim=1))


class _Up(nn.Module):
    """Twice as large, beside what the encoder saw at that size: (rows, ni, h, w) -> (rows, (ni / 2 + width) / 2, 2h, 2w)."""

    def __init__(self, ni: int, width: int, blur: bool, attention: bool):
        super().__init__()
        self.shuffle = PixelShuffle_ICNR(ni, ni // 2, blur=blur)
        self.norm = nn.BatchNorm2d(width)
        both = ni // 2 + width
        self.convs = nn.Sequential(ConvLayer(both, both // 2), ConvLayer(both // 2, both // 2))
        if attention:
            self.convs.append(SelfAttention(both // 2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.convs(F.relu(torch.cat([_as_large_as(self.shuffle(x), seen), self.norm(seen)], dim=1)))


def _as_large_as(x: Tensor, other: Tensor) -> Tensor:
    return x if x.shape[2:] == other.shape[2:] else F.interpolate(x, other.shape[2:], mode="nearest")


def _keep(seen: dict[int, Tensor], number: int, module: nn.Module, given: Any, result: Tensor) -> None:
    seen[number] = result


class Size(NamedTuple):
    """A size of an encoder's outputs: its last layer of that size (a number of `layers_of`), channels, pixels a place."""

    layer: int
    channels: int
    stride: int


def sizes_of(encoder: nn.Module, n_in: int = 3) -> list[Size]:
    """The sizes that an encoder's outputs pass through, the smallest, which is the last, first."""
    layers = layers_of(encoder)
    was_training = encoder.training
    try:
        with torch.no_grad():
            _, outputs = seen_on_the_way(encoder.eval(), range(len(layers)), torch.zeros(1, n_in, *PROBE))
    finally:
        encoder.train(was_training)
    maps = {n: x for n, x in outputs.items() if isinstance(x, Tensor) and x.ndim == 4}
    by_height = {x.shape[2]: Size(n, x.shape[1], PROBE[0] // x.shape[2]) for n, x in maps.items()}
    return sorted(by_height.values(), reverse=True)


def seen_on_the_way(encoder: nn.Module, layers: Iterable[int], x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The encoder's output for `x`, and what some of its layers (numbers of `layers_of`) gave."""
    seen: dict[int, Tensor] = {}
    found = layers_of(encoder)
    handles = [found[n].register_forward_hook(partial(_keep, seen, n)) for n in layers]
    try:
        return encoder(x), seen
    finally:
        for handle in handles:
            handle.remove()


@model_builder
def unet_model(
    *,
    arch: str,
    n_out: int,
    n_in: int = 3,
    cut: int | None = None,
    self_attention: bool = False,
    blur: bool = False,
    y_range: Sequence[float] | None = None,
) -> nn.Module:
    """A U-Net whose encoder is the body of a classifier of torchvision or timm, by its name there, with random weights.

    (rows, n_in, h, w) -> (rows, n_out, h, w). The encoder is the first child: `body_and_head`'s and `halves_and_head`'s body.
    """
    encoder = create_body(image_model(arch), n_in, cut)
    limits = None if y_range is None else (y_range[0], y_range[1])
    return DynamicUnet(encoder, n_out, n_in, self_attention, blur, limits)
