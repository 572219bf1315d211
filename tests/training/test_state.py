"""The state: stopped anywhere and gone on with, a training ends with the bits of the unbroken one."""

import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from blocks import DataBlock, DataLoaders
from training import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CrossEntropyLossFlat,
    Learner,
    accuracy,
    body_and_head,
    fine_tune,
    flat,
    one_cycle,
)
from training.state import Position, generators, set_generators

from .toy import assert_same, batches, data, deep, doing, learner, without_times

SCHEDULE = (*fine_tune(1), *flat(1))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Counts(Callback):
    """Has a state, sets itself up in the events before the batches, and draws a random number in one of them."""

    def before_fit(self, learn: Learner) -> None:
        self.epochs = self.steps = 0

    def before_train(self, learn: Learner) -> None:
        self.steps_of_epoch = 0
        torch.rand(3)

    def after_step(self, learn: Learner) -> None:
        self.steps += 1
        self.steps_of_epoch += 1

    def after_epoch(self, learn: Learner) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "steps": self.steps, "steps_of_epoch": self.steps_of_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def shuffled() -> DataLoaders:
    """A torch DataLoader that draws a new order each epoch from the global generator."""
    x, y = (torch.cat(parts) for parts in zip(*batches((4, 4, 3)), strict=True))
    return DataLoaders(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), batches((4, 1), seed=1))


def trained(dls: Any = None, **changes: Any) -> Learner:
    """A Learner that draws random numbers in the model, in a callback, and for the order of its data."""
    settings = {"splitter": body_and_head, "metrics": accuracy, "callbacks": [Counts()]} | changes
    return learner(shuffled() if dls is None else dls, deep(dropout=0.5), **settings)


def ended(learn: Learner) -> dict[str, Any]:
    """All of the state that does not tell the time."""
    state = through_a_file(learn.state_dict())
    recorder = state["callbacks"]["Recorder"]
    recorder["history"], recorder["values"] = without_times(recorder["history"]), without_times([recorder["values"]])
    return state


class SaveAndStop(Callback):
    """Keeps the state at the `number`-th time that `event` comes, and ends the training there."""

    order = 1000

    def __init__(self, event: str, number: int):
        self.event, self.left, self.state = event, number, None

    def at(self, event: str, learn: Learner) -> None:
        if event == self.event and (event != "after_batch" or learn.training):
            if self.left == 0:
                self.state = through_a_file(learn.state_dict())
                raise CancelFitException
            self.left -= 1

    def after_step(self, learn: Learner) -> None:
        self.at("after_step", learn)

    def after_batch(self, learn: Learner) -> None:
        self.at("after_batch", learn)

    def after_train(self, learn: Learner) -> None:
        self.at("after_train", learn)

    def after_validate(self, learn: Learner) -> None:
        self.at("after_validate", learn)

    def after_epoch(self, learn: Learner) -> None:
        self.at("after_epoch", learn)


EVERYWHERE = [("after_step", 0), ("after_step", 4), *(("after_batch", k) for k in range(9))] + [
    (event, k) for event in ("after_train", "after_validate", "after_epoch") for k in range(3)
]


@pytest.mark.parametrize(("event", "number"), EVERYWHERE)
def test_a_training_stopped_anywhere_and_gone_on_with_is_the_unbroken_one(event: str, number: int) -> None:
    """Frozen phases, momentum, dropout, shuffled data, callbacks: a fresh process that loads the state ends the same."""
    torch.manual_seed(7)
    unbroken = trained()
    torch.manual_seed(7)
    unbroken.fit(SCHEDULE)

    stop = SaveAndStop(event, number)
    broken = trained()
    torch.manual_seed(7)
    broken.fit(SCHEDULE, callbacks=[stop])
    assert stop.state is not None
    fresh = trained()
    torch.rand(11)  # a process of another past
    fresh.load_state_dict(stop.state)
    fresh.resume()
    assert_same(ended(fresh), ended(unbroken))


