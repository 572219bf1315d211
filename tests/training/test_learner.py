"""The Learner on toy data: the loop against plain PyTorch, phases and freezing, the record, results, state."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from blocks import DataLoaders, Pipeline, TensorBase, TensorCategory, Transform
from training import (
    AvgMetric,
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    Curve,
    Learner,
    Phase,
    QHAdam,
    accuracy,
    body_and_head,
    error_rate,
    fine_tune,
    flat,
    one_cycle,
)

from .toy import Sizes, batches, data

SGD = torch.optim.SGD


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def deep() -> nn.Sequential:
    """Three layers with parameters and a BatchNorm."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def by_layer(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(child.parameters()) for child in model.children() if list(child.parameters())]


def learner(dls: Any = None, model: nn.Module | None = None, **changes: Any) -> Learner:
    defaults: dict[str, Any] = {"loss_func": CrossEntropyLossFlat(), "lr": 0.1}
    return Learner(data() if dls is None else dls, model or linear(), **defaults | changes)


def weights(learn: Learner) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in learn.model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Look(Callback):
    """Keeps what `what(learn)` gives at each `event` of the training part; called after all others."""

    order = 100

    def __init__(self, event: str, what: Callable[[Learner], Any]):
        self.event, self.what, self.seen = event, what, []

    def look(self, event: str, learn: Learner) -> None:
        if event == self.event:
            self.seen.append(self.what(learn))

    def before_step(self, learn: Learner) -> None:
        self.look("before_step", learn)

    def after_epoch(self, learn: Learner) -> None:
        self.look("after_epoch", learn)


# --- the loop ----------------------------------------------------------------------------------------------------------


