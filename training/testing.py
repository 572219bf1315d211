"""What every callback keeps to, as functions that test yours too: `check_callback(lambda: MyCallback(), tiny_learner)`.

Each check makes fresh callbacks and fresh Learners; it raises AssertionError when the promise is broken.
"""

import contextlib
import io
import math
import pickle
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from blocks.dataloaders import DataLoaders
from training.callback import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from training.learner import Learner
from training.losses import CrossEntropyLossFlat

MakeCallback = Callable[[], Callback]
MakeLearner = Callable[..., Learner]  # of callbacks


def tiny_learner(*callbacks: Callback) -> Learner:
    """A small classifier of random 3x4x4 pictures with BatchNorm and dropout: two groups of layers, always the same numbers."""
    torch.manual_seed(3)
    batches = [(torch.randn(4, 3, 4, 4), torch.randint(2, (4,))) for _ in range(5)]
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 2)),
    )
    dls = DataLoaders(batches[:-2], batches[-2:])
    return Learner(
        dls,
        model,
        CrossEntropyLossFlat(),
        lr=0.01,
        splitter=lambda m: [list(child.parameters()) for child in m.children()],
        callbacks=callbacks,
        device=torch.device("cpu"),
    )


def check_callback(make: MakeCallback, make_learner: MakeLearner = tiny_learner) -> None:
    """All of the promises below."""
    check_training_goes_on_after_cancel(make, make_learner)
    check_state_round_trip(make, make_learner)
    check_picklable(make, make_learner)
    check_restores_what_it_changed(make, make_learner)
    check_same_result_again(make, make_learner)
    check_goes_on_where_it_stopped(make, make_learner)


CANCELS: dict[type[CancelException], str] = {
    CancelBackwardException: "before_backward",
    CancelStepException: "before_step",
    CancelBatchException: "after_pred",
    CancelTrainException: "after_loss",
    CancelValidException: "before_validate",
    CancelEpochException: "after_train",
    CancelFitException: "after_batch",
}


def check_training_goes_on_after_cancel(make: MakeCallback, make_learner: MakeLearner) -> None:
    """Once a part was cancelled, by someone who comes before the callback or after it, the next one trains as ever."""
    for (cancel, event), order in zip(CANCELS.items(), cycle((-1000, 1000)), strict=False):
        learn = make_learner(make(), _raising(cancel, event, order))
        _fit(learn, 2)
        before = _weights(learn)
        _fit(learn, 1)
        after = _weights(learn)
        assert bool(after.isfinite().all()), f"the weights are not finite after {cancel.__name__} in {event}"
        assert not torch.equal(before, after), f"nothing trains after {cancel.__name__} in {event}"


def check_state_round_trip(make: MakeCallback, make_learner: MakeLearner) -> None:
    """`state_dict` holds plain data only, and a fresh callback that loads it has the same state."""
    callback = make()
    _fit(make_learner(callback), 2)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    fresh = make()
    fresh.load_state_dict(read)
    assert same(fresh.state_dict(), callback.state_dict()), "the state is another one once it was loaded"


def check_picklable(make: MakeCallback, make_learner: MakeLearner) -> None:
    """A callback is shipped to workers, before and after it has trained, and trains there as here."""
    callback = pickle.loads(pickle.dumps(make()))  # noqa: S301  our own
    learn = make_learner(callback)
    _fit(learn, 1)
    here = make_learner(make())
    _fit(here, 1)
    assert torch.equal(_weights(learn), _weights(here)), "pickled, it trains otherwise"
    pickle.dumps(callback)


def check_restores_what_it_changed(make: MakeCallback, make_learner: MakeLearner) -> None:
    """After the fit, after an error in it too, the Learner works in the way it did before."""
    for failing in (None, _raising(ZeroDivisionError, "after_pred", 1000), _raising(ZeroDivisionError, "after_pred", -1000)):
        learn = make_learner(make(), *([] if failing is None else [failing]))
        before = _ways(learn)
        with contextlib.nullcontext() if failing is None else contextlib.suppress(ZeroDivisionError):
            _fit(learn, 1)
        after = _ways(learn)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"the fit left changed: {', '.join(changed)}"


def check_same_result_again(make: MakeCallback, make_learner: MakeLearner) -> None:
    """The same Learner and callback made again train to the same bits."""
    first, second = make_learner(make()), make_learner(make())
    _fit(first, 2)
    _fit(second, 2)
    assert torch.equal(_weights(first), _weights(second)), "trained again from the same start, the weights are others"


def check_goes_on_where_it_stopped(make: MakeCallback, make_learner: MakeLearner) -> None:
    """Stopped in the middle of an epoch, saved, loaded by a fresh Learner and resumed: the same bits as without the stop."""
    keeps = _Keeps()
    unbroken = make_learner(make(), keeps)
    _fit(unbroken, 2)
    learn = make_learner(make(), _Keeps())
    learn.load_state_dict(keeps.state)
    with contextlib.redirect_stdout(io.StringIO()):
        learn.resume()
    assert torch.equal(_weights(learn), _weights(unbroken)), "stopped and resumed, the weights are others"


class _Keeps(Callback):
    # The state of the Learner after the first batch of the second epoch.
    order = 1000

    def __init__(self) -> None:
        self.saved = io.BytesIO()

    def after_batch(self, learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.iter) == (1, 0):
            torch.save(learn.state_dict(), self.saved)

    @property
    def state(self) -> dict[str, Any]:
        self.saved.seek(0)
        return torch.load(self.saved, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal: tensors bit by bit, NaN equal to NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return bool(a == b)


def _raising(error: type[Exception], event: str, order: int) -> Callback:
    # A callback that raises once, in the second batch where the event is one of a batch.
    def method(self: Any, learn: Learner) -> None:
        in_batch = event not in ("before_validate", "after_train")
        if not self.raised and (not in_batch or learn.iter == 1):
            self.raised = True
            raise error

    return type("Raising", (Callback,), {event: method, "order": order, "raised": False})()


def _fit(learn: Learner, epochs: int) -> None:
    torch.manual_seed(5)  # of the dropout
    with contextlib.redirect_stdout(io.StringIO()):
        learn.fit(epochs)


def _weights(learn: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def _ways(learn: Learner) -> dict[str, Any]:
    # How the Learner works, as values that can be compared.
    groups = [{k: v for k, v in g.items() if k not in _SCHEDULED} for g in learn.opt.param_groups]
    return {
        "loss_func": (id(learn.loss_func), getattr(learn.loss_func, "reduction", None)),
        "data": id(learn.dls),
        "model": (id(learn.model), [type(m) for m in learn.model.modules()]),
        "layout": [p.stride() for p in learn.model.parameters()],
        "trainable": [p.requires_grad for p in learn.model.parameters()],
        "dtypes": [p.dtype for p in learn.model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in learn.model.modules()],
        "callbacks": [id(c) for c in learn.callbacks],
        "metrics": [id(m) for m in learn.metrics],
        "hyper-parameters": groups,
        "autocast": torch.is_autocast_enabled("cpu"),
    }


_SCHEDULED = {"params", "lr", "mom", "betas", "momentum", "own_momentum"}  # what the schedule itself leaves set