@pytest.mark.parametrize("number", range(3))
def test_prepared_data_goes_on_from_its_batch(digits_block: DataBlock, few_digits: Path, number: int) -> None:
    dls = digits_block.dataloaders(few_digits, batch_size=32)

    def small() -> Learner:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
        learn = Learner(dls, model, lr=0.01)
        learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
        return learn

    unbroken, broken, fresh = small(), small(), small()
    unbroken.fit(one_cycle(2))
    stop = SaveAndStop("after_batch", number)
    broken.fit(one_cycle(2), callbacks=[stop])
    assert stop.state is not None
    fresh.load_state_dict(stop.state)
    fresh.resume()
    assert_same(through_a_file(fresh.model.state_dict()), through_a_file(unbroken.model.state_dict()))


def test_a_training_stopped_in_this_process_goes_on() -> None:
    def stop(learn: Learner) -> None:
        if learn.training and learn.iter == 1 and learn.epoch == 1:
            raise CancelFitException

    torch.manual_seed(7)
    unbroken = trained(data(), callbacks=[])
    unbroken.fit(SCHEDULE)
    torch.manual_seed(7)
    broken = trained(data(), callbacks=[])
    broken.fit(SCHEDULE, callbacks=[doing("after_batch", stop, order=100)])
    broken.resume()
    assert_same(ended(broken), ended(unbroken))


def test_accumulated_gradients_are_part_of_the_state() -> None:
    class EverySecond(Callback):
        def before_step(self, learn: Learner) -> None:
            if learn.iter % 2 == 0:
                raise CancelBatchException

    def accumulating() -> Learner:
        return learner(data((4, 4, 4, 4)), opt_func=torch.optim.SGD, callbacks=[EverySecond()])

    unbroken, broken, fresh = accumulating(), accumulating(), accumulating()
    unbroken.fit(2)
    stop = SaveAndStop("after_batch", 2)
    broken.fit(2, callbacks=[stop])
    assert stop.state is not None
    assert stop.state["gradients"]
    fresh.load_state_dict(stop.state)
    fresh.resume()
    assert_same(ended(fresh), ended(unbroken))


def test_what_trains_is_the_same_after_a_break_in_a_frozen_phase() -> None:
    stop = SaveAndStop("after_batch", 1)
    broken, fresh = trained(), trained()
    broken.fit(SCHEDULE, callbacks=[stop])
    assert stop.state is not None
    fresh.load_state_dict(stop.state)
    trains = {name for name, p in fresh.model.named_parameters() if p.requires_grad}
    assert trains == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_a_state_is_saved_to_a_file_and_loaded(tmp_path: Path) -> None:
    learn, fresh = trained(), trained()
    learn.fit(SCHEDULE)
    path = learn.save(tmp_path / "new" / "learner.pt")
    assert path == tmp_path / "new" / "learner.pt"
    assert [file.name for file in path.parent.iterdir()] == ["learner.pt"]
    assert fresh.load(path) is fresh
    assert_same(ended(fresh), ended(learn))


def test_a_finished_run_has_nothing_left_to_go_on_with() -> None:
    learn = trained(data())
    learn.fit(1)
    before = through_a_file(learn.model.state_dict())
    learn.resume()
    assert_same(through_a_file(learn.model.state_dict()), before)
    assert len(learn.recorder.history) == 1


def test_without_a_run_there_is_nothing_to_resume() -> None:
    with pytest.raises(ValueError, match="there is no run to go on with"):
        learner().resume()


def test_a_run_to_resume_is_one_on_workers() -> None:
    with pytest.raises(ValueError, match=r"resume='run-1' names a run on workers: give on=... as well"):
        learner().fit(1, resume="run-1")


def test_another_fit_after_a_loaded_state_begins_at_its_beginning() -> None:
    stop = SaveAndStop("after_batch", 1)
    broken, fresh = trained(data()), trained(data())
    broken.fit(SCHEDULE, callbacks=[stop])
    assert stop.state is not None
    fresh.load_state_dict(stop.state)
    fresh.fit(2)
    assert [values["epoch"] for values in fresh.recorder.history] == [0, 1]