def test_training_is_the_loop_one_would_write_in_pytorch() -> None:
    learn, model = learner(opt_func=SGD, metrics=accuracy), linear()
    learn.fit(2)
    optimizer = SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(2):
        total = 0.0
        for x, y in batches((4, 4, 3)):
            loss = cross_entropy(model(x), y)
            total += loss.item() * len(x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            valid = [(model(x), y) for x, y in batches((4, 1), seed=1)]
        pred, targ = (torch.cat(parts) for parts in zip(*valid, strict=True))
        right = (pred.argmax(1) == targ).double().mean().item()
        history.append((total / 11, cross_entropy(pred, targ).item(), right))
    assert_same(weights(learn), model.state_dict())
    recorded = [(v["train/loss"], v["valid/loss"], v["valid/accuracy"]) for v in learn.recorder.history]
    assert recorded == [pytest.approx(values, rel=1e-6) for values in history]


def test_it_learns() -> None:
    learn = learner(data(train=(16, 16), valid=(16,)), metrics=[accuracy, error_rate])
    before = learn.validate()
    learn.fit_one_cycle(20)
    after = learn.validate()
    assert after["valid/loss"] < before["valid/loss"] / 5
    assert after["valid/accuracy"] == 1
    assert after["valid/error_rate"] == 0


def test_a_torch_dataloader_serves_as_well() -> None:
    def loader(sizes: Sizes, seed: int) -> Any:
        x, y = (torch.cat(parts) for parts in zip(*batches(sizes, seed), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=4)

    from_list = learner(data(train=(4, 4, 3), valid=(4, 1)))
    from_loader = learner(DataLoaders(loader((4, 4, 3), 0), loader((4, 1), 1)))
    from_list.fit(2)
    from_loader.fit(2)
    assert_same(weights(from_list), weights(from_loader))
    assert from_loader.recorder.history[1]["valid/loss"] == from_list.recorder.history[1]["valid/loss"]


def test_anything_with_train_and_valid_serves_as_well() -> None:
    learn = learner(SimpleNamespace(train=batches((4, 4)), valid=batches((4,), seed=1)))
    learn.fit(1)
    same = learner(data((4, 4), (4,)))
    same.fit(1)
    assert_same(weights(learn), weights(same))


def test_several_inputs_and_targets() -> None:
    class Sum(nn.Linear):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return super().forward(one + other)

    rows = [(x, x, y, y) for x, y in batches((4, 4))]
    torch.manual_seed(1)
    learn = learner(
        DataLoaders(rows, rows, n_inp=2), Sum(3, 2), loss_func=lambda p, y, z: cross_entropy(p, y) + 2 * cross_entropy(p, z)
    )
    expected = torch.stack([3 * cross_entropy(learn.model(x, x), y) for x, _, y, _ in rows]).mean()
    assert learn.validate()["valid/loss"] == pytest.approx(expected.item())


def test_the_model_trains_in_training_mode_and_validates_in_evaluation_mode() -> None:
    modes = []
    learn = learner(model=deep())
    learn.model[0].register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    learn.fit(1)
    assert modes == [(True, True)] * 3 + [(False, False)] * 2


def test_a_number_of_epochs_is_flat() -> None:
    rates = Look("before_step", lambda learn: learn.opt.param_groups[0]["lr"])
    learn = learner(callbacks=[rates])
    learn.fit(2)
    assert learn.schedule == flat(2)
    assert rates.seen == [0.1] * 6


def test_the_rate_given_to_fit_is_that_of_one_run() -> None:
    learn = learner()
    learn.fit(1, lr=0.03)
    learn.fit(1)
    assert [values["hp/lr"] for values in learn.recorder.history] == [0.03, learn.lr]


@pytest.mark.parametrize("short", [lambda learn: learn.fit_one_cycle(3, 0.2), lambda learn: learn.fine_tune(3, 0.2)])
def test_fit_one_cycle_and_fine_tune_are_their_schedules(short: Callable[[Learner], None]) -> None:
    learn, by_schedule = learner(), learner()
    short(learn)
    assert learn.schedule in (one_cycle(3), fine_tune(3))
    by_schedule.fit(learn.schedule, 0.2)
    assert_same(weights(learn), weights(by_schedule))


@pytest.mark.parametrize("bad", [(), [], "abc", (1, 2), (flat(1),), 1.5, None, Phase(1)])
def test_what_is_no_schedule_is_refused_and_changes_nothing(bad: Any) -> None:
    learn = learner()
    before = weights(learn)
    with pytest.raises(TypeError, match="a schedule is a number of epochs or a tuple of Phases"):
        learn.fit(bad)
    assert learn.schedule == ()
    assert_same(weights(learn), before)


def test_no_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one epoch"):
        learner().fit(0)


class OnceThrough:
    """An iterator that knows its length."""

    def __init__(self, rows: list[Any]):
        self.rows, self.left = rows, iter(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return self.left


@pytest.mark.parametrize("once", [OnceThrough, iter, lambda rows: (row for row in rows)], ids=["sized", "iter", "generator"])
def test_an_iterator_that_is_used_up_is_said(once: Callable[[Any], Any]) -> None:
    learn = learner(DataLoaders(once(batches((4, 4)))))
    with pytest.raises((TypeError, ValueError), match="an iterator can be used once, give a list or a DataLoader"):
        learn.fit(2)


@pytest.mark.parametrize("loss_func", [CrossEntropyLossFlat(), None])
def test_training_data_without_batches_is_said(loss_func: Any) -> None:
    with pytest.raises(ValueError, match="no batches"):
        learner(DataLoaders([]), loss_func=loss_func).fit(1)


def test_without_validation_data_there_are_no_validation_values() -> None:
    learn = learner(DataLoaders(batches((4,))), metrics=accuracy)
    learn.fit(1)
    assert not [name for name in learn.recorder.history[0] if name.startswith("valid/")]
    assert learn.validate() == {}


def test_fit_goes_on_where_the_last_one_ended() -> None:
    learn = learner(opt_func=partial(SGD, lr=0.1, momentum=0.9))
    learn.fit(1)
    learn.fit(1)
    at_once = learner(opt_func=partial(SGD, lr=0.1, momentum=0.9))
    at_once.fit(2)
    assert_same(weights(learn), weights(at_once))
    assert len(learn.recorder.history) == 2


def test_a_runner_is_given_the_schedule_instead() -> None:
    ran = []

    class Elsewhere:
        def run(self, learn: Learner, schedule: Any, lr: float, resume: Any) -> None:
            ran.append((learn, schedule, lr))

    learn = learner()
    before = weights(learn)
    learn.fit(2, on=Elsewhere())
    learn.fit_one_cycle(3, 0.5, on=Elsewhere())
    learn.fine_tune(1, on=Elsewhere())
    assert ran == [(learn, flat(2), 0.1), (learn, one_cycle(3), 0.5), (learn, fine_tune(1), 0.1)]
    assert_same(weights(learn), before)


# --- loss and batch transforms -----------------------------------------------------------------------------------------


def test_the_loss_is_inferred_from_the_type_of_the_target() -> None:
    typed = [(x, y.as_subclass(TensorCategory)) for x, y in batches((4, 4))]
    learn = learner(DataLoaders(typed, typed), loss_func=None)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    x, y = typed[0]
    assert learn.validate()["valid/loss"] > 0
    assert type(learn.loss_func(learn.model(x), y.as_subclass(Tensor))) is Tensor


class TensorScore(TensorBase):
    """A target of a type for which no loss is known."""


@pytest.mark.parametrize("kind", [Tensor, TensorScore])
def test_a_target_of_another_type_needs_a_loss(kind: type[Tensor]) -> None:
    unknown = [(x, y.as_subclass(kind)) for x, y in batches((4,))]
    with pytest.raises(ValueError, match=rf"targets of type {kind.__name__}: pass loss_func=... to the Learner"):
        learner(DataLoaders(unknown), loss_func=None)


def test_the_model_and_the_loss_are_given_plain_tensors() -> None:
    typed = [(x.as_subclass(TensorScore), y.as_subclass(TensorCategory)) for x, y in batches((4,))]
    seen = []

    def loss(pred: Tensor, targ: Tensor) -> Tensor:
        seen.append((type(pred), type(targ)))
        return cross_entropy(pred, targ)

    learner(DataLoaders(typed), loss_func=loss).fit(1)
    assert seen == [(Tensor, Tensor)]


@dataclass
class AddOne(Transform):
    """Adds one to the input, on training data only."""

    split_idx: ClassVar[int | None] = 0

    def encodes(self, x: TensorScore) -> Tensor:
        return x + 1


def test_batch_transforms_run_on_the_part_they_are_meant_for() -> None:
    typed = [(torch.zeros(4, 3).as_subclass(TensorScore), torch.zeros(4, dtype=torch.int64))]
    learn = learner(DataLoaders(typed, typed, batch_tfms=Pipeline.of(AddOne)))
    inputs: list[float] = []
    learn.model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].max().item()))
    learn.fit(1)
    learn.get_preds()
    assert inputs == [1, 0, 0]


