"""Losses that also know what the model's output means: `activation` makes it probabilities, `decodes` a prediction.

A loss is a small dataclass of plain data (class weights are numbers, not a tensor), so that it prints, compares, and is
rebuilt from an export; it is called with (pred, targ) on any device. The mean of some losses is not over rows: class weights
and ignored targets change its denominator. `sum_and_count` gives both halves of the mean, so that the shares of several
workers, or of several batches, add up to what one worker finds over all rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from blocks.errors import UserError
from blocks.tensors import TensorCategory, TensorMask, TensorMultiCategory, TensorNumber, TensorPoint, TensorSeries, TensorText

REDUCTIONS = ("mean", "sum", "none")
IGNORED = -100  # torch's own value for targets that do not count


@dataclass(kw_only=True)
class BaseLoss:
    """What the losses have in common. reduction: "mean", "sum", or "none" for a loss of the target's shape."""

    reduction: str = "mean"

    of_each_row: ClassVar[bool] = True  # whether reduction="none" has an answer

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r} is not known: one of {', '.join(REDUCTIONS)}")

    def __call__(self, pred: Tensor, targ: Tensor) -> Tensor:
        return self.compute(pred, targ, self.reduction)

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        """The loss, reduced as asked."""
        raise NotImplementedError

    def count(self, pred: Tensor, targ: Tensor) -> Tensor:
        """What the mean divides by: the number of targets, unless the loss says otherwise. A scalar."""
        return pred.new_tensor(targ.numel())

    def sum_and_count(self, pred: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        """The mean as its two halves: over any split of the rows, both add up, and sum / count is the mean of all."""
        return self.compute(pred, targ, "sum"), self.count(pred, targ)

    def activation(self, pred: Tensor) -> Tensor:
        """The model's output as probabilities or values."""
        return pred

    def decodes(self, pred: Tensor) -> Tensor:
        """The prediction: what the output or its activation says the target is."""
        return pred


@dataclass(kw_only=True)
class _ClassLoss(BaseLoss):
    """A loss of one score a class along `axis` against int64 class indices.

    weight: a factor for each class, as numbers or a tensor; None: all alike.
    """

    axis: int = -1
    weight: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight = _numbers(self.weight)

    def activation(self, pred: Tensor) -> Tensor:
        """Logits to probabilities along `axis`."""
        return F.softmax(pred, dim=self.axis)

    def decodes(self, pred: Tensor) -> Tensor:
        """The most probable class, int64, without `axis`."""
        return pred.argmax(dim=self.axis)

    def _logits(self, pred: Tensor, targ: Tensor) -> Tensor:
        # torch wants the classes second; where they are last, flat is the faster of its two kernels.
        logits = pred.flatten(0, -2) if self.axis in (-1, pred.ndim - 1) else pred.movedim(self.axis, 1)
        if logits.numel() != targ.numel() * logits.shape[1]:
            raise ValueError(
                f"the prediction {tuple(pred.shape)} has {logits.shape[1]} classes along axis {self.axis}, which does not fit "
                f"the target {tuple(targ.shape)}: give the loss the axis of the classes, {type(self).__name__}(axis=1) for "
                "(rows, classes, height, width)"
            )
        return logits

    def _weights(self, pred: Tensor) -> Tensor | None:
        return None if self.weight is None else pred.new_tensor(self.weight)


@dataclass(kw_only=True)
class CrossEntropyLossFlat(_ClassLoss):
    """Cross entropy of logits with the classes along `axis`, and int64 targets of the same shape without that axis.

    Targets equal to `ignore_index` do not count. label_smoothing: the share of each target that is spread over all classes
    (Szegedy et al., arXiv:1512.00567). The mean is over the weights of the targets that count, as torch's.
    """

    ignore_index: int = IGNORED
    label_smoothing: float = 0.0

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        logits = self._logits(pred, targ)
        loss = F.cross_entropy(
            logits,
            targ.flatten() if logits.ndim == 2 else targ,
            weight=self._weights(pred),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )
        return loss.reshape(targ.shape) if reduction == "none" else loss

    def count(self, pred: Tensor, targ: Tensor) -> Tensor:
        """The sum of the weights of the targets that count."""
        counts = targ != self.ignore_index
        weights = self._weights(pred)
        return counts.sum().to(pred.dtype) if weights is None else weights[targ[counts]].sum()


def LabelSmoothingCrossEntropyFlat(eps: float = 0.1, **settings: Any) -> CrossEntropyLossFlat:  # noqa: N802  fastai's name
    """Cross entropy with a share `eps` of each target spread over all classes; `settings` are CrossEntropyLossFlat's."""
    return CrossEntropyLossFlat(label_smoothing=eps, **settings)


LabelSmoothingCrossEntropy = LabelSmoothingCrossEntropyFlat  # fastai has both names; ours needs no flattening


@dataclass(kw_only=True)
class FocalLossFlat(_ClassLoss):
    """Cross entropy times (1 - p) ** gamma, p being the probability of the target: what is easy counts less.

    Lin et al., arXiv:1708.02002, whose alpha is `weight`; the mean is over the number of targets.
    """

    gamma: float = 2.0

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        logits = self._logits(pred, targ)
        classes = targ.flatten() if logits.ndim == 2 else targ
        plain = F.cross_entropy(logits, classes, reduction="none")
        loss = (1 - torch.exp(-plain)) ** self.gamma * plain
        weights = self._weights(pred)
        return _reduced((loss if weights is None else loss * weights[classes]).reshape(targ.shape), reduction)


@dataclass(kw_only=True)
class FocalLoss(FocalLossFlat):
    """`FocalLossFlat` with the classes second."""

    axis: int = 1


@dataclass(kw_only=True)
class DiceLoss(_ClassLoss):
    """1 - the Dice coefficient of the class probabilities and the target, of each row and class (Milletari, arXiv:1606.04797).

    Logits have the classes along `axis`, targets are int64 without it. With "none" the loss is (rows, classes); fastai's
    default reduction is "sum", ours is the mean, as a Learner's loss is one. smooth: added to both halves of the fraction;
    square_in_union: squared probabilities below.
    """

    axis: int = 1
    smooth: float = 1e-6
    square_in_union: bool = False

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        probabilities = self.activation(pred).movedim(self.axis, 1).flatten(2)
        hot = F.one_hot(targ.flatten(1), probabilities.shape[1]).movedim(-1, 1).to(pred.dtype)
        common = (probabilities * hot).sum(2)
        both = ((probabilities.square() if self.square_in_union else probabilities) + hot).sum(2)
        loss = 1 - (2 * common + self.smooth) / (both + self.smooth)
        weights = self._weights(pred)
        return _reduced(loss if weights is None else loss * weights, reduction)

    def count(self, pred: Tensor, targ: Tensor) -> Tensor:
        """Rows times classes."""
        return pred.new_tensor(len(pred) * pred.shape[self.axis])


@dataclass(kw_only=True)
class _ValueLoss(BaseLoss):
    """A loss of values against as many targets; (rows, 1) fits (rows,)."""

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        if pred.numel() != targ.numel():
            raise ValueError(
                f"{type(self).__name__}: the prediction {tuple(pred.shape)} and the target {tuple(targ.shape)} have not the "
                "same number of values: the model must give as many outputs as there are targets"
            )
        return self.of_values(pred.reshape(targ.shape), targ.to(pred.dtype), reduction)

    def of_values(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        """The loss of floats of one shape."""
        raise NotImplementedError


@dataclass(kw_only=True)
class BCEWithLogitsLossFlat(_ValueLoss):
    """Binary cross entropy of logits and targets 0..1, one a class.

    weight: a factor, and pos_weight: a factor for the positives, each a number a class (the last axis). thresh: the
    probability from which a class is predicted.
    """

    thresh: float = 0.5
    weight: Sequence[float] | Tensor | None = None
    pos_weight: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight, self.pos_weight = _numbers(self.weight), _numbers(self.pos_weight)

    def of_values(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        weight = None if self.weight is None else pred.new_tensor(self.weight)
        pos_weight = None if self.pos_weight is None else pred.new_tensor(self.pos_weight)
        return F.binary_cross_entropy_with_logits(pred, targ, weight, pos_weight=pos_weight, reduction=reduction)

    def activation(self, pred: Tensor) -> Tensor:
        """Logits to probabilities, one by one."""
        return torch.sigmoid(pred)

    def decodes(self, pred: Tensor) -> Tensor:
        """Whether each probability is above `thresh`."""
        return pred > self.thresh


@dataclass(kw_only=True)
class BCELossFlat(_ValueLoss):
    """Binary cross entropy of probabilities and targets 0..1. thresh: the probability from which a class is predicted."""

    thresh: float = 0.5

    def of_values(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        return F.binary_cross_entropy(pred, targ, reduction=reduction)

    def decodes(self, pred: Tensor) -> Tensor:
        """Whether each probability is above `thresh`."""
        return pred > self.thresh


@dataclass(kw_only=True)
class MSELossFlat(_ValueLoss):
    """The squared difference."""

    def of_values(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        return F.mse_loss(pred, targ, reduction=reduction)


@dataclass(kw_only=True)
class L1LossFlat(_ValueLoss):
    """The absolute difference."""

    def of_values(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        return F.l1_loss(pred, targ, reduction=reduction)


@dataclass(kw_only=True)
class QuantileLoss(BaseLoss):
    """How far off forecasts of quantiles are, (..., quantiles) against values (...): the pinball loss (Koenker, 1978).

    quantiles: which ones the last axis holds. The prediction is the one nearest to the median, the higher of two.
    """

    quantiles: Sequence[float] = (0.1, 0.5, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantiles = tuple(float(q) for q in self.quantiles)
        if not self.quantiles or not all(0 < q < 1 for q in self.quantiles) or list(self.quantiles) != sorted(self.quantiles):
            raise ValueError(f"quantiles are numbers between 0 and 1 in rising order, not {self.quantiles!r}")

    def compute(self, pred: Tensor, targ: Tensor, reduction: str) -> Tensor:
        if pred.shape != (*targ.shape, len(self.quantiles)):
            raise ValueError(
                f"the prediction {tuple(pred.shape)} is not {len(self.quantiles)} quantiles of {tuple(targ.shape)}"
            )
        below = targ[..., None] - pred
        loss = torch.maximum(below * pred.new_tensor(self.quantiles), below * (pred.new_tensor(self.quantiles) - 1)).mean(-1)
        return _reduced(loss, reduction)

    def decodes(self, pred: Tensor) -> Tensor:
        """The quantile nearest to the median."""
        return pred[..., min(reversed(range(len(self.quantiles))), key=lambda i: abs(self.quantiles[i] - 0.5))]


def _numbers(weight: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    if weight is None:
        return None
    return tuple(float(w) for w in (weight.tolist() if isinstance(weight, Tensor) else weight))


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "mean":
            return loss.mean()
        case "sum":
            return loss.sum()
    return loss


# --- which loss, and losses in exports ---------------------------------------------------------------------------------

LOSSES: dict[str, type[BaseLoss]] = {
    loss.__name__: loss
    for loss in (
        CrossEntropyLossFlat,
        FocalLossFlat,
        FocalLoss,
        DiceLoss,
        BCEWithLogitsLossFlat,
        BCELossFlat,
        MSELossFlat,
        L1LossFlat,
        QuantileLoss,
    )
}

_USUAL: dict[type[Tensor], BaseLoss] = {
    TensorCategory: CrossEntropyLossFlat(),
    TensorMask: CrossEntropyLossFlat(axis=1),
    TensorText: CrossEntropyLossFlat(),
    TensorMultiCategory: BCEWithLogitsLossFlat(),
    TensorNumber: MSELossFlat(),
    TensorPoint: MSELossFlat(),
    TensorSeries: MSELossFlat(),
}


def loss_for(target: type[Tensor]) -> BaseLoss:
    """The usual loss for targets of this type. ValueError when there is none: give the Learner a `loss_func`."""
    for kind, loss in _USUAL.items():
        if issubclass(target, kind):
            return dataclasses.replace(loss)
    raise ValueError(
        f"no usual loss is known for targets of type {target.__name__}: pass loss_func=... to the Learner "
        f"(known: {', '.join(f'{kind.__name__} -> {type(loss).__name__}' for kind, loss in _USUAL.items())})"
    )


def loss_to_plain(loss: Any) -> dict[str, Any]:
    """One of our losses as its name and settings. UserError for any other: an export holds data, not code."""
    if type(loss) not in LOSSES.values():
        raise UserError(f"{loss!r} is not one of the losses an export can name: {', '.join(LOSSES)}")
    return {"name": type(loss).__name__, **dataclasses.asdict(loss)}


def loss_from_plain(plain: dict[str, Any]) -> BaseLoss:
    """The loss that `loss_to_plain` described. UserError for a name or settings that no loss of ours has."""
    settings = dict(plain)
    name = settings.pop("name", None)
    if name not in LOSSES:
        import training

        getattr(training, str(name), None)  # loads the file of ours that defines it
    if name not in LOSSES:
        raise UserError(f"it names the loss {name!r}; known: {', '.join(LOSSES)}")
    allowed = {f.name for f in dataclasses.fields(LOSSES[name])}
    if set(settings) != allowed:
        raise UserError(f"the loss {name} has the settings {sorted(allowed)}, but the file gives {sorted(settings)}")
    return LOSSES[name](**settings)


def loss_per_row(loss_func: Callable[..., Tensor], pred: Tensor, *targets: Tensor) -> Tensor:
    """Each row's own loss, (rows,): the mean over its targets. TypeError for a loss function without `reduction`.

    Works for ours and for torch's, whose `reduction` is "none" for the moment.
    """
    reduction = getattr(loss_func, "reduction", None)
    if reduction is None:
        name = getattr(loss_func, "__name__", type(loss_func).__name__)
        raise TypeError(f"{name} has no `reduction`, so it cannot give each row's own loss: use one of {', '.join(LOSSES)}")
    loss_func.reduction = "none"  # type: ignore[attr-defined]
    try:
        losses = loss_func(pred, *targets)
    finally:
        loss_func.reduction = reduction  # type: ignore[attr-defined]
    rows = len(targets[0])
    if losses.ndim == 0 or losses.numel() % rows:
        raise ValueError(f"{loss_func!r} gave a loss of shape {tuple(losses.shape)} for {rows} rows with reduction='none'")
    return losses.reshape(rows, -1).mean(1)
