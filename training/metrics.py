"""Metrics under fastai's names, exact over all rows however they are shared among batches and workers.

A metric takes in batches, has a `state` that is plain data, and makes its value of the states of all workers together. Three
kinds do for all of them:

    AvgMetric      a mean over rows: a sum and a count. A plain function of (pred, targ) is enough
    TorchMetric    one of torchmetrics' whose states are sums (confusion counts, squared errors): bounded memory
    AccumMetric    a function of all rows at once (areas under curves, ranks): keeps predictions and targets

The factories below (`F1Score()`, `RocAuc()`, ...) make these. `pred` is the model's output, before the loss's activation.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import distributed
from training.losses import BaseLoss, CrossEntropyLossFlat, L1LossFlat, MSELossFlat

if TYPE_CHECKING:
    import torchmetrics

# Of (pred, targ), or (pred, *targets) where there are several: the mean over a batch's rows; or a sum and what to divide it by,
# where that is not the number of rows.
MetricFunction = Callable[..., Tensor | float | tuple[Tensor, Tensor]]
Prepare = Callable[..., tuple[Any, Any]]


class Metric:
    """What a metric is to a Learner: `reset`, then `accumulate` for each batch, then `value` of all workers' states."""

    name: str
    higher_is_better: bool

    def reset(self) -> None:
        """Forget what was accumulated."""
        raise NotImplementedError

    def accumulate(self, pred: Any, targ: Any, rows: int) -> None:
        """Take in one batch of `rows` rows. targ: the target, a tuple of several."""
        raise NotImplementedError

    def state(self) -> Any:
        """What was accumulated, as plain data; None when nothing was."""
        raise NotImplementedError

    def value(self, states: Sequence[Any]) -> float:
        """The metric over the rows of all these states, none of them None."""
        raise NotImplementedError


def _name(function: Any) -> str:
    whole = function.func if isinstance(function, partial) else function
    return getattr(whole, "__name__", type(whole).__name__)


def _called(function: Callable[..., Any], name: str, pred: Any, targ: Any) -> Any:
    """`function` of the prediction and all targets. ValueError for one that takes a single target where there are several."""
    if not isinstance(targ, tuple):
        return function(pred, targ)
    parameters = inspect.signature(function).parameters.values()
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    # A default is a setting, such as accuracy's axis.
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if not any_number and len(positional) != 1 + len(targ):
        raise ValueError(
            f"the metric {name} is of one target, but the data has {len(targ)}: make it a function of all of them, such as "
            "AvgMetric(lambda pred, first, second: accuracy(pred[0], first), name='first accuracy')"
        )
    return function(pred, *targ)


def values_over_ranks(metrics: Iterable[Metric]) -> dict[str, float]:
    """Each metric over all rows of all ranks, by name; a metric without rows is left out. Every rank must call it."""
    metrics = list(metrics)
    by_rank = distributed.gather([m.state() for m in metrics]) if metrics else []
    found = {}
    for metric, states in zip(metrics, zip(*by_rank, strict=True), strict=True):
        some = [s for s in states if s is not None]
        if some:
            found[metric.name] = metric.value(some)
    return found


# --- means over rows -----------------------------------------------------------------------------------------------------


