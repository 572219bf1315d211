"""Keeping the best, stopping early, lowering the rate: by recorded values that a test can dictate."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from training import (
    Callback,
    CancelFitException,
    EarlyStopping,
    Learner,
    ReduceLROnPlateau,
    SaveBest,
    ShortEpoch,
    TerminateOnNaN,
    accuracy,
    error_rate,
    flat,
)
from training.testing import same, tiny_learner


class Dictated(Callback):
    """Has the epochs record these values."""

    order = -49  # right after the recorder

    def __init__(self, name: str, values: list[float]):
        self.of, self.given = name, values

    def after_validate(self, learn: Learner) -> None:
        if hasattr(learn, "epoch") and learn.epoch < len(self.given):
            learn.recorder.values[self.of] = self.given[learn.epoch]


class Weights(Callback):
    """Remembers the weights after each epoch."""

    order = -90

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def after_epoch(self, learn: Learner) -> None:
        self.after.append({k: v.clone() for k, v in learn.model.state_dict().items()})


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("valid/loss", [3.0, 1.0, 2.0, 1.0], 1),
        ("valid/accuracy", [0.1, 0.2, 0.9, 0.9], 2),
        ("valid/error_rate", [0.9, 0.2, 0.3, 0.4], 1),
        ("valid/loss", [3.0, float("nan"), 2.0, 4.0], 2),
        ("valid/loss", [float("nan"), 3.0, 2.0, 4.0], 2),
    ],
)
def test_the_training_ends_with_the_weights_of_the_best_epoch(name: str, values: list[float], best: int) -> None:
    weights = Weights()
    learn = tiny_learner(Dictated(name, values), weights, SaveBest(name))
    learn.metrics += Learner(learn.dls, learn.model, learn.loss_func, metrics=[accuracy, error_rate]).metrics
    learn.fit(4)
    assert same(dict(learn.model.state_dict()), weights.after[best])
    assert not same(weights.after[best], weights.after[3 - best])


def test_after_an_error_the_weights_stay_and_after_a_cancel_the_best_come_back() -> None:
    class Stops(Callback):
        order = 90

        def __init__(self, error: type[Exception]):
            self.error = error

        def after_epoch(self, learn: Learner) -> None:
            if learn.epoch == 2:
                raise self.error

    for error, kept in ((ZeroDivisionError, 2), (CancelFitException, 0)):
        weights = Weights()
        learn = tiny_learner(Dictated("valid/loss", [1.0, 2.0, 3.0]), weights, SaveBest(), Stops(error))
        with contextlib.suppress(ZeroDivisionError):
            learn.fit(5)
        assert same(dict(learn.model.state_dict()), weights.after[kept])


def test_min_delta_is_a_gain_that_does_not_count() -> None:
    save = SaveBest(min_delta=0.5)
    tiny_learner(Dictated("valid/loss", [3.0, 2.6, 2.4]), save).fit(3)
    assert save.best == 2.4
    save = SaveBest(min_delta=0.7)
    tiny_learner(Dictated("valid/loss", [3.0, 2.6, 2.4]), save).fit(3)
    assert save.best == 3.0


def test_the_direction_can_be_given() -> None:
    save = SaveBest(higher_is_better=True)
    tiny_learner(Dictated("valid/loss", [3.0, 4.0, 1.0]), save).fit(3)
    assert save.best == 4.0


def test_a_monitor_that_nothing_records_is_an_error_that_names_the_others() -> None:
    with pytest.raises(ValueError, match="nothing records 'valid_loss': monitor one of train/loss, valid/loss"):
        tiny_learner(SaveBest("valid_loss")).fit(1)


class Records(Callback):
    """Has the epochs record a value of its own."""

    def __init__(self, values: list[float]):
        self.given = values

    def after_validate(self, learn: Learner) -> None:
        learn.recorder.values["mine/value"] = self.given[learn.epoch]


def test_what_a_callback_records_can_be_watched() -> None:
    weights, values = Weights(), [1.0, 3.0, 2.0, 1.0, 1.0]
    save, stop = (kind("mine/value", higher_is_better=True) for kind in (SaveBest, EarlyStopping))
    learn = tiny_learner(Records(values), weights, save, stop)
    learn.fit(5)
    assert [epoch["mine/value"] for epoch in learn.recorder.history] == values[:3]
    assert same(dict(learn.model.state_dict()), weights.after[1])


def test_what_a_callback_records_needs_a_direction_and_to_be_recorded() -> None:
    with pytest.raises(ValueError, match="where a callback of yours records it, say higher_is_better"):
        tiny_learner(Records([1.0]), SaveBest("mine/value")).fit(1)
    with pytest.raises(ValueError, match="nothing recorded 'mine/valeu' in epoch 0, only epoch, train/loss,"):
        tiny_learner(Records([1.0]), SaveBest("mine/valeu", higher_is_better=True)).fit(1)


def test_an_epoch_without_the_value_is_said() -> None:
    learn = tiny_learner(EarlyStopping())
    learn.dls = type(learn.dls)(learn.dls.train)
    with pytest.warns(UserWarning, match="EarlyStopping watches valid/loss, which epoch 0 did not record"):
        learn.fit(1)


def test_the_best_weights_are_written_to_the_file(tmp_path: Path) -> None:
    learn = tiny_learner(SaveBest(path=tmp_path / "deep" / "best.pt", with_opt=True))
    learn.fit(2)
    read = torch.load(tmp_path / "deep" / "best.pt", weights_only=True)
    assert same(dict(learn.model.state_dict()), read["model"])
    assert same(learn.opt.state_dict()["state"], read["optimizer"]["state"])
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["best.pt"]


def test_every_nth_epoch_is_written(tmp_path: Path) -> None:
    weights = Weights()
    tiny_learner(weights, SaveBest(path=tmp_path / "m.pt", every_epoch=2)).fit(4)
    assert sorted(f.name for f in tmp_path.glob("m*")) == ["m_0.pt", "m_2.pt"]
    assert same(torch.load(tmp_path / "m_2.pt", weights_only=True)["model"], weights.after[2])


def test_the_last_weights_are_written(tmp_path: Path) -> None:
    weights = Weights()
    learn = tiny_learner(Dictated("valid/loss", [1.0, 2.0]), weights, SaveBest(path=tmp_path / "m.pt", at_end=True))
    learn.fit(2)
    assert same(torch.load(tmp_path / "m.pt", weights_only=True)["model"], weights.after[1])
    assert same(dict(learn.model.state_dict()), weights.after[1])


@pytest.mark.parametrize(
    "wrong",
    [{"every_epoch": 1}, {"at_end": True}, {"every_epoch": 1, "at_end": True, "path": "x"}, {"min_delta": -1.0}],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give path|exclude|min_delta"):
        SaveBest(**wrong)


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [([3.0, 2.0, 2.5, 1.0, 1.0], 1, 3), ([3.0, 2.0, 2.5, 2.5, 1.0], 2, 4), ([3.0, 2.0, 2.5, 1.0, 0.5], 2, 5)],
)
def test_training_stops_after_the_patience(
    values: list[float], patience: int, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last epoch is recorded, printed and kept like any other."""
    weights = Weights()
    learn = tiny_learner(Dictated("valid/loss", values), weights, EarlyStopping(patience=patience))
    learn.fit(5)
    assert len(learn.recorder.history) == len(weights.after) == learn.epochs_trained == epochs
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == epochs
    assert ("stopped early: valid/loss was best" in printed) == (epochs < 5)


