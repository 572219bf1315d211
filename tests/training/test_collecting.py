"""Callbacks that keep what passes by."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from training import CollectData, CSVLogger, FetchPredictions, GatherPredictions, MCDropout, Progress
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
