"""Where a trained Learner goes wrong: the rows with the highest losses, which classes it confuses, residuals.

One pass over the validation part keeps a loss and an id for each row, counts, and the few worst rows themselves; never all
predictions. So the memory is bounded by `k` samples and a few numbers a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from blocks.dataloaders import DataLoaders
from blocks.tensors import as_plain
from training.callback import Callback
from training.losses import loss_per_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.learner import Learner


@dataclass
class _Row:
    """One row as the model saw it, its targets, and the predictions in their types, where there is one for each."""

    loss: float
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    predicted: tuple[Tensor, ...]


@dataclass
class Interpretation:
    """The losses of all rows, and the worst rows themselves.

    losses: (rows,). ids: each row's id, its position where the batches know none. worst: the rows with the highest losses, the
    worst first.
    """

    dls: DataLoaders
    losses: Tensor
    ids: list[str]
    worst: list[_Row]

    _watcher: ClassVar[type["_Watch"]]

    @classmethod
    def from_learner(cls, learn: "Learner", dl: Iterable[Any] | None = None, k: int = 25) -> Self:
        """Look at the validation part, or at `dl`, keeping the `k` worst rows. ValueError without rows or targets."""
        watch = cls._watcher(k)
        with learn.validation_context(watch):
            learn._validate(learn.dls.valid if dl is None else dl)
        if not watch.losses:
            raise ValueError("there is nothing to interpret: the batches are empty or have no targets")
        return cls(learn.dls, torch.cat(watch.losses), watch.ids, watch.worst, **watch.more(learn))

    def top_losses(self, k: int | None = None, largest: bool = True) -> tuple[Tensor, list[str]]:
        """The `k` highest (or lowest) losses and the ids of their rows, all of them by default."""
        values, places = self.losses.topk(min(k or len(self.losses), len(self.losses)), largest=largest)
        return values, [self.ids[i] for i in places.tolist()]

    def plot_top_losses(self, k: int = 9) -> "Figure":
        """A figure of the `k` worst rows: input, target, prediction and loss, drawn by their types (`blocks.show`)."""
        from blocks.show import plot_top_losses

        rows = self.worst[:k]
        if len(rows) < min(k, len(self.losses)):
            raise ValueError(f"only the {len(rows)} worst rows were kept: make it with from_learner(learn, k={k})")
        samples, predictions = [], []
        n = len(rows[0].targets)
        for row in rows:
            if not row.predicted:
                raise ValueError(
                    "to draw them, the loss needs `decodes`, which makes the model's output a prediction of each target"
                )
            given, said = (
                self.dls.decode_batch([x[None] for x in (*row.inputs, *targets)])[0] for targets in (row.targets, row.predicted)
            )
            samples.append(given)
            predictions.append(said[-1] if n == 1 else said[-n:])
        losses = [row.loss for row in rows]
        return plot_top_losses(rows[0].inputs[0], rows[0].targets[0], samples=samples, predictions=predictions, losses=losses)


class _Watch(Callback):
    """Keeps what an Interpretation needs of each batch."""

    order = 100  # after what others make of the loss and the prediction

    def __init__(self, k: int):
        self.k = k
        self.losses: list[Tensor] = []
        self.ids: list[str] = []
        self.worst: list[_Row] = []

    def after_batch(self, learn: "Learner") -> None:
        if not learn.yb or learn.pred is None or not learn.rows:
            return
        targets = tuple(map(as_plain, learn.yb))
        losses = loss_per_row(learn.loss_func, learn.pred, *targets).float().cpu()
        decoded = getattr(learn.loss_func, "decodes", lambda p: p)(learn.activation(learn.pred))
        self.ids += getattr(learn.batch, "ids", None) or [str(len(self.ids) + i) for i in range(len(losses))]
        self.losses.append(losses)
        self.count(learn, decoded, *targets)
        self._keep_worst(learn, losses, decoded if isinstance(decoded, tuple | list) else (decoded,))

    def _keep_worst(self, learn: "Learner", losses: Tensor, decoded: Sequence[Tensor]) -> None:
        bar = self.worst[-1].loss if len(self.worst) >= self.k else float("-inf")
        for place in losses.topk(min(self.k, len(losses))).indices.tolist():
            loss = float(losses[place].nan_to_num(float("inf")))  # nothing is worse
            if loss > bar or len(self.worst) < self.k:
                # Copies: a view of one row would keep its whole batch.
                inputs, targets = (tuple(x[place].cpu().clone() for x in part) for part in (learn.xb, learn.yb))
                said = [d[place] for d in decoded]
                fits = [d.numel() for d in said] == [y.numel() for y in targets]
                predicted = tuple(map(_like, said, targets)) if fits else ()
                self.worst.append(_Row(loss, inputs, targets, predicted))
        self.worst = sorted(self.worst, key=lambda row: -row.loss)[: self.k]

    def count(self, learn: "Learner", decoded: Any, *targets: Tensor) -> None:
        """What a kind of interpretation adds up beyond the losses."""

    def more(self, learn: "Learner") -> dict[str, Any]:
        """The further fields of the interpretation."""
        return {}


def _like(said: Tensor, target: Tensor) -> Tensor:
    return said.cpu().to(target.dtype, copy=True).reshape(target.shape).as_subclass(type(target))


def _only(kind: str, targets: Sequence[Tensor]) -> Tensor:
    if len(targets) > 1:
        raise TypeError(f"{kind} are of one target, but the data has {len(targets)}: use Interpretation")
    return targets[0]


Interpretation._watcher = _Watch


# --- classes -----------------------------------------------------------------------------------------------------------


class _WatchClasses(_Watch):
    confusion: Tensor | None = None
    counts: Tensor | None = None

    def count(self, learn: "Learner", decoded: Any, *targets: Tensor) -> None:
        target = _only("classes", targets)
        if decoded.shape != target.shape or (target.is_floating_point() and decoded.dtype is not torch.bool):
            raise TypeError(
                f"classes are wanted, but here are targets of type {target.dtype} and shape {tuple(target.shape)}, and "
                f"predictions of type {decoded.dtype} and shape {tuple(decoded.shape)}: use Interpretation"
            )
        if decoded.dtype is torch.bool:  # several labels a row
            is_, said = target.bool().flatten(0, -2), decoded.flatten(0, -2)
            found = torch.stack([(is_ & said).sum(0), is_.sum(0), said.sum(0)]).cpu()
        else:
            classes = learn.pred.shape[getattr(learn.loss_func, "axis", -1)]
            counts = target != getattr(learn.loss_func, "ignore_index", None)
            pairs = (target[counts] * classes + decoded[counts]).cpu()
            confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
            self.confusion = confusion if self.confusion is None else self.confusion + confusion
            found = torch.stack([confusion.diag(), confusion.sum(1), confusion.sum(0)])
        self.counts = found if self.counts is None else self.counts + found

    def more(self, learn: "Learner") -> dict[str, Any]:
        assert self.counts is not None
        names = learn.dls.vocab or tuple(str(i) for i in range(self.counts.shape[1]))
        return {"vocab": names, "counts": self.counts, "confusion": self.confusion}


@dataclass
class ClassificationInterpretation(Interpretation):
    """Also which classes are taken for which.

    vocab: the classes' names. counts: (3, classes), int64: how often each was rightly predicted, was the target, was predicted.
    confusion: (targets, predictions), int64; None where a row may have several labels.
    """

    vocab: Sequence[str] = ()
    counts: Tensor = field(default_factory=lambda: torch.zeros(3, 0, dtype=torch.int64))
    confusion: Tensor | None = None

    _watcher: ClassVar[type[_Watch]] = _WatchClasses

    def confusion_matrix(self) -> Tensor:
        """How often each class (row) was predicted as each (column), int64. ValueError where a row may have several labels."""
        if self.confusion is None:
            raise ValueError("rows with several labels have no confusion matrix: see report()")
        return self.confusion

    def most_confused(self, min_val: int = 1) -> list[tuple[str, str, int]]:
        """(target, prediction, how often) of what was wrong at least `min_val` times, the most frequent first."""
        confusion = self.confusion_matrix()
        wrong = confusion - confusion.diag().diag()
        found = [(self.vocab[t], self.vocab[p], int(wrong[t, p])) for t, p in (wrong >= max(min_val, 1)).nonzero().tolist()]
        return sorted(found, key=lambda confused: -confused[2])

    def report(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and the number of targets ("support") of each class; 0 where there is nothing to divide by."""
        right, targets, predictions = self.counts
        precision, recall = right / predictions.clamp(min=1), right / targets.clamp(min=1)
        f1 = 2 * right / (targets + predictions).clamp(min=1)
        return {
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(targets[i])}
            for i, name in enumerate(self.vocab)
        }

    def print_classification_report(self) -> None:
        """Print `report` as a table, and the accuracy where a row has one class."""
        report = self.report()
        width = max(len(name) for name in ("accuracy", *report))
        columns = ("precision", "recall", "f1", "support")
        print(" " * width, *(f"{column:>10}" for column in columns))
        for name, values in report.items():
            cells = [f"{values[column]:>10.3f}" for column in columns[:-1]]
            print(f"{name:>{width}}", *cells, f"{values['support']:>10}")
        if self.confusion is not None:
            total = int(self.confusion.sum())
            print(f"{'accuracy':>{width}}", " " * 21, f"{float(self.confusion.diag().sum()) / total:>10.3f} {total:>10}")

    def plot_confusion_matrix(self, normalize: bool = False, figsize: tuple[float, float] | None = None) -> "Figure":
        """A figure of the confusion matrix; with `normalize`, as shares of each class's targets."""
        from matplotlib.figure import Figure

        n = len(self.vocab)
        confusion = self.confusion_matrix()
        values = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1) if normalize else confusion
        figure = Figure(figsize=figsize or (1.5 + 0.6 * n, 1.5 + 0.6 * n), layout="constrained")
        axes = figure.subplots()
        axes.imshow(values.numpy(), cmap="Blues")
        axes.set(xlabel="prediction", ylabel="target", xticks=range(n), yticks=range(n))
        axes.set_xticklabels(self.vocab, rotation=90)
        axes.set_yticklabels(self.vocab)
        middle = float(values.max()) / 2
        for t in range(n):
            for p in range(n):
                text = f"{float(values[t, p]):.2f}" if normalize else str(int(values[t, p]))
                axes.text(p, t, text, ha="center", va="center", color="white" if values[t, p] > middle else "black")
        return figure