def test_rates_by_slice_are_part_of_the_state() -> None:
    learn, fresh = trained(data()), trained(data())
    learn.fit(1, lr=slice(1e-3, 1e-1))
    fresh.load_state_dict(through_a_file(learn.state_dict()))
    assert fresh.run_lr == slice(1e-3, 1e-1)


def test_start_epoch_begins_the_schedule_there() -> None:
    rates: list[float] = []
    note = doing("before_step", lambda learn: rates.append(learn.opt.param_groups[-1]["lr"]), order=100)
    learn = learner(callbacks=[note])
    learn.fit(fine_tune(2), start_epoch=2)
    later = rates.copy()
    rates.clear()
    learn.fit(fine_tune(2))
    assert later == rates[6:]
    assert [values["epoch"] for values in learn.recorder.history] == [2, 0, 1, 2]
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"start_epoch=.* epochs 0 to 2"):
            learn.fit(fine_tune(2), start_epoch=wrong)


def test_positions_go_through_a_schedule() -> None:
    schedule, at, seen = (*flat(2), *flat(1)), Position(), []
    while at.phase < len(schedule):
        seen.append((at.phase, at.epoch, at.epochs_before(schedule)))
        at = at.next_epoch(schedule)
    assert seen == [(0, 0, 0), (0, 1, 1), (1, 0, 2)]
    assert at.epochs_before(schedule) == 3


def test_generators_are_taken_back() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), torch.rand(2).tolist()]

    draw()
    state = through_a_file(generators())
    first = draw()
    assert draw() != first
    set_generators(state)
    assert draw() == first


def test_a_loss_with_a_state_of_tensors_is_trained_where_the_model_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, pred: Tensor, targ: Tensor) -> Tensor:
            return CrossEntropyLossFlat()(pred, targ) * self.scale

    learn = learner(loss_func=Scaled(), opt_func=partial(torch.optim.SGD, lr=0.1))
    learn.fit(1)
    assert learn.recorder.history[0]["train/loss"] > 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("event", ["before_batch", "after_step", "after_batch", "after_epoch", "before_fit"])
def test_a_run_that_failed_goes_on_with_its_whole_record(event: str, error: type[BaseException]) -> None:
    """Once: the epoch's loss was that of the batches after the error alone."""
    failed: list[bool] = []

    def fail(learn: Learner) -> None:
        if not failed and (
            event == "before_fit" or (learn.training, learn.epoch, learn.iter) == (True, 1, 1) or event == "after_epoch"
        ):
            failed.append(True)
            raise error

    unbroken = trained(data())
    torch.manual_seed(7)
    unbroken.fit(SCHEDULE)
    broken = trained(data())
    broken.add_callback(doing(event, fail, order=100))
    torch.manual_seed(7)
    with pytest.raises(error):
        broken.fit(SCHEDULE)
    broken.resume()
    broken.callbacks.pop()
    assert_same(ended(broken), ended(unbroken))


def test_a_resumed_run_that_fails_before_its_place_can_be_resumed_again() -> None:
    def fail(learn: Learner) -> None:
        raise ZeroDivisionError

    unbroken = trained(data())
    torch.manual_seed(7)
    unbroken.fit(SCHEDULE)
    stop, fresh = SaveAndStop("after_batch", 4), trained(data())
    broken = trained(data())
    torch.manual_seed(7)
    broken.fit(SCHEDULE, callbacks=[stop])
    assert stop.state is not None
    fresh.load_state_dict(stop.state)
    with pytest.raises(ZeroDivisionError):
        fresh.resume(callbacks=[doing("before_train", fail, order=100)])
    fresh.resume()
    assert_same(ended(fresh), ended(unbroken))


def test_of_several_ranks_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = trained(data())
    monkeypatch.setattr("training.distributed.rank", lambda: 1)
    assert not learn.save(tmp_path / "learner.pt").exists()