# --- results -----------------------------------------------------------------------------------------------------------


def test_validate_gives_the_exact_means_and_changes_nothing() -> None:
    learn = learner(model=deep(), metrics=[accuracy, error_rate])
    before = weights(learn)
    found = learn.validate()
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
        pred = learn.model.eval()(x)
    right = (pred.argmax(1) == y).double().mean().item()
    assert found == {
        "valid/loss": pytest.approx(cross_entropy(pred, y).item()),
        "valid/accuracy": pytest.approx(right),
        "valid/error_rate": pytest.approx(1 - right),
    }
    assert_same(weights(learn), before)
    assert learn.recorder.history == []


def test_get_preds_gives_probabilities_and_targets_in_order() -> None:
    learn = learner()
    probabilities, targets = learn.get_preds()
    x, y = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
    torch.testing.assert_close(probabilities, learn.model(x).softmax(dim=1).detach())
    assert torch.equal(targets, y)
    assert not probabilities.requires_grad


def test_get_preds_of_other_batches_also_without_targets() -> None:
    learn = learner()
    x, _ = learn.dls.train[0]
    probabilities, targets = learn.get_preds([(x[:1],), (x[1:],)])
    torch.testing.assert_close(probabilities, learn.model(x).softmax(dim=1).detach())
    assert len(targets) == 0


def test_get_preds_of_a_loss_that_knows_no_activation_gives_the_output() -> None:
    learn = learner(loss_func=cross_entropy)
    x, _ = learn.dls.train[0]
    torch.testing.assert_close(learn.get_preds([(x,)])[0], learn.model(x).detach())