def test_a_fit_starts_afresh_unless_told_otherwise() -> None:
    for reset, epochs in ((True, 2), (False, 1)):
        learn = tiny_learner(Dictated("valid/loss", [1.0, 2.0]), EarlyStopping(reset_on_fit=reset))
        learn.fit(2)
        learn.fit(2)
        assert len(learn.recorder.history) == 2 + epochs - (not reset)


def test_a_fit_that_begins_later_starts_afresh_as_well() -> None:
    """Once `start_epoch` was taken for a run that goes on: the best value of the fit before ended it at once."""
    learn = tiny_learner(Dictated("valid/loss", [1.0, 3.0, 2.0, 1.5]), EarlyStopping(), best := SaveBest())
    learn.fit(1)
    learn.fit(4, start_epoch=1)
    assert [values["epoch"] for values in learn.recorder.history] == [0, 1, 2, 3]
    assert best.best == 1.5


def test_the_rate_is_lowered_on_a_plateau() -> None:
    seen: list[float] = []

    class Rates(Callback):
        order = 65

        def before_batch(self, learn: Learner) -> None:
            if learn.training and learn.iter == 0:
                seen.append(learn.opt.param_groups[0]["lr"])

    reduce = ReduceLROnPlateau(patience=2, factor=4, min_lr=0.001)
    tiny_learner(Dictated("valid/loss", [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]), reduce, Rates()).fit(flat(8), lr=0.008)
    assert seen == pytest.approx([0.008, 0.008, 0.008, 0.002, 0.002, 0.001, 0.001, 0.001])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_training_stops_at_a_loss_that_is_no_number(bad: float, capsys: pytest.CaptureFixture[str]) -> None:
    learn = tiny_learner(TerminateOnNaN())
    learn.dls.train[1][0][0, 0, 0, 0] = bad
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    learn.fit(3)
    assert "stopped: the loss of epoch 0, batch 1" in capsys.readouterr().out
    assert learn.recorder.history == []
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert not same(before, dict(learn.model.named_parameters()))


@pytest.mark.parametrize(("pct", "short_valid", "train", "valid"), [(0.01, True, 1, 1), (0.5, False, 2, 2), (1.0, True, 3, 2)])
def test_a_short_epoch(pct: float, short_valid: bool, train: int, valid: int) -> None:
    seen: list[bool] = []

    class Batches(Callback):
        def before_batch(self, learn: Learner) -> None:
            seen.append(learn.training)

    tiny_learner(Batches(), ShortEpoch(pct, short_valid)).fit(1)
    assert (seen.count(True), seen.count(False)) == (train, valid)
