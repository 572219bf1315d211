"""Metrics: exact means over rows."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocks import DataLoaders
from training import (
    AccumMetric,
    AvgMetric,
    BrierScore,
    F1Score,
    Learner,
    LossMetric,
    LossMetrics,
    accuracy,
    accuracy_multi,
    error_rate,
    foreground_acc,
    optim_metric,
    top_k_accuracy,
)
from training.metrics import MetricFunction, as_metric

from .toy import learner

PRED = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 1.0], [5.0, 0.0, 1.0]])
TARG = torch.tensor([0, 1, 1, 0])


def test_accuracy_and_error_rate() -> None:
    assert accuracy(PRED, TARG).item() == 0.75
    assert error_rate(PRED, TARG).item() == 0.25


def test_the_mean_is_over_rows_not_over_batches() -> None:
    metric = as_metric(accuracy)
    metric.accumulate(PRED[:3], TARG[:3], 3)
    metric.accumulate(PRED[3:], TARG[3:], 1)
    assert metric.value([metric.state()]) == pytest.approx(0.75)
    assert metric.total.tolist() == pytest.approx([3, 4])


def test_totals_add_up_over_ranks() -> None:
    one, other = as_metric(error_rate), as_metric(error_rate)
    one.accumulate(PRED[:1], TARG[:1], 1)
    other.accumulate(PRED[1:], TARG[1:], 3)
    assert one.value([one.state(), other.state()]) == pytest.approx(0.25)


def test_many_batches_are_summed_in_double_precision() -> None:
    def seven_tenths(pred: Tensor, targ: Tensor) -> Tensor:
        return torch.tensor(0.7, dtype=torch.float64)

    metric = as_metric(seven_tenths)
    for _ in range(10_000):
        metric.accumulate(PRED, TARG, 3)
    assert metric.value([metric.state()]) == pytest.approx(0.7, rel=1e-10)


def test_reset_forgets() -> None:
    metric = as_metric(accuracy)
    metric.accumulate(PRED, 1 - TARG, 4)
    metric.reset()
    metric.accumulate(PRED[:1], TARG[:1], 1)
    assert metric.value([metric.state()]) == 1


def test_metrics_do_not_share_their_totals() -> None:
    one, other = as_metric(accuracy), as_metric(accuracy)
    one.accumulate(PRED, TARG, 4)
    assert other.total.tolist() == [0, 0]


def test_the_error_rate_is_better_lower() -> None:
    assert not as_metric(error_rate).higher_is_better
    assert as_metric(accuracy).higher_is_better


def test_a_metric_is_named_after_its_function_and_kept_as_it_is() -> None:
    metric = AvgMetric(accuracy, higher_is_better=False)
    assert as_metric(metric) is metric
    assert as_metric(error_rate).name == "error_rate"


def test_a_metric_keeps_no_graph() -> None:
    def output(pred: Tensor, targ: Tensor) -> Tensor:
        return pred.mean()

    metric = as_metric(output)
    metric.accumulate(PRED.clone().requires_grad_(), TARG, 4)
    assert not metric.total.requires_grad


@pytest.mark.parametrize("wrong", ["accuracy", 3, None])
def test_what_is_no_metric_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"a metric is a function of \(pred, targ\) or a Metric such as AvgMetric"):
        as_metric(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "metric",
    [accuracy, error_rate, partial(top_k_accuracy, k=2), partial(foreground_acc, axis=-1)],
    ids=["", "error", "k", "foreground"],
)
def test_targets_with_an_axis_of_one_are_the_same_targets(metric: MetricFunction) -> None:
    """The loss takes them, too. Compared as they are, each prediction would meet every target."""
    plain, one_more = (as_metric(metric) for _ in range(2))
    plain.accumulate(PRED, TARG, 4)
    one_more.accumulate(PRED, TARG[:, None], 4)
    assert one_more.state() == plain.state()


def test_one_label_an_output_of_its_own() -> None:
    logits = torch.tensor([[9.0], [-9.0], [9.0]])
    assert accuracy_multi(logits, torch.tensor([1.0, 0.0, 1.0])).item() == 1
    two_classes = as_metric(BrierScore())
    two_classes.accumulate(torch.tensor([[-99.0, 0.0], [0.0, -99.0]]), torch.tensor([[1], [0]]), 2)
    assert two_classes.value([two_classes.state()]) == pytest.approx(0)


def test_predictions_that_do_not_fit_the_targets_are_told() -> None:
    with pytest.raises(ValueError, match=r"axis=1"):
        accuracy(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))


def test_a_partial_has_the_name_and_the_direction_of_its_function() -> None:
    metric = as_metric(partial(error_rate, axis=-1))
    assert (metric.name, metric.higher_is_better) == ("error_rate", False)


def test_of_two_metrics_with_one_name_none_is_lost_in_silence() -> None:
    top = [partial(top_k_accuracy, k=k) for k in (1, 2)]
    with pytest.raises(ValueError, match="called top_k_accuracy"):
        learner(metrics=top)
    learn = learner(metrics=[AvgMetric(function, name=f"top {k}") for k, function in enumerate(top, 1)])
    assert learn.validate().keys() == {"valid/loss", "valid/top 1", "valid/top 2"}


# --- parts of a loss, several targets, the best argument -----------------------------------------------------------------


class TwoParts:
    """A loss that keeps its parts."""

    def __call__(self, pred: Tensor, targ: Tensor) -> Tensor:
        self.near, self.far = (pred[:, 0] - targ).abs().mean(), (pred[:, 1] - targ).square().mean()
        return self.near + self.far


def test_parts_of_a_combined_loss_are_recorded() -> None:
    loss = TwoParts()
    learn = learner(loss_func=loss, metrics=[*LossMetrics("near, far", loss), LossMetric("near", loss, name="near again")])
    learn.fit(1)
    values = learn.recorder.history[0]
    assert values["valid/near"] + values["valid/far"] == pytest.approx(values["valid/loss"])
    assert values["valid/near"] == values["valid/near again"] > 0


def two_targets(*metrics: object) -> Learner:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    batches = [(x[:3], x[:3].argmax(1), x[:3, 0]), (x[3:], x[3:].argmax(1), x[3:, 0])]
    return Learner(
        DataLoaders(batches, batches), nn.Identity(), lambda pred, c, n: (pred[:, 1] - n).square().mean(), metrics=metrics
    )


def test_metrics_are_given_all_targets() -> None:
    def off(pred: Tensor, classes: Tensor, number: Tensor) -> Tensor:
        return (pred[:, 1] - number).abs().mean()

    def right(pred: Tensor, *targets: Tensor) -> Tensor:
        return accuracy(pred, targets[0])

    f1 = dataclasses.replace(F1Score(average="macro"), prepare=lambda pred, c, n: (pred.argmax(1), c), name="f1")
    r2 = AccumMetric(lambda p, t: (p - t).abs().max(), name="furthest", prepare=lambda pred, c, n: (pred[:, 1], n))
    learn = two_targets(off, right, f1, r2)
    found = learn.validate()
    x = torch.cat([batch[0] for batch in learn.dls.valid])
    assert found["valid/off"] == pytest.approx(float((x[:, 1] - x[:, 0]).abs().mean()))
    assert found["valid/furthest"] == pytest.approx(float((x[:, 1] - x[:, 0]).abs().max()))
    assert found["valid/right"] == 1
    assert found["valid/f1"] == pytest.approx(len(x.argmax(1).unique()) / 3)


@pytest.mark.parametrize("metric", [accuracy, partial(accuracy, axis=1), top_k_accuracy, F1Score(average="macro")])
def test_a_metric_of_one_target_does_not_take_the_second_for_a_setting(metric: MetricFunction) -> None:
    with pytest.raises(ValueError, match=r"is of one target, but the data has 2: make it a function of all of them"):
        two_targets(metric).validate()


def test_a_metric_may_give_a_number_of_any_kind() -> None:
    kinds = [
        0.5,
        1,
        np.float32(0.5),
        torch.tensor([0.5]),
        torch.tensor(0.5, dtype=torch.float16),
        (1, 2),
        (torch.tensor([1]), 2),
    ]
    metrics = [AvgMetric(lambda pred, targ, kind=kind: kind, name=str(i)) for i, kind in enumerate(kinds)]
    found = learner(metrics=metrics).validate()
    assert [found[f"valid/{i}"] for i in range(len(kinds))] == [0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("wrong", [None, torch.zeros(3), (1, 2, 3), {}])
def test_a_metric_that_gives_no_number_is_named(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"the metric wrong gave .*: it is a number, the mean over rows, or"):
        learner(metrics=AvgMetric(lambda pred, targ: wrong, name="wrong")).validate()


def test_a_metric_at_the_best_value_of_its_argument() -> None:
    pred, targ = torch.tensor([-2.0, -1.0, 0.5, 2.0]), torch.tensor([0, 0, 0, 1])
    best = optim_metric(accuracy_multi, "thresh", (0.1, 0.95), get_x=True)
    value, thresh = best(pred, targ)
    assert value == 1
    assert 0.5 < pred.sigmoid()[2] <= thresh < pred.sigmoid()[3]
    assert accuracy_multi(pred, targ) == 0.75

    def error(pred: Tensor, targ: Tensor, scale: float) -> Tensor:
        return (pred[:, 0] * scale - targ).square().mean()

    metric = optim_metric(error, "scale", (-10.0, 10.0), tol=1e-5, do_neg=False)
    learn = learner(metrics=metric)
    found = learn.validate()["valid/opt_error"]
    preds, targs = learn.get_preds(act=lambda p: p)
    x, y = preds[:, 0].double(), targs.double()
    assert found == pytest.approx(float((x * (x @ y / (x @ x)) - y).square().mean()), rel=1e-4)