@dataclass
class AvgMetric(Metric):
    """The mean over rows of a function of (pred, targ) that is itself a mean over the rows of a batch.

    A function may give (sum, count) instead, for a mean over something else. then: what the mean becomes in the end.
    """

    function: MetricFunction
    higher_is_better: bool = True
    name: str = ""
    then: Callable[[float], float] | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64), repr=False)

    def __post_init__(self) -> None:
        self.name = self.name or _name(self.function)

    def reset(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    def accumulate(self, pred: Any, targ: Any, rows: int) -> None:
        found = _called(self.function, self.name, pred, targ)
        try:
            total, count = map(_number, found) if isinstance(found, tuple) else (_number(found) * rows, rows)
        except (TypeError, ValueError, RuntimeError) as error:
            call = f". Call it first: metrics={self.name}()" if isinstance(found, Metric) else ""
            raise TypeError(
                f"the metric {self.name} gave {found!r:.200}: it is a number, the mean over rows, or (sum, count){call}"
            ) from error
        self.total += torch.tensor([total, count], dtype=torch.float64)

    def state(self) -> tuple[float, float] | None:
        return (float(self.total[0]), float(self.total[1])) if self.total[1] > 0 else None

    def value(self, states: Sequence[tuple[float, float]]) -> float:
        mean = sum(s for s, _ in states) / sum(n for _, n in states)
        return mean if self.then is None else self.then(mean)


def _number(half: Any) -> float:
    return float(half.detach() if isinstance(half, Tensor) else half)


def accuracy(pred: Tensor, targ: Tensor, axis: int = -1) -> Tensor:
    """The share of targets that are where `pred` is largest along `axis`, as a scalar."""
    # Double, since in float32 it would not add up to whole rows over many batches.
    return _equal(pred.argmax(dim=axis), targ).double().mean()


def error_rate(pred: Tensor, targ: Tensor, axis: int = -1) -> Tensor:
    """1 - accuracy."""
    return 1 - accuracy(pred, targ, axis)


def top_k_accuracy(pred: Tensor, targ: Tensor, k: int = 5, axis: int = -1) -> Tensor:
    """The share of targets that are among the `k` largest of `pred` along `axis`."""
    best = pred.movedim(axis, -1).topk(k, dim=-1).indices
    return (best == _alike(best[..., 0], targ).unsqueeze(-1)).any(-1).double().mean()


def accuracy_multi(pred: Tensor, targ: Tensor, thresh: float = 0.5, sigmoid: bool = True) -> Tensor:
    """The share of right answers of several labels: whether the probability is above `thresh` or not."""
    return _equal((pred.sigmoid() if sigmoid else pred) > thresh, targ.bool()).double().mean()


def foreground_acc(pred: Tensor, targ: Tensor, bkg_idx: int = 0, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Right pixels among those whose target is not the background, as (sum, count)."""
    foreground = _alike(pred.argmax(dim=axis), targ) != bkg_idx
    return _equal(pred.argmax(dim=axis), targ)[foreground].sum(), foreground.sum()


def _equal(said: Tensor, targ: Tensor) -> Tensor:
    return said == _alike(said, targ)


def _alike(said: Tensor, targ: Tensor) -> Tensor:
    # (rows, 1) fits (rows,), as for the losses; compared as they are, each row would meet every other one.
    if said.numel() != targ.numel():
        raise ValueError(
            f"the metric compares predictions of shape {tuple(said.shape)} with targets of shape {tuple(targ.shape)}: "
            "give it the axis of the classes, such as partial(accuracy, axis=1) for (rows, classes, height, width)"
        )
    return targ.reshape(said.shape)


def mse(pred: Tensor, targ: Tensor) -> Tensor:
    """The mean squared error."""
    return MSELossFlat()(pred.double(), targ)


def mae(pred: Tensor, targ: Tensor) -> Tensor:
    """The mean absolute error."""
    return L1LossFlat()(pred.double(), targ)


def msle(pred: Tensor, targ: Tensor) -> Tensor:
    """The mean squared error of log(1 + x)."""
    return MSELossFlat()(pred.double().log1p(), targ.double().log1p())


def rmse(pred: Tensor, targ: Tensor) -> Tensor:
    """The root of the mean squared error; as a metric, of the mean over all rows."""
    return mse(pred, targ).sqrt()


def points_error(pred: Tensor, targ: Tensor) -> Tensor:
    """How far points (rows, n, 2) are off, in widths of their picture where it is square; the mean distance."""
    return (pred.double().reshape(targ.shape) - targ).norm(dim=-1).mean() / 2


def exp_rmspe(pred: Tensor, targ: Tensor) -> Tensor:
    """The root of the mean squared relative error of exp(x); as a metric, of the mean over all rows."""
    return _mspe_of_exp(pred, targ).sqrt()


def _mspe_of_exp(pred: Tensor, targ: Tensor) -> Tensor:
    targ = targ.double()
    return (1 - (pred.double().reshape(targ.shape) - targ).exp()).square().mean()


def Perplexity(loss: BaseLoss | None = None) -> AvgMetric:  # noqa: N802  this and the names below are fastai's
    """exp of the mean cross entropy over all targets that count."""
    cross_entropy = loss or CrossEntropyLossFlat()
    return AvgMetric(cross_entropy.sum_and_count, False, "perplexity", math.exp)


def LossMetric(attr: str, loss_func: Any, name: str = "", higher_is_better: bool = False) -> AvgMetric:  # noqa: N802
    """The mean over rows of what `loss_func` keeps of its last call as its attribute `attr`: a part of a combined loss."""
    return AvgMetric(lambda pred, targ: getattr(loss_func, attr), higher_is_better, name or attr)


def LossMetrics(attrs: str | Sequence[str], loss_func: Any) -> list[AvgMetric]:  # noqa: N802
    """A `LossMetric` for each attribute, named in a list or separated by commas."""
    names = attrs.split(",") if isinstance(attrs, str) else attrs
    return [LossMetric(name.strip(), loss_func) for name in names]


def BrierScore() -> AvgMetric:  # noqa: N802
    """The mean squared difference of the second class's probability and whether it is the target, of two classes."""

    def score(pred: Tensor, targ: Tensor) -> Tensor:
        probability, is_second = _last_probability(pred, targ)
        return probability.sub(is_second).square().mean()

    return AvgMetric(score, False, "brier_score_loss")


def BrierScoreMulti(sigmoid: bool = True) -> AvgMetric:  # noqa: N802
    """The mean squared difference of probabilities and targets of several labels."""
    return AvgMetric(
        lambda pred, targ: (pred.double().sigmoid() if sigmoid else pred.double()).sub(targ).square().mean(),
        False,
        "brier_score_loss",
    )


_LOWER_IS_BETTER = {error_rate, mse, mae, msle, points_error}
# Functions that are not means over rows, but functions of one.
_OF_A_MEAN: dict[Any, tuple[MetricFunction, Callable[[float], float]]] = {
    rmse: (mse, math.sqrt),
    exp_rmspe: (_mspe_of_exp, math.sqrt),
}


def as_metric(metric: Metric | MetricFunction) -> Metric:
    """A metric as it is; a function as its mean over rows."""
    if isinstance(metric, Metric):
        return metric
    if metric in _OF_A_MEAN:
        mean, then = _OF_A_MEAN[metric]
        return AvgMetric(mean, False, metric.__name__, then)
    if callable(metric) and metric not in (Metric, AvgMetric, TorchMetric, AccumMetric):
        whole = metric.func if isinstance(metric, partial) else metric
        return AvgMetric(metric, higher_is_better=whole not in _LOWER_IS_BETTER)
    raise TypeError(f"a metric is a function of (pred, targ) or a Metric such as AvgMetric, not {metric!r}")


# --- sums, by torchmetrics -------------------------------------------------------------------------------------------------


@dataclass
class TorchMetric(Metric):
    """A metric of torchmetrics whose states are sums. TypeError, once it is used, for one that keeps anything else.

    make: the number of classes (of outputs along `axis`) -> the metric, since it is only known from the first batch.
    prepare: (pred, targ) -> what its `update` takes. then: what its `compute` becomes in the end.
    """

    make: Callable[[int], "torchmetrics.Metric"]
    prepare: Prepare
    name: str
    higher_is_better: bool = True
    axis: int = -1
    then: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._metric: torchmetrics.Metric | None = None
        self._classes = 0

    def accumulate(self, pred: Any, targ: Any, rows: int) -> None:
        if self._metric is None:
            if not isinstance(pred, Tensor):
                raise TypeError(f"the metric {self.name} is of one output, not of a {type(pred).__name__}: use an AvgMetric")
            self._classes = pred.shape[self.axis]
            self._metric = self._new(self._classes)
        self._metric.update(*_called(self.prepare, self.name, _on_cpu(pred), _on_cpu(targ)))

    def _new(self, classes: int) -> "torchmetrics.Metric":
        from torchmetrics.utilities import dim_zero_sum

        metric = self.make(classes).set_dtype(torch.float64)
        others = [n for n, reduction in metric._reductions.items() if reduction is not dim_zero_sum]
        if others:
            raise TypeError(f"{type(metric).__name__} keeps {', '.join(others)}, which are no sums: use an AccumMetric")
        return metric

    def state(self) -> tuple[int, dict[str, Tensor]] | None:
        if self._metric is None:
            return None
        return self._classes, {name: torch.as_tensor(sums) for name, sums in self._metric.metric_state.items()}

    def value(self, states: Sequence[tuple[int, dict[str, Tensor]]]) -> float:
        metric = self._new(states[0][0])
        metric._update_count = 1  # else it warns that it has seen nothing
        for name in metric.metric_state:
            setattr(metric, name, torch.stack([state[name] for _, state in states]).sum(0))
        computed = metric.compute()
        return float(computed if self.then is None else self.then(computed))


def _best_class(pred: Tensor, targ: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return pred.argmax(dim=axis).flatten(), targ.flatten()


def _of_classes(torchs: str, name: str, axis: int, higher_is_better: bool = True, **settings: Any) -> TorchMetric:
    """One of torchmetrics' for several classes; average="binary": its counterpart for the second of two."""

    def make(classes: int) -> "torchmetrics.Metric":
        from torchmetrics import classification

        if settings.get("average") != "binary":
            return getattr(classification, f"Multiclass{torchs}")(num_classes=classes, **settings)
        if classes != 2:
            raise ValueError(f"{name}: average='binary' is for two classes, not {classes}: pass average='macro' or another")
        rest = {k: v for k, v in settings.items() if k not in ("average", "top_k")}
        return getattr(classification, f"Binary{torchs}")(**rest)

    return TorchMetric(make, partial(_best_class, axis=axis), name, higher_is_better, axis)


def _of_labels(
    torchs: str, name: str, thresh: float, sigmoid: bool, higher_is_better: bool = True, **settings: Any
) -> TorchMetric:
    """One of torchmetrics' for several labels at once, one an output."""

    def make(labels: int) -> "torchmetrics.Metric":
        from torchmetrics import classification

        return getattr(classification, f"Multilabel{torchs}")(num_labels=labels, **settings)

    def prepare(pred: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        return ((pred.sigmoid() if sigmoid else pred) > thresh).int(), targ.int()

    return TorchMetric(make, prepare, name, higher_is_better)


def F1Score(axis: int = -1, average: str = "binary") -> TorchMetric:  # noqa: N802
    """F1 of two classes; of more with average "macro", "micro" or "weighted". `axis`: where the classes are."""
    return _of_classes("F1Score", "f1_score", axis, average=average)


def FBeta(beta: float, axis: int = -1, average: str = "binary") -> TorchMetric:  # noqa: N802
    """F-beta of two classes, or of more by `average`."""
    return _of_classes("FBetaScore", "fbeta_score", axis, beta=beta, average=average)


def Precision(axis: int = -1, average: str = "binary") -> TorchMetric:  # noqa: N802
    """Precision of two classes, or of more by `average`."""
    return _of_classes("Precision", "precision_score", axis, average=average)


def Recall(axis: int = -1, average: str = "binary") -> TorchMetric:  # noqa: N802
    """Recall of two classes, or of more by `average`."""
    return _of_classes("Recall", "recall_score", axis, average=average)


def Jaccard(axis: int = -1, average: str = "binary") -> TorchMetric:  # noqa: N802
    """Intersection over union of two classes, or of more by `average`."""
    return _of_classes("JaccardIndex", "jaccard_score", axis, average=average)


def BalancedAccuracy(axis: int = -1) -> TorchMetric:  # noqa: N802
    """The mean over the classes that occur of the share of their targets that are found."""

    def mean_recall(confusion: Tensor) -> Tensor:
        targets = confusion.sum(1)
        return (confusion.diag() / targets)[targets > 0].mean()

    metric = _of_classes("ConfusionMatrix", "balanced_accuracy_score", axis)
    return dataclasses.replace(metric, then=mean_recall)


def CohenKappa(axis: int = -1, weights: str | None = None) -> TorchMetric:  # noqa: N802
    """Agreement beyond chance; weights: None, "linear" or "quadratic"."""
    return _of_classes("CohenKappa", "cohen_kappa_score", axis, weights=weights)


def MatthewsCorrCoef(axis: int = -1) -> TorchMetric:  # noqa: N802
    """The correlation of predicted classes and targets."""
    return _of_classes("MatthewsCorrCoef", "matthews_corrcoef", axis)


def HammingLoss(axis: int = -1) -> TorchMetric:  # noqa: N802
    """The share of wrong classes."""
    return _of_classes("HammingDistance", "hamming_loss", axis, higher_is_better=False, average="micro")


def F1ScoreMulti(thresh: float = 0.5, sigmoid: bool = True, average: str = "macro") -> TorchMetric:  # noqa: N802
    """F1 of several labels."""
    return _of_labels("F1Score", "f1_score", thresh, sigmoid, average=average)


def FBetaMulti(beta: float, thresh: float = 0.5, sigmoid: bool = True, average: str = "macro") -> TorchMetric:  # noqa: N802
    """F-beta of several labels."""
    return _of_labels("FBetaScore", "fbeta_score", thresh, sigmoid, beta=beta, average=average)


def PrecisionMulti(thresh: float = 0.5, sigmoid: bool = True, average: str = "macro") -> TorchMetric:  # noqa: N802
    """Precision of several labels."""
    return _of_labels("Precision", "precision_score", thresh, sigmoid, average=average)


def RecallMulti(thresh: float = 0.5, sigmoid: bool = True, average: str = "macro") -> TorchMetric:  # noqa: N802
    """Recall of several labels."""
    return _of_labels("Recall", "recall_score", thresh, sigmoid, average=average)


def JaccardMulti(thresh: float = 0.5, sigmoid: bool = True, average: str = "macro") -> TorchMetric:  # noqa: N802
    """Intersection over union of several labels."""
    return _of_labels("JaccardIndex", "jaccard_score", thresh, sigmoid, average=average)


def HammingLossMulti(thresh: float = 0.5, sigmoid: bool = True) -> TorchMetric:  # noqa: N802
    """The share of wrong answers of several labels."""
    return _of_labels("HammingDistance", "hamming_loss", thresh, sigmoid, higher_is_better=False, average="micro")


def MatthewsCorrCoefMulti(thresh: float = 0.5, sigmoid: bool = True) -> TorchMetric:  # noqa: N802
    """The correlation of predictions and targets, over all labels together."""
    return _of_labels("MatthewsCorrCoef", "matthews_corrcoef", thresh, sigmoid)


def Dice(axis: int = 1) -> TorchMetric:  # noqa: N802
    """The Dice coefficient of the second of two classes, over all pixels of all rows."""
    return _of_classes("F1Score", "dice", axis, average="binary")


def DiceMulti(axis: int = 1) -> TorchMetric:  # noqa: N802
    """The mean over the classes that occur of their Dice coefficient, over all pixels of all rows."""
    return _of_classes("F1Score", "dice_multi", axis, average="macro")


def JaccardCoeff(axis: int = 1) -> TorchMetric:  # noqa: N802
    """Intersection over union of the second of two classes, over all pixels of all rows."""
    return _of_classes("JaccardIndex", "jaccard_coeff", axis, average="binary")


def JaccardCoeffMulti(axis: int = 1) -> TorchMetric:  # noqa: N802
    """The mean over the classes that occur of intersection over union, over all pixels of all rows."""
    return _of_classes("JaccardIndex", "jaccard_coeff_multi", axis, average="macro")


def R2Score() -> TorchMetric:  # noqa: N802
    """The share of the targets' variance that is explained, without a constant shift."""
    return _of_values("R2Score", "r2_score")


def ExplainedVariance() -> TorchMetric:  # noqa: N802
    """The share of the targets' variance that is explained."""
    return _of_values("ExplainedVariance", "explained_variance_score")


def _of_values(torchs: str, name: str) -> TorchMetric:
    def make(_: int) -> "torchmetrics.Metric":
        import torchmetrics

        return getattr(torchmetrics, torchs)()

    return TorchMetric(make, _flat_values, name)


def _flat_values(pred: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    return pred.flatten().double(), targ.flatten().double()


def CorpusBLEUMetric(axis: int = -1, pad_idx: int = 1) -> TorchMetric:  # noqa: N802
    """BLEU of up to four tokens over the whole corpus, of token ids without padding (Papineni et al., 2002)."""

    def make(_: int) -> "torchmetrics.Metric":
        from torchmetrics.text import BLEUScore

        return BLEUScore()

    def words(ids: Tensor) -> str:
        return " ".join(str(i) for i in ids.tolist() if i != pad_idx)

    def prepare(pred: Tensor, targ: Tensor) -> tuple[list[str], list[list[str]]]:
        return [words(p) for p in pred.argmax(dim=axis)], [[words(t)] for t in targ]

    return TorchMetric(make, prepare, "corpus_bleu", axis=axis)


# --- functions of all rows at once -------------------------------------------------------------------------------------------


@dataclass
class AccumMetric(Metric):
    """A function of all predictions and targets at once, which are kept, of all workers: their memory is the limit.

    prepare: what is kept of a batch, from (pred, targ).
    """

    function: Callable[[Tensor, Tensor], Any]
    higher_is_better: bool = True
    name: str = ""
    prepare: Prepare = lambda pred, targ: (pred, targ)

    def __post_init__(self) -> None:
        self.name = self.name or _name(self.function)
        self.reset()

    def reset(self) -> None:
        self._preds: list[Tensor] = []
        self._targs: list[Tensor] = []

    def __call__(self, pred: Any, targ: Any) -> Any:
        """The metric of these rows."""
        return self.function(*_called(self.prepare, self.name, _on_cpu(pred), _on_cpu(targ)))

    def accumulate(self, pred: Any, targ: Any, rows: int) -> None:
        kept = _called(self.prepare, self.name, _on_cpu(pred), _on_cpu(targ))
        self._preds.append(kept[0])
        self._targs.append(kept[1])

    def state(self) -> tuple[Tensor, Tensor] | None:
        return (torch.cat(self._preds), torch.cat(self._targs)) if self._preds else None

    def value(self, states: Sequence[tuple[Tensor, Tensor]]) -> float:
        preds, targs = zip(*states, strict=True)
        return float(self.function(torch.cat(preds), torch.cat(targs)))


def _on_cpu(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else type(x)(map(_on_cpu, x))


def optim_metric(
    f: Callable[..., Any],
    argname: str,
    bounds: tuple[float, float],
    tol: float = 0.01,
    do_neg: bool = True,
    get_x: bool = False,
) -> AccumMetric:
    """`f(pred, targ, argname=...)` of all rows at the best value of that argument within `bounds`, found to `tol`; fastai's.

    do_neg: the larger the better. get_x: give the pair (value, argument), where you call it yourself.
    """

    def best(pred: Tensor, targ: Tensor) -> Any:
        from scipy.optimize import minimize_scalar

        sign = -1.0 if do_neg else 1.0
        found = minimize_scalar(
            lambda x: sign * float(f(pred, targ, **{argname: x})), bounds=bounds, method="bounded", options={"xatol": tol}
        )
        return (sign * found.fun, found.x) if get_x else sign * found.fun

    return AccumMetric(best, do_neg, f"opt_{_name(f)}")


def skm_to_fastai(
    func: Callable[..., Any],
    is_class: bool = True,
    thresh: float | None = None,
    axis: int = -1,
    activation: Callable[[Tensor], Tensor] | None = None,
    higher_is_better: bool = True,
    **kwargs: Any,
) -> AccumMetric:
    """A metric of scikit-learn's, `func(targets, predictions, **kwargs)`.

    is_class: it is of classes: those along `axis`, or, with a `thresh`, whether the probability is above it, by `activation`,
    sigmoid unless given. Otherwise it is of values, or of what `activation` makes of them.
    """

    def prepare(pred: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        if is_class:
            if thresh is None:
                return _best_class(pred, targ, axis)
            return ((activation or torch.sigmoid)(pred) > thresh).int(), targ.int()
        values = pred if activation is None else activation(pred)
        return values.reshape(targ.shape) if values.numel() == targ.numel() else values, targ

    return AccumMetric(lambda pred, targ: func(targ.numpy(), pred.numpy(), **kwargs), higher_is_better, func.__name__, prepare)


def _last_probability(pred: Tensor, targ: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    return pred.double().softmax(axis).select(axis, -1).flatten(), targ.flatten()


def RocAuc(axis: int = -1, average: str = "macro") -> AccumMetric:  # noqa: N802
    """The area under the ROC curve of each class against the others, averaged."""

    def area(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multiclass_auroc

        return multiclass_auroc(pred, targ, num_classes=pred.shape[1], average=average)  # type: ignore[arg-type]

    return AccumMetric(area, name="roc_auc_score", prepare=lambda pred, targ: (pred.double().softmax(axis), targ))


def RocAucBinary(axis: int = -1) -> AccumMetric:  # noqa: N802
    """The area under the ROC curve of the second of two classes."""

    def area(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.classification import binary_auroc

        return binary_auroc(pred, targ)

    return AccumMetric(area, name="roc_auc_score", prepare=partial(_last_probability, axis=axis))


def RocAucMulti(sigmoid: bool = True, average: str = "macro") -> AccumMetric:  # noqa: N802
    """The area under the ROC curve of several labels, averaged."""

    def area(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multilabel_auroc

        return multilabel_auroc(pred, targ, num_labels=pred.shape[1], average=average)  # type: ignore[arg-type]

    return AccumMetric(area, name="roc_auc_score", prepare=partial(_probabilities, sigmoid=sigmoid))


def APScoreBinary(axis: int = -1) -> AccumMetric:  # noqa: N802
    """The average precision of the second of two classes."""

    def precision(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.classification import binary_average_precision

        return binary_average_precision(pred, targ)

    return AccumMetric(precision, name="average_precision_score", prepare=partial(_last_probability, axis=axis))


def APScoreMulti(sigmoid: bool = True, average: str = "macro") -> AccumMetric:  # noqa: N802
    """The average precision of several labels, averaged."""

    def precision(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multilabel_average_precision

        return multilabel_average_precision(pred, targ, num_labels=pred.shape[1], average=average)  # type: ignore[arg-type]

    return AccumMetric(precision, name="average_precision_score", prepare=partial(_probabilities, sigmoid=sigmoid))


def _probabilities(pred: Tensor, targ: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    return pred.double().sigmoid() if sigmoid else pred.double(), targ.long()


def PearsonCorrCoef() -> AccumMetric:  # noqa: N802
    """The linear correlation of predictions and targets."""

    def pearson(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.regression import pearson_corrcoef

        return pearson_corrcoef(pred, targ)

    return AccumMetric(pearson, name="pearsonr", prepare=_flat_values)


def SpearmanCorrCoef() -> AccumMetric:  # noqa: N802
    """The correlation of the ranks of predictions and targets."""

    def spearman(pred: Tensor, targ: Tensor) -> Tensor:
        from torchmetrics.functional.regression import spearman_corrcoef

        return spearman_corrcoef(pred, targ)

    return AccumMetric(spearman, name="spearmanr", prepare=_flat_values)
