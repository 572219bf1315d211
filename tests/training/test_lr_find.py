"""lr_find: what it suggests, and that nothing of it stays."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from blocks import DataLoaders
from training import CancelBatchException, CSVLogger, Learner, SaveBest, accuracy, body_and_head, minimum, slide, steep, valley

from .toy import assert_same, batches, data, deep, doing, learner

LRS = np.logspace(-7, 1, 100)


def bowl(low: int = 60) -> np.ndarray:
    """Flat at first, then down to its least at `low`, then steeply up."""
    at = np.arange(100)
    return np.where(at < 30, 2.0, np.where(at < low, 2 - (at - 30) / 20, 0.5 + ((at - low) / 10) ** 2))


def test_valley_is_in_the_middle_of_the_longest_way_down() -> None:
    found = valley(LRS, bowl())
    assert LRS[30] < found < LRS[60]
    assert found == pytest.approx(LRS[29 + 10 + 5 + 1], rel=0.3)


def test_minimum_is_a_tenth_of_the_best() -> None:
    assert minimum(LRS, bowl(60)) == pytest.approx(LRS[60] / 10)


def test_steep_is_where_the_loss_falls_fastest() -> None:
    losses = 2 - np.tanh((np.arange(100) - 50) / 10)
    assert steep(LRS, losses) == pytest.approx(LRS[50], rel=0.3)


def test_slide_is_left_of_where_the_loss_blows_up() -> None:
    assert LRS[20] < slide(LRS, bowl()) <= LRS[60]
    assert slide(LRS, np.exp(np.linspace(0, 20, 100))) == pytest.approx(LRS[0], rel=10)


def finding(**changes: Any) -> Learner:
    x_and_y = batches((8,) * 12)
    return learner(DataLoaders(x_and_y, batches((4,), seed=1)), splitter=body_and_head, metrics=accuracy, **changes)


def test_it_finds_rates_at_which_the_model_learns() -> None:
    learn = finding()
    found = learn.lr_find(suggest_funcs=(valley, slide, steep, minimum))
    assert set(found.suggestions) == {"valley", "slide", "steep", "minimum"}
    assert found.valley == found.suggestions["valley"]  # type: ignore[attr-defined]
    assert all(1e-7 <= rate <= 10 for rate in found.suggestions.values())
    assert np.all(np.diff(found.lrs) > 0)
    assert np.isfinite(found.losses).all()
    with pytest.raises(AttributeError, match="was not among the suggest_funcs"):
        _ = learn.lr_find(suggest_funcs=()).valley  # type: ignore[attr-defined]


@pytest.mark.parametrize("trained_before", [False, True])
def test_nothing_of_it_stays(trained_before: bool, own_places: Path) -> None:
    """Weights, optimizer, record, generators, what is frozen, files: a training goes on as if it had not been."""
    learn = finding(callbacks=[SaveBest("valid/loss"), CSVLogger()])
    learn.model[3].p = 0.5
    if trained_before:
        learn.freeze()
        learn.fit(1)
    files = sorted(own_places.rglob("*"))
    before = copy.deepcopy(learn.state_dict())
    learn.lr_find(num_it=30)
    assert_same(learn.state_dict(), before)
    assert learn.callbacks == sorted(learn.callbacks, key=lambda c: c.order)
    assert {type(c) for c in learn.callbacks} >= {SaveBest, CSVLogger}
    assert sorted(own_places.rglob("*")) == files


def test_it_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Learner(data((8,) * 4), deep(), lr=0.1, loss_func=finding().loss_func).lr_find(num_it=20)
    assert capsys.readouterr().out == ""


def test_it_stops_where_the_loss_grows_out_of_bounds_unless_told_not_to() -> None:
    steps: list[int] = []
    learn = finding(opt_func=torch.optim.SGD, callbacks=[doing("after_step", lambda learn: steps.append(1))])
    learn.lr_find(end_lr=1e6, num_it=60)
    stopped = len(steps)
    steps.clear()
    learn.lr_find(end_lr=1e6, num_it=60, stop_div=False)
    assert stopped < 60
    assert len(steps) == 60


def test_a_plot_is_returned() -> None:
    figure = finding().lr_find(num_it=30).plot()
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("wrong", [{"start_lr": 0.0}, {"start_lr": 1.0, "end_lr": 0.1}, {"num_it": 5}])
def test_wrong_ranges_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rates rise from above 0, in 20 batches or more"):
        finding().lr_find(**wrong)


def test_batches_that_are_cancelled_before_their_loss_are_left_out() -> None:
    def cancel(learn: Learner) -> None:
        if every or learn.iter % 2:
            raise CancelBatchException

    every = False
    learn = learner(data((4, 4, 4, 4)), callbacks=[doing("after_pred", cancel)])
    assert len(learn.lr_find(num_it=40).lrs) > 3
    every = True
    with pytest.raises(ValueError, match="no batch had a loss"):
        learn.lr_find(num_it=40)