# --- freezing, phases, rates -------------------------------------------------------------------------------------------


def training_layers(learn: Learner) -> set[str]:
    return {name.partition(".")[0] for name, p in learn.model.named_parameters() if p.requires_grad}


def test_freeze_and_unfreeze() -> None:
    learn = learner(model=deep(), splitter=by_layer)
    learn.freeze()
    assert training_layers(learn) == {"1", "3"}
    learn.freeze_to(-1, train_bn=False)
    assert training_layers(learn) == {"3"}
    learn.freeze_to(1)
    assert training_layers(learn) == {"1", "3"}
    learn.unfreeze()
    assert training_layers(learn) == {"0", "1", "3"}


@pytest.mark.parametrize("n", [3, -4])
def test_freezing_beyond_the_groups_is_refused(n: int) -> None:
    learn = learner(model=deep(), splitter=by_layer)
    with pytest.raises(ValueError, match="3 parameter groups"):
        learn.freeze_to(n)
    with pytest.raises(ValueError, match="3 parameter groups"):
        learn.fit((Phase(1, freeze_to=n),))


@pytest.mark.parametrize("train_bn", [True, False])
def test_a_frozen_phase_moves_the_head_and_the_next_one_all(train_bn: bool) -> None:
    look = Look("after_epoch", weights)
    learn = learner(model=deep(), splitter=body_and_head, callbacks=[look])
    start = weights(learn)
    learn.fit((Phase(1, freeze_to=-1, train_bn=train_bn), Phase(1, freeze_to=0)))

    def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        parameters = [name for name, _ in learn.model.named_parameters()]
        return {name for name in parameters if not torch.equal(before[name], after[name])}

    frozen, whole = look.seen
    assert moved(start, frozen) == {"3.weight", "3.bias"} | ({"1.weight", "1.bias"} if train_bn else set())
    assert moved(frozen, whole) == {name for name, _ in learn.model.named_parameters()}


def test_the_groups_train_at_rates_of_their_own() -> None:
    def rates(learn: Learner) -> dict[int, float]:
        return {g["layer_group"]: g["lr"] for g in learn.opt.param_groups}

    look = Look("before_step", rates)
    learner(model=deep(), splitter=by_layer, callbacks=[look]).fit((Phase(1, spread=100),))
    assert look.seen == [{0: pytest.approx(0.001), 1: pytest.approx(0.01), 2: pytest.approx(0.1)}] * 3


def test_each_step_has_the_rate_and_the_momentum_of_its_place_in_the_phase() -> None:
    look = Look("before_step", lambda learn: (learn.opt.param_groups[0]["lr"], learn.opt.param_groups[0]["mom"]))
    learn = learner(callbacks=[look])
    rising = Phase(2, lr=Curve(((0.0, 0.0), (1.0, 1.0))), momentum=Curve(((0.0, 0.9), (1.0, 0.5))))
    learn.fit((Phase(1, lr=Curve(((0.0, 7.0),))), rising))
    assert look.seen == [(pytest.approx(0.7), 0.9)] * 3 + [
        (pytest.approx(0.1 * rising.lr.at(k / 6)), pytest.approx(rising.momentum.at(k / 6))) for k in range(6)
    ]


def test_how_a_composed_optimizer_is_carried_out_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(opt_func=QHAdam)
    learn.fit(2)
    learn.fit(1)
    assert capsys.readouterr().out.count("optimizer not compiled: 6 steps of 8 numbers are too few to pay for it") == 1


# --- the record --------------------------------------------------------------------------------------------------------


def test_the_fields_of_the_history() -> None:
    learn = learner(metrics=[accuracy, AvgMetric(error_rate)])
    learn.fit_one_cycle(3)
    assert [v["epoch"] for v in learn.recorder.history] == [0, 1, 2]
    for values in learn.recorder.history:
        assert set(values) == {
            "epoch", "train/loss", "valid/loss", "valid/accuracy", "valid/error_rate", "hp/lr", "hp/momentum", "hp/wd",
            "time/epoch", "time/train", "time/stall", "time/rows_per_second",
        }  # fmt: skip
        assert all(type(v) in (int, float) for v in values.values())
    last_step = 8 / 9
    assert learn.recorder.history[-1]["hp/lr"] == pytest.approx(0.1 * one_cycle(3)[0].lr.at(last_step))


