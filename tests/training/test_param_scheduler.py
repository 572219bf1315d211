"""Functions of the training's progress, and the callback that sets hyper-parameters by them."""

import pytest

from training import (
    Callback,
    Curve,
    Learner,
    ParamScheduler,
    SchedCos,
    SchedExp,
    SchedLin,
    SchedNo,
    SchedPoly,
    combine_scheds,
    combined_cos,
)
from training.param_scheduler import Sched
from training.testing import tiny_learner


@pytest.mark.parametrize(
    ("sched", "values"),
    [
        (SchedNo(2.0, 1.0), [2.0, 2.0, 2.0]),
        (SchedLin(2.0, 1.0), [2.0, 1.75, 1.0]),
        (SchedCos(2.0, 1.0), [2.0, 1.8535534, 1.0]),
        (SchedExp(1.0, 0.0001), [1.0, 0.1, 0.0001]),
        (SchedPoly(2.0, 1.0, 2), [2.0, 1.9375, 1.0]),
    ],
)
def test_the_values_at_the_start_a_quarter_and_the_end(sched: Sched, values: list[float]) -> None:
    assert [sched(p) for p in (0.0, 0.25, 1.0)] == pytest.approx(values)


def test_functions_one_after_the_other() -> None:
    sched = combine_scheds([0.25, 0.75], [SchedLin(0.0, 1.0), SchedLin(1.0, 0.25)])
    assert [sched(p) for p in (0.0, 0.125, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.25])
    with pytest.raises(ValueError, match="together 1"):
        combine_scheds([0.5, 0.6], [SchedLin(0, 1), SchedLin(1, 0)])


def test_two_cosines_are_a_curve() -> None:
    curve, combined = combined_cos(0.25, 0.5, 1.0, 0.1), combine_scheds([0.25, 0.75], [SchedCos(0.5, 1.0), SchedCos(1.0, 0.1)])
    assert isinstance(curve, Curve)
    points = [i / 20 for i in range(21)]
    assert [curve.at(p) for p in points] == pytest.approx([combined(p) for p in points])


def test_hyper_parameters_follow_the_training_and_come_back() -> None:
    seen: list[tuple[float, float, float]] = []

    class Hypers(Callback):
        order = 70

        def before_step(self, learn: Learner) -> None:
            group = learn.opt.param_groups[0]
            seen.append((group["lr"], group["mom"], group["wd"]))

    scheds = {"lr": SchedLin(1.0, 0.0), "mom": combined_cos(0.5, 0.9, 0.8, 0.9), "wd": SchedNo(0.3, 0.3)}
    learn = tiny_learner(ParamScheduler(scheds), Hypers())
    learn.fit(2)
    assert [lr for lr, _, _ in seen] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [mom for _, mom, _ in seen][::3] == pytest.approx([0.9, 0.8])
    assert {wd for _, _, wd in seen} == {0.3}
    assert learn.opt.param_groups[0]["wd"] == 0.01


def test_a_hyper_parameter_that_the_optimizer_has_not() -> None:
    with pytest.raises(ValueError, match=r"no hyper-parameter 'rate'; it has .*lr, "):
        tiny_learner(ParamScheduler({"rate": SchedNo(1, 1)})).fit(1)
