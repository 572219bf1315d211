"""Callbacks on Ray workers: what one rank decides, all do; what they learned, print and keep comes home as if from here."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from torch import nn

from blocks import DataBlock
from cluster import Workers, dataloaders
from training import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    EarlyStopping,
    Learner,
    SaveBest,
    TerminateOnNaN,
    accuracy,
    distributed,
    valley,
)

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what this file defines travels by value, because workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def learner(digits_block: DataBlock, few_digits: Path) -> Callable[..., Learner]:
    dls = dataloaders(digits_block, few_digits, batch_size=16)

    def make(*callbacks: Callback) -> Learner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
        # SGD, because Adam's first steps turn the rounding of a sum over ranks into steps of full size.
        sgd = torch.optim.SGD
        return Learner(
            dls, model, None, lambda groups: sgd(groups, lr=0.1, momentum=0.9), 0.1, metrics=accuracy, callbacks=callbacks
        )

    return make


def decides() -> bool:
    """Whether this is the rank that decides for all: the last."""
    return distributed.rank() == distributed.world() - 1


class Decides(Callback):
    """Cancels a batch, the rest of a training part and an epoch, and makes a loss that is no number, on one rank."""

    order = -20  # before TerminateOnNaN looks

    def after_loss(self, learn: Learner) -> None:
        if not decides() or not learn.training:
            return
        match learn.epoch, learn.iter:
            case 0, 2:
                raise CancelBatchException
            case 1, 3:
                raise CancelTrainException
            case 2, 1:
                raise CancelEpochException
            case 4, 2:
                learn.loss = learn.loss * float("nan")


class Counts(Callback):
    """Has a state of its own."""

    def __init__(self) -> None:
        self.batches = self.epochs = 0

    def after_batch(self, learn: Learner) -> None:
        self.batches += learn.training

    def after_epoch(self, learn: Learner) -> None:
        self.epochs += 1
        print(f"epoch {learn.epoch} of mine")

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.epochs = state["batches"], state["epochs"]


def assert_alike(here: Learner, there: Learner) -> None:
    """Both are in the same state, to float error."""
    assert there.position == here.position
    assert (there.epoch, there.epochs_trained, there.schedule) == (here.epoch, here.epochs_trained, here.schedule)
    for a, b in zip(here.model.state_dict().values(), there.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    of_here, of_there = here.opt.state_dict(), there.opt.state_dict()
    rates = [[(group["lr"], group["momentum"]) for group in state["param_groups"]] for state in (of_here, of_there)]
    assert rates[0] == rates[1]
    for a, b in zip(of_here["state"].values(), of_there["state"].values(), strict=True):
        assert torch.allclose(a["momentum_buffer"], b["momentum_buffer"], atol=1e-5)
    assert len(there.recorder.history) == len(here.recorder.history)
    for a, b in zip(here.recorder.history, there.recorder.history, strict=True):
        named = {name: value for name, value in a.items() if not name.startswith("time/")}
        assert {name: value for name, value in b.items() if not name.startswith("time/")} == pytest.approx(named, abs=1e-4)
    assert len(there.recorder.losses) == len(here.recorder.losses)


@pytest.mark.filterwarnings("ignore:SaveBest watches valid/loss, which epoch 2 did not record")
def test_one_ranks_cancels_and_state_of_ones_own(learner: Callable[..., Learner], capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = (Decides, TerminateOnNaN, Counts, SaveBest)
    here, there = (learner(*(make() for make in callbacks)) for _ in range(2))
    here.fit(6)
    printed_here = capsys.readouterr().out
    there.fit(6, on=Workers(2))
    printed = capsys.readouterr().out
    assert_alike(here, there)
    assert len(there.recorder.history) == 4
    for name in ("counts", "save_best"):
        mine, theirs = getattr(here, name).state_dict(), getattr(there, name).state_dict()
        mine.pop("kept", None)
        theirs.pop("kept", None)
        assert theirs == pytest.approx(mine, abs=1e-4)
    assert there.counts.batches == here.counts.batches > 0
    reason = "stopped: the loss of epoch 4, batch 2 is nan"
    assert reason in printed_here.splitlines()
    assert f"rank 1: {reason}" in printed.splitlines()  # what callbacks print on workers reaches the person
    assert "epoch 0 of mine" in printed.splitlines()
    assert "rank 1: epoch 0 of mine" in printed.splitlines()


def test_stopping_early_and_going_on(learner: Callable[..., Learner], capsys: pytest.CaptureFixture[str]) -> None:
    """Two fits in a row, on workers and here, with what the first has left."""

    def train(learn: Learner, **where: Any) -> Learner:
        learn.fit(5, callbacks=[EarlyStopping("valid/loss", patience=1, min_delta=1.0)], **where)
        learn.fit_one_cycle(1, 0.05, **where)
        return learn

    here, there = train(learner()), train(learner(), on=Workers(2))
    assert_alike(here, there)
    assert len(there.recorder.history) == 3
    assert capsys.readouterr().out.count("stopped early: valid/loss was best, ") == 2


def test_finding_a_rate_on_workers(learner: Callable[..., Learner]) -> None:
    here, there = learner(), learner()
    found_here = here.lr_find(1e-4, 10.0, 30, suggest_funcs=(valley,))
    found = there.lr_find(1e-4, 10.0, 30, suggest_funcs=(valley,), on=Workers(2))
    assert found.lrs == pytest.approx(found_here.lrs)
    assert found.losses == pytest.approx(found_here.losses, abs=1e-3)
    assert found.valley == pytest.approx(found_here.valley)
    assert_alike(here, there)
    assert there.recorder.history == []
