"""Metrics, exact over all rows however they are shared among workers: each is a sum over rows that adds up over ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

MetricFunction = Callable[[Tensor, Tensor], Tensor]


def accuracy(pred: Tensor, targ: Tensor) -> Tensor:
    """The share of rows whose largest of (rows, classes) is the target (rows,), as a scalar."""
    return (pred.argmax(dim=1) == targ).double().mean()  # float32 would not add up to whole rows over many batches


def error_rate(pred: Tensor, targ: Tensor) -> Tensor:
    """1 - accuracy."""
    return 1 - accuracy(pred, targ)


@dataclass
class AvgMetric:
    """The mean over rows of a function of (pred, targ) that is itself a mean over the rows of a batch."""

    function: MetricFunction
    higher_is_better: bool = True
    total: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64), repr=False)

    @property
    def name(self) -> str:
        return self.function.__name__

    def reset(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    def accumulate(self, pred: Tensor, targ: Tensor, rows: int) -> None:
        """Take in one batch of `rows` rows."""
        value = self.function(pred, targ).detach().to("cpu", torch.float64)
        self.total += torch.stack([value * rows, torch.tensor(rows, dtype=torch.float64)])

    def value(self, total: Tensor) -> float:
        """The metric from `total`, summed over the ranks: (sum over rows, rows)."""
        return float(total[0] / total[1])


_LOWER_IS_BETTER = {error_rate}


def as_metric(metric: AvgMetric | MetricFunction) -> AvgMetric:
    """A metric as it is; a function as its mean over rows."""
    if isinstance(metric, AvgMetric):
        return metric
    if callable(metric):
        return AvgMetric(metric, higher_is_better=metric not in _LOWER_IS_BETTER)
    raise TypeError(f"a metric is a function of (pred, targ) or an AvgMetric, not {metric!r}")