class Slow(list[Any]):
    """Batches that are waited for."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            time.sleep(0.02)
            yield batch


def test_the_time_of_waiting_for_data() -> None:
    """Of an epoch's training batches: not of those before, and not of the validation."""
    learn = learner(DataLoaders(Slow(batches((4, 4, 3))), Slow(batches((4,)))))
    learn.fit(2)
    for values in learn.recorder.history:
        assert 0.06 <= values["time/stall"] <= values["time/train"]


def test_a_line_an_epoch_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(metrics=accuracy)
    learn.fit((Phase(1), Phase(1)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for line, values in zip(lines, learn.recorder.history, strict=True):
        train, valid, right = (values[name] for name in ("train/loss", "valid/loss", "valid/accuracy"))
        assert f"train loss {train:.4f}  valid loss {valid:.4f}  accuracy {right:.4f}  " in line


# --- state -------------------------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Counts(Callback):
    """Has a state of its own."""

    batches = 0

    def after_step(self, learn: Learner) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def stateful() -> Learner:
    return learner(model=deep(), splitter=body_and_head, metrics=accuracy, callbacks=[Counts()])


def test_the_state_goes_through_a_file_into_a_fresh_learner() -> None:
    learn = stateful()
    learn.fit(fine_tune(2), lr=0.05)
    fresh = stateful()
    with torch.no_grad():
        for p in fresh.model.parameters():
            p.zero_()
    fresh.load_state_dict(saved_and_loaded(learn.state_dict()))
    assert fresh.validate() == learn.validate()
    assert fresh.recorder.history == learn.recorder.history
    assert (fresh.schedule, fresh.epoch, fresh.run_lr) == (fine_tune(2), 3, 0.05)
    assert [c.batches for c in fresh.callbacks if isinstance(c, Counts)] == [9]


def test_training_goes_on_from_a_loaded_state_as_without_a_break() -> None:
    """The optimizer's moments are part of the state: the next step depends on them."""
    learn = stateful()
    learn.fit(1)
    fresh = stateful()
    fresh.load_state_dict(saved_and_loaded(learn.state_dict()))
    learn.fit(1)
    fresh.fit(1)
    assert_same(weights(fresh), weights(learn))


def test_a_loaded_history_is_not_shared_with_what_was_loaded() -> None:
    learn, fresh = stateful(), stateful()
    learn.fit(1)
    state = learn.state_dict()
    fresh.load_state_dict(state)
    fresh.fit(1)
    assert len(fresh.recorder.history) == 2
    assert len(state["callbacks"]["Recorder"]["history"]) == 1


def test_a_learner_that_has_not_trained_has_a_state() -> None:
    state = saved_and_loaded(stateful().state_dict())
    learn = stateful()
    learn.load_state_dict(state)
    assert state["optimizer"] is None
    assert learn.recorder.history == []


def test_the_state_of_a_cancelled_training_is_that_of_its_last_step() -> None:
    class Stop(Callback):
        def after_step(self, learn: Learner) -> None:
            raise CancelFitException

    learn = learner(callbacks=[Stop()])
    learn.fit(1)
    one_step = learner(data(train=(4,)))
    one_step.fit(1)
    assert_same(saved_and_loaded(learn.state_dict())["model"], weights(one_step))


def test_the_error_of_a_splitter_is_its_own() -> None:
    """An AttributeError inside of a property would be told as one of the Learner's."""
    learn = Learner(data(), linear(), CrossEntropyLossFlat(), splitter=lambda model: [list(model.body.parameters())])
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'body'"):
        learn.fit(1)


def test_a_run_that_begins_within_a_phase_freezes_as_the_phase_says() -> None:
    learn = Learner(data(), deep(), CrossEntropyLossFlat(), splitter=body_and_head)
    learn.fit(fine_tune(1, freeze_epochs=2)[:1], start_epoch=1)
    assert [p.requires_grad for p in learn.layer_groups[0]] == [False, False, True, True]  # BatchNorm trains