@dataclass
class SegmentationInterpretation(ClassificationInterpretation):
    """The same of pixels: the counts are of pixels, the losses and the worst rows of pictures."""

    def iou(self) -> dict[str, float]:
        """Intersection over union of each class over all pixels; 0 for a class that neither occurs nor is predicted."""
        right, targets, predictions = self.counts
        either = targets + predictions - right
        return {name: float(right[i] / either[i].clamp(min=1)) for i, name in enumerate(self.vocab)}


# --- values ------------------------------------------------------------------------------------------------------------


class _WatchValues(_Watch):
    def __init__(self, k: int):
        super().__init__(k)
        self.pairs: list[Tensor] = []

    def count(self, learn: "Learner", decoded: Any, *targets: Tensor) -> None:
        target = _only("residuals", targets)
        if target.numel() != len(target) or decoded.numel() != len(target):
            raise TypeError(
                f"residuals are of one number a row: here are targets of shape {tuple(target.shape)} and predictions of shape "
                f"{tuple(decoded.shape)}. Use Interpretation"
            )
        self.pairs.append(torch.stack([target.flatten(), decoded.flatten()], 1).float().cpu())

    def more(self, learn: "Learner") -> dict[str, Any]:
        targets, predictions = torch.cat(self.pairs).unbind(1)
        return {"targets": targets, "predictions": predictions}


@dataclass
class RegressionInterpretation(Interpretation):
    """Also each row's target and prediction, one number each, (rows,)."""

    targets: Tensor = field(default_factory=lambda: torch.zeros(0))
    predictions: Tensor = field(default_factory=lambda: torch.zeros(0))

    _watcher: ClassVar[type[_Watch]] = _WatchValues

    @property
    def residuals(self) -> Tensor:
        """Prediction - target of each row."""
        return self.predictions - self.targets

    def plot_residuals(self) -> "Figure":
        """A figure of the residuals over the predictions, and of how they are spread."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        over, spread = figure.subplots(1, 2)
        over.scatter(self.predictions.numpy(), self.residuals.numpy(), s=6, alpha=0.5)
        over.axhline(0, color="gray", linewidth=1)
        over.set(xlabel="prediction", ylabel="prediction - target")
        spread.hist(self.residuals.numpy(), bins=40)
        spread.set(xlabel="prediction - target", ylabel="rows")
        return figure
