"""Callbacks that keep what passes by."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import training
from training import (
    Callback,
    CancelBatchException,
    CollectData,
    CSVLogger,
    FetchPredictions,
    GatherPredictions,
    Learner,
    MCDropout,
    Progress,
    ShowGraph,
)
from training.testing import tiny_learner


def test_predictions_of_the_validation_part() -> None:
    gather = GatherPredictions(with_input=True, with_loss=True)
    learn = tiny_learner(gather)
    learn.fit(1)
    x, y = (torch.cat(column) for column in zip(*learn.dls.valid, strict=True))
    pred = learn.model(x).detach()
    torch.testing.assert_close(gather.preds, pred)
    assert torch.equal(gather.targets[0], y)
    assert torch.equal(gather.inputs[0], x)
    torch.testing.assert_close(gather.losses, cross_entropy(pred, y, reduction="none"))
    torch.testing.assert_close(learn.get_preds()[0], pred.softmax(dim=1))


def test_predictions_of_each_epoch() -> None:
    fetch = FetchPredictions(skip=(Progress,))
    learn = tiny_learner(fetch)
    before = list(learn.callbacks)
    learn.fit(1)
    torch.testing.assert_close(fetch.preds[0], learn.get_preds()[0])
    assert set(map(id, learn.callbacks)) == set(map(id, before))


def test_batches_of_the_last_epoch() -> None:
    collect = CollectData()
    learn = tiny_learner(collect)
    learn.fit(2)
    assert len(collect.data) == 5
    (x,), (y,), pred, loss = collect.data[-1]
    assert torch.equal(x, learn.dls.valid[-1][0])
    assert torch.equal(y, learn.dls.valid[-1][1])
    torch.testing.assert_close(cross_entropy(pred, y), loss)
    assert not any(t.requires_grad for t in (pred, loss))


def test_dropout_stays_on_in_validation_only_and_only_dropout() -> None:
    learn = tiny_learner(MCDropout())
    losses = {learn.validate()["valid/loss"] for _ in range(5)}
    assert len(losses) > 1
    assert not any(m.training for m in learn.model.modules())
    without = tiny_learner()
    assert len({without.validate()["valid/loss"] for _ in range(5)}) == 1
    assert list(learn.model[0][1].running_mean) == list(without.model[0][1].running_mean)


def test_the_history_as_a_file(tmp_path: Path) -> None:
    learn = tiny_learner(CSVLogger(tmp_path / "new" / "history.csv"))
    learn.fit(2)
    learn.dls = type(learn.dls)(learn.dls.train)  # no validation: other columns
    learn.fit(1)
    with (tmp_path / "new" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "0"]
    assert [float(row["train/loss"]) for row in rows] == [h["train/loss"] for h in learn.recorder.history]
    assert float(rows[1]["valid/loss"]) == pytest.approx(learn.recorder.history[1]["valid/loss"])
    assert rows[2]["valid/loss"] == ""


def test_repeated_predictions_differ_by_dropout() -> None:
    learn = tiny_learner(MCDropout())
    first, second = learn.get_preds()[0], learn.get_preds()[0]
    assert not torch.equal(first, second)
    assert torch.equal(*(tiny_learner().get_preds()[0] for _ in range(2)))


def test_batches_of_a_validation_before_any_epoch() -> None:
    collect = CollectData()
    learn = tiny_learner(collect)
    learn.validate()
    assert len(collect.data) == len(learn.dls.valid)


def test_callbacks_that_say_so_take_no_part_in_fetched_predictions() -> None:
    class Notes(Callback):
        def __init__(self, remove_on_fetch: bool):
            self.remove_on_fetch, self.parts = remove_on_fetch, 0

        def before_validate(self, learn: Learner) -> None:
            self.parts += 1

    there, away = Notes(False), Notes(True)
    tiny_learner(there, away, FetchPredictions(skip=(Progress,))).fit(1)
    assert (there.parts, away.parts) == (2, 1)


def test_cancelled_batches_are_not_gathered() -> None:
    class First(Callback):
        def before_batch(self, learn: Learner) -> None:
            if learn.iter == 0 and not learn.training:
                raise CancelBatchException

    gather = GatherPredictions()
    learn = tiny_learner(First(), gather)
    learn.fit(1)
    assert len(gather.preds) == len(learn.dls.valid[1][0])


def test_a_graph_is_drawn_over_the_last_one_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def display(image: Any, display_id: bool) -> Any:
        drawn.append(image)
        return SimpleNamespace(update=drawn.append)

    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display, Image=lambda data: data))
    learn = tiny_learner(ShowGraph())
    with learn.no_logging():
        learn.fit(3)
    assert [image[:4] for image in drawn] == [b"\x89PNG"] * 3


def test_elsewhere_it_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_learner(ShowGraph()).fit(2)
    assert capsys.readouterr().out.count("ShowGraph draws in notebooks only") == 1


def test_a_fastai_user_finds_the_callbacks_by_name() -> None:
    for name in [
        "ActivationStats",
        "BnFreeze",
        "CSVLogger",
        "ChannelsLast",
        "CollectDataCallback",
        "CutMix",
        "EarlyStoppingCallback",
        "FetchPredsCallback",
        "GatherPredsCallback",
        "GradientAccumulation",
        "GradientClip",
        "HookCallback",
        "MCDropoutCallback",
        "MixUp",
        "MixedPrecision",
        "ModelResetter",
        "ParamScheduler",
        "ProgressCallback",
        "RNNCallback",
        "RNNRegularizer",
        "Recorder",
        "ReduceLROnPlateau",
        "SaveModelCallback",
        "ShortEpochCallback",
        "ShowGraphCallback",
        "TerminateOnNaNCallback",
        "TrackerCallback",
    ]:
        assert issubclass(getattr(training, name), Callback)
