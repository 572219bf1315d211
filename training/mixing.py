"""MixUp and CutMix: each row of a training batch is mixed with another one, and so are the losses of their targets.

What is random is drawn by the keys of the batch's rows (`blocks.draws`). The partner comes from the rows of the same rank.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blocks.draws import stream_of, uniform
from blocks.tensors import as_plain
from training.callback import Callback
from training.losses import loss_per_row

if TYPE_CHECKING:
    from training.learner import Learner


class _Mixing(Callback):
    """The part that both share: `mixed` makes the inputs and says how much of its own target each row keeps."""

    def __init__(self, alpha: float):
        if not alpha > 0:
            raise ValueError(f"alpha shapes the distribution of the shares and is above 0, not {alpha!r}")
        self.alpha = alpha

    def mixed(self, x: Tensor, partner: Tensor, share: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def before_batch(self, learn: "Learner") -> None:
        self._others: tuple[Any, ...] = ()
        if learn.training:
            keys = learn.keys
            order = uniform(keys, stream_of(f"{self.name} partner")).argsort()
            partner = torch.empty_like(order)
            partner[order] = order.roll(1)  # in a circle, so that each row is a partner once
            drawn = beta_quantile(self.alpha, uniform(keys, stream_of(f"{self.name} share")))
            learn.xb = tuple(self._mix(x, partner, drawn, keys) for x in learn.xb)
            self._others = tuple(as_plain(y)[partner] for y in learn.yb)

    def _mix(self, x: Tensor, partner: Tensor, share: Tensor, keys: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"{self.name} mixes inputs of floating point numbers, not {x.dtype} (of token ids, mix embeddings)")
        new, self._share = self.mixed(x, x[partner], share, keys)
        return new

    def after_loss(self, learn: "Learner") -> None:
        if learn.training and self._others:
            own = loss_per_row(learn.loss_func, learn.pred, *map(as_plain, learn.yb))
            other = loss_per_row(learn.loss_func, learn.pred, *self._others)
            learn.loss_grad = torch.lerp(other, own, self._share).mean()
            learn.loss = learn.loss_grad.detach().clone()
            learn.loss_count = learn.rows  # what it is the mean over now


class MixUp(_Mixing):
    """Trains on weighted means of two rows and their losses (Zhang et al., arXiv:1710.09412); fastai's.

    alpha: of the Beta distribution the weight is drawn from, one a row; the larger, the more is mixed.
    """

    def __init__(self, alpha: float = 0.4):
        super().__init__(alpha)

    def mixed(self, x: Tensor, partner: Tensor, share: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.maximum(share, 1 - share)  # so that a row keeps its own at least as much as its partner's
        return torch.lerp(partner, x, _over(own, x)), own


class CutMix(_Mixing):
    """Trains on pictures (rows, channels, h, w) with a box of another one's pixels (Yun et al., arXiv:1905.04899); fastai's.

    The losses are weighted by the area. alpha: of the Beta distribution the area is drawn from. Each row has a box of its own.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__(alpha)

    def mixed(self, x: Tensor, partner: Tensor, share: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        side = (1 - share).sqrt()
        middle = uniform(keys, stream_of("CutMix middle"), n=2)
        in_box = _between(height, middle[:, 0], side)[:, :, None] & _between(width, middle[:, 1], side)[:, None, :]
        own = 1 - in_box.float().mean(dim=(1, 2))
        return torch.where(in_box[:, None], partner, x), own


def _between(size: int, middle: Tensor, side: Tensor) -> Tensor:
    # Which of `size` pixels lie within half of `side` from the middle, both shares of the size: bool (rows, size).
    pixels = (torch.arange(size, device=middle.device) + 0.5) / size
    return (pixels - middle[:, None]).abs() * 2 <= side[:, None]


def _over(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *(1 for _ in range(x.ndim - 1)))


def beta_quantile(alpha: float, p: Tensor) -> Tensor:
    """The quantiles at `p` of the distribution Beta(alpha, alpha), float32, linear between 4,097 points."""
    table = _quantiles(alpha).to(p.device)
    position = p * (len(table) - 1)
    below = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below)


@cache
def _quantiles(alpha: float) -> Tensor:
    import numpy as np
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, 4097)).astype(np.float32))
