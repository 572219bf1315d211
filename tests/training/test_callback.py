"""Callbacks: which events come in which order, what each cancel exception skips, what a callback can change."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blocks import DataLoaders
from training import (
    EVENTS,
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    CrossEntropyLossFlat,
    Learner,
    before_batch_cb,
)

FORWARD = ["before_batch", "after_pred", "after_loss"]
TRAIN_BATCH = [*FORWARD, "before_backward", "after_backward", "before_step", "after_step", "after_batch"]
VALID_BATCH = [*FORWARD, "after_batch"]


def events_of(epochs: int, train: int, valid: int) -> list[str]:
    """The events of a fit in which nothing is cancelled."""
    epoch = ["before_epoch", "before_train", *TRAIN_BATCH * train, "after_train"]
    epoch += ["before_validate", *VALID_BATCH * valid, "after_validate", "after_epoch"]
    return ["before_fit", *epoch * epochs, "after_fit"]


def batches(sizes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)) for n in sizes]


def sgd_learner(*callbacks: Callback, train: tuple[int, ...] = (4, 4, 2), valid: tuple[int, ...] = (4, 3)) -> Learner:
    """A linear classifier under plain SGD at the rate 0.5."""
    torch.manual_seed(1)
    dls = DataLoaders(batches(train), batches(valid, seed=1))
    return Learner(dls, nn.Linear(3, 2), CrossEntropyLossFlat(), torch.optim.SGD, lr=0.5, callbacks=callbacks)


def weights(learn: Learner) -> Tensor:
    return torch.cat([p.detach().clone().flatten() for p in learn.model.parameters()])


def doing(event: str, action: Callable[[Learner], Any], order: int = 0) -> Callback:
    """A callback that does one thing at one event."""
    return type("Doing", (Callback,), {event: lambda self, learn: action(learn), "order": order})()


class Events(Callback):
    """Notes the name of every event."""

    order = -100

    def __init__(self) -> None:
        self.seen: list[str] = []


for _event in EVENTS:
    setattr(Events, _event, lambda self, learn, event=_event: self.seen.append(event))


class RaisesOnce(Callback):
    """Raises `error` at the first `event`, in validation if `in_validation`; after all others of that event."""

    order = 100

    def __init__(self, error: type[Exception], event: str, in_validation: bool = False):
        self.error, self.event, self.in_validation, self.raised = error, event, in_validation, False

    def at(self, event: str, learn: Learner) -> None:
        if event == self.event and not self.raised and (not self.in_validation or not learn.training):
            self.raised = True
            raise self.error


for _event in EVENTS:
    setattr(RaisesOnce, _event, lambda self, learn, event=_event: self.at(event, learn))


def test_events_are_the_documented_methods_in_order() -> None:
    assert EVENTS == (
        "after_create",
        "before_fit",
        "before_epoch",
        "before_train",
        "before_batch",
        "after_pred",
        "after_loss",
        "before_backward",
        "after_cancel_backward",
        "after_backward",
        "before_step",
        "after_cancel_step",
        "after_step",
        "after_cancel_batch",
        "after_batch",
        "after_cancel_train",
        "after_train",
        "before_validate",
        "after_cancel_validate",
        "after_validate",
        "after_cancel_epoch",
        "after_epoch",
        "after_cancel_fit",
        "after_fit",
    )
    assert all(getattr(Callback, event).__doc__ for event in EVENTS)


def test_a_fit_gives_the_events_in_the_order_of_the_loop() -> None:
    events = Events()
    sgd_learner(events).fit(2)
    assert events.seen == ["after_create", *events_of(epochs=2, train=3, valid=2)]


@pytest.mark.parametrize(("epochs", "train", "valid"), [(1, 1, 0), (1, 2, 1), (3, 4, 2)])
def test_how_often_each_event_comes(epochs: int, train: int, valid: int) -> None:
    events = Events()
    sgd_learner(events, train=(2,) * train, valid=(3,) * valid).fit(epochs)
    batch, epoch = epochs * (train + valid), epochs
    step = epochs * train
    assert Counter(events.seen) == {
        **dict.fromkeys(["after_create", "before_fit", "after_fit"], 1),
        **dict.fromkeys(
            ["before_epoch", "before_train", "after_train", "before_validate", "after_validate", "after_epoch"], epoch
        ),
        **dict.fromkeys(["before_batch", "after_pred", "after_loss", "after_batch"], batch),
        **dict.fromkeys(["before_backward", "after_backward", "before_step", "after_step"], step),
    }


def test_validate_alone_gives_the_events_of_validation() -> None:
    events = Events()
    sgd_learner(events).validate()
    assert events.seen == ["after_create", "before_validate", *VALID_BATCH * 2, "after_validate"]


@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [
        ("before_bacth", "before_batch"),
        ("after_epochs", "after_epoch"),
        ("befor_fit", "before_fit"),
        ("after_cancel_valid", "after_cancel_validate"),
    ],
)
def test_a_misspelled_event_fails_at_the_definition(misspelled: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"Wrong\.{misspelled} is not an event .*did you mean '{meant}'\?"):
        type("Wrong", (Callback,), {misspelled: lambda self, learn: None})


def test_helper_methods_and_attributes_are_allowed() -> None:
    class Fine(Callback):
        after = "an attribute"

        def update(self) -> None: ...
        def batch_size(self) -> None: ...
        def fit_line(self) -> None: ...
        def _before_all(self) -> None: ...

    assert Fine().name == "Fine"


def test_lower_order_is_called_first_and_equal_orders_as_added() -> None:
    seen: list[str] = []

    def noting(name: str, order: int) -> Callback:
        return doing("before_fit", lambda learn: seen.append(name), order)

    sgd_learner(noting("late", 5), noting("first of 0", 0), noting("second of 0", 0), noting("early", -5)).fit(1)
    assert seen == ["early", "first of 0", "second of 0", "late"]


def test_a_callback_is_created_heard_and_removed() -> None:
    learn, events = sgd_learner(), Events()
    learn.add_callback(events)
    assert events.seen == ["after_create"]
    learn.validate()
    heard = len(events.seen)
    learn.remove_callback(events)
    learn.validate()
    assert heard > 1
    assert len(events.seen) == heard
    assert events not in learn.callbacks


def test_only_the_given_callback_is_removed_not_one_like_it() -> None:
    stays, goes = Events(), Events()
    learn = sgd_learner(stays, goes)
    learn.remove_callback(goes)
    learn.validate()
    assert goes.seen == ["after_create"]
    assert len(stays.seen) > 1


def test_a_callback_without_events_is_never_called() -> None:
    """So it costs nothing: nobody looks for it when an event comes."""
    learn = sgd_learner()
    before = {event: list(listeners) for event, listeners in learn._listeners.items()}
    learn.add_callback(Callback())
    assert learn._listeners == before


def test_a_callback_may_remove_itself_during_an_event() -> None:
    seen: list[int] = []

    class Once(Callback):
        def before_batch(self, learn: Learner) -> None:
            seen.append(learn.iter)
            learn.remove_callback(self)

    sgd_learner(Once(), doing("before_batch", lambda learn: seen.append(100 + learn.iter)), valid=()).fit(1)
    assert seen == [0, 100, 101, 102]


@pytest.mark.parametrize("wrong", [Events, print, "Events"])
def test_what_is_no_callback_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="an object of a subclass of Callback"):
        sgd_learner(wrong)
    with pytest.raises(TypeError, match="an object of a subclass of Callback"):
        sgd_learner().add_callback(wrong)


# --- cancelling --------------------------------------------------------------------------------------------------------

IN_TRAINING = [
    (CancelBackwardException, "backward", ["before_backward"]),
    (CancelStepException, "step", ["before_step"]),
    (CancelBatchException, "batch", TRAIN_BATCH[:-1]),
    (CancelTrainException, "train", ["before_train", *TRAIN_BATCH]),
    (CancelEpochException, "epoch", ["before_epoch", "before_train", *TRAIN_BATCH, "after_train"]),
    (CancelFitException, "fit", ["before_fit", "before_epoch", "before_train", *TRAIN_BATCH, "after_train", "after_epoch"]),
]
IN_VALIDATION = [
    (CancelBatchException, "batch", VALID_BATCH[:-1]),
    (CancelValidException, "validate", ["before_validate", *VALID_BATCH]),
    (CancelEpochException, "epoch", ["before_validate", *VALID_BATCH, "after_validate"]),
    (CancelFitException, "fit", ["before_validate", *VALID_BATCH, "after_validate"]),
]
CASES = [(error, part, event, False) for error, part, events in IN_TRAINING for event in events]
CASES += [(error, part, event, True) for error, part, events in IN_VALIDATION for event in events]


@pytest.mark.parametrize(("error", "part", "event", "in_validation"), CASES)
def test_a_cancel_skips_the_rest_of_its_part_and_nothing_else(
    error: type[Exception], part: str, event: str, in_validation: bool
) -> None:
    events = Events()
    sgd_learner(events, RaisesOnce(error, event, in_validation)).fit(2)
    undisturbed = ["after_create", *events_of(epochs=2, train=3, valid=2)]
    raised_at = undisturbed.index(event, undisturbed.index("before_validate") if in_validation else 0)
    goes_on_at = undisturbed.index(f"after_{part}", raised_at)
    assert events.seen == [*undisturbed[: raised_at + 1], f"after_cancel_{part}", *undisturbed[goes_on_at:]]


@pytest.mark.parametrize(
    ("error", "event", "losses"),
    [
        (CancelTrainException, "before_train", {"valid/loss"}),
        (CancelValidException, "before_validate", {"train/loss"}),
        (CancelEpochException, "before_epoch", set()),
    ],
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_part_cancelled_before_it_began_is_recorded_as_not_there(
    error: type[Exception], event: str, losses: set[str], epoch: int
) -> None:
    """A callback of the usual order cancels before the recorder has heard of that part; nothing stale may stand there."""

    def cancel(learn: Learner) -> None:
        if learn.epoch == epoch:
            raise error

    learn = sgd_learner(doing(event, cancel))
    learn.fit(2)
    assert [values["epoch"] for values in learn.recorder.history] == [0, 1]
    both = {"train/loss", "valid/loss"}
    assert learn.recorder.history[epoch].keys() & both == losses
    assert learn.recorder.history[1 - epoch].keys() & both == both


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (CancelBackwardException, "before_backward"),
        (CancelStepException, "before_step"),
        (CancelBatchException, "after_loss"),
        (CancelTrainException, "before_batch"),
        (CancelEpochException, "before_train"),
    ],
)
def test_the_weights_stay_where_every_step_is_cancelled(error: type[Exception], event: str) -> None:
    def cancel(learn: Learner) -> None:
        if learn.training:
            raise error

    learn = sgd_learner(doing(event, cancel, order=100))
    before = weights(learn)
    learn.fit(2)
    assert torch.equal(weights(learn), before)


@pytest.mark.parametrize(
    ("error", "event"),
    [(CancelBackwardException, "before_backward"), (CancelStepException, "before_step"), (CancelBatchException, "after_pred")],
)
def test_a_cancelled_batch_leaves_no_trace_in_the_next_step(error: type[Exception], event: str) -> None:
    learn = sgd_learner(RaisesOnce(error, event))
    learn.fit(1)
    without = sgd_learner()
    without.dls.train.pop(0)
    without.fit(1)
    assert torch.equal(weights(learn), weights(without))


def test_gradients_accumulate_over_batches_cancelled_after_the_backward_pass() -> None:
    def every_second(learn: Learner) -> None:
        if learn.iter == 0:
            raise CancelBatchException

    learn = sgd_learner(doing("after_backward", every_second), train=(4, 4), valid=())
    model = nn.Linear(3, 2)
    model.load_state_dict(learn.model.state_dict())
    sum(cross_entropy(model(x), y) for x, y in learn.dls.train).backward()
    learn.fit(1)
    expected = torch.cat([(p - 0.5 * p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(learn), expected)


# --- changing what is on its way ---------------------------------------------------------------------------------------


def one_step_by_hand(lr: float = 0.5, loss: Callable[..., Tensor] = lambda model, x, y: cross_entropy(model(x), y)) -> Tensor:
    """The weights after one step of plain SGD on the first batch."""
    model = sgd_learner().model
    ((x, y),) = batches((4,))
    gradients = torch.autograd.grad(loss(model, x, y), list(model.parameters()))
    return torch.cat([(p - lr * g).detach().flatten() for p, g in zip(model.parameters(), gradients, strict=True)])


def set_xb(learn: Learner) -> None:
    learn.xb = (learn.xb[0] * 3,)


def set_yb(learn: Learner) -> None:
    learn.yb = (1 - learn.yb[0],)


def set_pred(learn: Learner) -> None:
    learn.pred = learn.pred * 2


def set_loss_grad(learn: Learner) -> None:
    learn.loss_grad = learn.loss_grad * 0.25


def set_gradients(learn: Learner) -> None:
    for p in learn.model.parameters():
        p.grad.mul_(-1)


def set_lr(learn: Learner) -> None:
    for group in learn.opt.param_groups:
        group["lr"] = 0.01


@pytest.mark.parametrize(
    ("event", "change", "expected"),
    [
        ("before_batch", set_xb, {"loss": lambda model, x, y: cross_entropy(model(3 * x), y)}),
        ("before_batch", set_yb, {"loss": lambda model, x, y: cross_entropy(model(x), 1 - y)}),
        ("after_pred", set_pred, {"loss": lambda model, x, y: cross_entropy(2 * model(x), y)}),
        ("after_loss", set_loss_grad, {"lr": 0.5 * 0.25}),
        ("before_backward", set_loss_grad, {"lr": 0.5 * 0.25}),
        ("after_backward", set_gradients, {"lr": -0.5}),
        ("before_step", set_gradients, {"lr": -0.5}),
        ("before_step", set_lr, {"lr": 0.01}),
    ],
)
def test_what_a_callback_changes_takes_effect(event: str, change: Callable[[Learner], None], expected: dict[str, Any]) -> None:
    learn = sgd_learner(doing(event, change), train=(4,), valid=())
    learn.fit(1)
    torch.testing.assert_close(weights(learn), one_step_by_hand(**expected))
    assert not torch.allclose(weights(learn), one_step_by_hand())


def test_a_changed_loss_is_the_one_recorded() -> None:
    def set_loss(learn: Learner) -> None:
        learn.loss = torch.tensor(7.0)

    learn = sgd_learner(doing("after_loss", set_loss))
    learn.fit(1)
    assert learn.recorder.history[0]["train/loss"] == 7
    assert learn.recorder.history[0]["valid/loss"] == 7


def test_gradients_are_still_there_after_the_step_and_gone_after_the_batch() -> None:
    seen: dict[str, bool] = {}

    def look(event: str) -> Callback:
        return doing(event, lambda learn: seen.update({event: learn.model.weight.grad is not None}))

    sgd_learner(*map(look, ("before_backward", "after_backward", "after_step", "after_batch")), valid=()).fit(1)
    assert seen == {"before_backward": False, "after_backward": True, "after_step": True, "after_batch": False}


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event", "epoch", "batch"), [("after_loss", 1, 2), ("before_step", 0, 1), ("before_batch", 1, 0)])
def test_an_error_arrives_as_itself_with_a_note_of_where(event: str, epoch: int, batch: int) -> None:
    mine = KeyError("mine")

    def fail(learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.iter) == (epoch, batch):
            raise mine

    events = Events()
    learn = sgd_learner(events, doing(event, fail))
    with pytest.raises(KeyError) as raised:
        learn.fit(2)
    assert raised.value is mine
    (note,) = mine.__notes__
    assert note.startswith(f"in Doing.{event}, epoch {epoch}, batch {batch}; {__file__}:")
    assert note.endswith(" in fail")
    assert events.seen[-2:] == [event, "after_fit"]


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "before_train", "after_epoch"])
def test_after_fit_is_called_after_an_error_anywhere(event: str) -> None:
    events = Events()
    with pytest.raises(ZeroDivisionError):
        sgd_learner(events, RaisesOnce(ZeroDivisionError, event)).fit(1)
    assert events.seen[-2:] == [event, "after_fit"]
    assert events.seen.count("after_fit") == 1


def test_after_fit_is_called_after_an_error_of_the_model_and_an_interrupt() -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        events = Events()
        learn = sgd_learner(events)

        def fail(*args: Any, error: type[BaseException] = error) -> None:
            raise error

        learn.model.register_forward_pre_hook(fail)
        with pytest.raises(error):
            learn.fit(1)
        assert events.seen[-2:] == ["before_batch", "after_fit"]


def test_a_cancel_gets_no_note() -> None:
    error = CancelFitException()

    def cancel(learn: Learner) -> None:
        raise error

    sgd_learner(doing("before_batch", cancel)).fit(1)
    assert not hasattr(error, "__notes__")


def test_every_after_fit_is_called_though_one_fails() -> None:
    def fail(error: type[Exception]) -> Callback:
        def action(learn: Learner) -> None:
            raise error

        return doing("after_fit", action)

    seen: list[str] = []
    learn = sgd_learner(fail(KeyError), fail(ValueError), doing("after_fit", lambda learn: seen.append("last")))
    with pytest.raises(KeyError) as raised:
        learn.fit(1)
    assert seen == ["last"]
    assert [n.split(";")[0] for n in raised.value.__notes__] == ["in Doing.after_fit", "then ValueError:  (in Doing.after_fit"]


def test_an_error_in_after_fit_does_not_hide_the_one_before() -> None:
    learn = sgd_learner(RaisesOnce(ZeroDivisionError, "after_loss"), RaisesOnce(KeyError, "after_fit"))
    with pytest.raises(KeyError) as raised:
        learn.fit(1)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


# --- switching callbacks off ---------------------------------------------------------------------------------------------


def test_run_train_and_run_valid_choose_the_batches_a_callback_is_called_in() -> None:
    for in_train, in_valid in ((True, False), (False, True), (False, False)):
        events = Events()
        events.run_train, events.run_valid = in_train, in_valid
        sgd_learner(events, train=(2, 2, 2), valid=(3, 3)).fit(1)
        assert Counter(events.seen)["after_batch"] == 3 * in_train + 2 * in_valid
        assert Counter(events.seen)["before_train"] == 1  # not an event of a batch


def test_a_callback_that_is_switched_off_rests_until_the_fit_is_over() -> None:
    events = Events()
    learn = sgd_learner(events)
    events.seen.clear()
    events.run = False
    learn.fit(1)
    assert not events.seen
    learn.fit(1)
    assert events.seen == events_of(1, 3, 2)


def test_one_that_switches_itself_off_still_hears_of_the_end() -> None:
    class Once(Events):
        def before_train(self, learn: Learner) -> None:
            self.run = False

    once = Once()
    sgd_learner(once).fit(1)
    assert once.seen == ["after_create", "before_fit", "before_epoch", "after_fit"]


def test_what_was_switched_off_is_part_of_the_state() -> None:
    class Once(Callback):
        def __init__(self) -> None:
            self.batches = 0

        def before_batch(self, learn: Learner) -> None:
            self.batches += 1
            self.run = False

        def after_batch(self, learn: Learner) -> None:
            raise AssertionError

    states: list[Any] = []
    learn = sgd_learner(Once(), doing("after_batch", lambda learn: states.append(learn.state_dict()), order=100))
    learn.fit(1)
    fresh = sgd_learner(Once())
    fresh.load_state_dict(states[0])
    fresh.resume()
    assert fresh.once.batches == 0


def test_an_event_without_the_learner_fails_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"def before_batch\(self, learn\), not Fastais.before_batch\(self\)"):

        class Fastais(Callback):
            def before_batch(self) -> None:  # type: ignore[override]
                pass


def test_an_attribute_of_a_callback_that_looks_like_the_learners_gives_a_warning() -> None:
    class Doubles(Callback):
        def after_pred(self, learn: Learner) -> None:
            self.pred = learn.pred * 2

    with pytest.warns(UserWarning, match=r"Doubles has attributes of its own called pred: the Learner's are learn.pred"):
        sgd_learner(Doubles()).fit(1)


def test_a_function_of_the_batch_becomes_a_callback() -> None:
    @before_batch_cb
    def doubled(learn: Learner, xb: Any, yb: Any) -> tuple[Any, Any]:
        return tuple(2 * x for x in xb), yb

    seen: list[bool] = []
    note = doing("after_pred", lambda learn: seen.append(torch.equal(learn.xb[0], 2 * learn.batch[0])))
    learn = sgd_learner(doubled, note)
    learn.fit(1)
    assert seen == [True] * 5
    assert learn.doubled is doubled
