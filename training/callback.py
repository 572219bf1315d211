"""`Callback`: the events of the training loop, each declared once, here, as a documented method.

The order of the methods is the order of the events; the loop, the documentation and the tests read the list from here.
A callback receives the `Learner` and may read and change anything of it; raising one of the cancel exceptions changes
the flow:

    CancelBackwardException   skip the rest of the backward pass
    CancelStepException       skip the optimizer's step
    CancelBatchException      skip the rest of the batch
    CancelTrainException      skip the rest of the epoch's training part
    CancelValidException      skip the rest of the validation part
    CancelEpochException      skip the rest of the epoch
    CancelFitException        end the training
"""

import difflib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.learner import Learner


class CancelException(Exception):
    """What the cancel exceptions have in common."""


class CancelBackwardException(CancelException):
    """Skip the rest of the backward pass."""


class CancelStepException(CancelException):
    """Skip the optimizer's step."""


class CancelBatchException(CancelException):
    """Skip the rest of the batch."""


class CancelTrainException(CancelException):
    """Skip the rest of the epoch's training part."""


class CancelValidException(CancelException):
    """Skip the rest of the validation part."""


class CancelEpochException(CancelException):
    """Skip the rest of the epoch."""


class CancelFitException(CancelException):
    """End the training."""


class Callback:
    """Override the events you need; those you do not override cost nothing. Lower `order` is called first.

    run: switched off, at any time, it is called no more until the end of the fit, which switches it on again. run_train,
    run_valid: whether it is called in training batches and in the others. remove_on_fetch: `get_preds` and others that only
    predict do so without it. needs_inputs: whether it looks at `learn.xb` or changes it, None: if it has a `before_batch`; in
    a phase with `cache_features` there are no inputs, so a callback that needs them is refused.
    """

    order: int = 0
    run: bool = True
    run_train: bool = True
    run_valid: bool = True
    remove_on_fetch: bool = False
    needs_inputs: bool | None = None

    def after_create(self, learn: "Learner") -> None:
        """The Learner has been made, or the callback added to it."""

    def before_fit(self, learn: "Learner") -> None:
        """Training begins: model, optimizer and data are ready."""

    def before_epoch(self, learn: "Learner") -> None:
        """An epoch begins."""

    def before_train(self, learn: "Learner") -> None:
        """The training part of an epoch begins; `learn.dl` are its batches."""

    def before_batch(self, learn: "Learner") -> None:
        """A batch was drawn: `learn.xb` and `learn.yb` are its inputs and targets, on the device."""

    def after_pred(self, learn: "Learner") -> None:
        """The model has computed `learn.pred`."""

    def after_loss(self, learn: "Learner") -> None:
        """`learn.loss` is the loss to report, `learn.loss_grad` the one to differentiate."""

    def before_backward(self, learn: "Learner") -> None:
        """The loss is about to be differentiated (training only, as all up to `after_step`)."""

    def after_cancel_backward(self, learn: "Learner") -> None:
        """The backward pass was cancelled."""

    def after_backward(self, learn: "Learner") -> None:
        """The gradients are there."""

    def before_step(self, learn: "Learner") -> None:
        """The optimizer is about to step."""

    def after_cancel_step(self, learn: "Learner") -> None:
        """The optimizer's step was cancelled."""

    def after_step(self, learn: "Learner") -> None:
        """The parameters have changed; the gradients are still there."""

    def after_cancel_batch(self, learn: "Learner") -> None:
        """The batch was cancelled."""

    def after_batch(self, learn: "Learner") -> None:
        """The batch is done."""

    def after_cancel_train(self, learn: "Learner") -> None:
        """The training part was cancelled."""

    def after_train(self, learn: "Learner") -> None:
        """The training part of the epoch is done."""

    def before_validate(self, learn: "Learner") -> None:
        """The validation part begins."""

    def after_cancel_validate(self, learn: "Learner") -> None:
        """The validation part was cancelled."""

    def after_validate(self, learn: "Learner") -> None:
        """The validation part is done."""

    def after_cancel_epoch(self, learn: "Learner") -> None:
        """The epoch was cancelled."""

    def after_epoch(self, learn: "Learner") -> None:
        """The epoch is done."""

    def after_cancel_fit(self, learn: "Learner") -> None:
        """The training was cancelled."""

    def after_fit(self, learn: "Learner") -> None:
        """Training is over. Called after an error too, so that a callback can restore what it changed."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep across a restart: tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """This rank's state in a run that goes on with another number of ranks, of the states of those that there were.

        The first one's, where a callback's state is the same on all ranks.
        """
        return states[0]

    @property
    def name(self) -> str:
        """The class name: what a checkpoint files the state under."""
        return type(self).__name__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute, value in vars(cls).items():
            if attribute in EVENTS:
                _check_signature(cls.__name__, attribute, value)
            elif callable(value) and not attribute.startswith("_") and attribute not in vars(Callback):
                _check_spelling(cls.__name__, attribute)


EVENTS: tuple[str, ...] = tuple(n for n in vars(Callback) if n.startswith(("before_", "after_")))


def _check_signature(cls: str, event: str, method: Callable[..., Any]) -> None:
    try:
        inspect.signature(method).bind("self", "learn")
    except TypeError:
        raise TypeError(
            f"an event is given the Learner: def {event}(self, learn), not {cls}.{event}{inspect.signature(method)}"
        ) from None


def _check_spelling(cls: str, method: str) -> None:
    prefixed = method.startswith(("before_", "after_"))
    near = difflib.get_close_matches(method, EVENTS, n=1, cutoff=0.6 if prefixed else 0.85)
    if prefixed or near:
        hint = f"did you mean {near[0]!r}?" if near else f"the events are {', '.join(EVENTS)}"
        raise TypeError(f"{cls}.{method} is not an event of the training loop: {hint}")


def before_batch_cb(function: "Callable[[Learner, Any, Any], tuple[Any, Any]]") -> Callback:
    """A callback that makes each batch's `xb, yb = function(learn, xb, yb)`, as a decorator; fastai's, with ours as `self`."""

    def before_batch(self: Callback, learn: "Learner") -> None:
        learn.xb, learn.yb = function(learn, learn.xb, learn.yb)

    name = getattr(function, "__name__", "BeforeBatch")
    return type(name, (Callback,), {"before_batch": before_batch, "__doc__": function.__doc__})()
