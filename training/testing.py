"""What every callback and every optimizer keeps to, as functions that test yours too.

`check_callback(MyCallback, tiny_learner)`, `check_optimizer(MyOptimizer)`: each check makes fresh ones, and fresh Learners; it
raises AssertionError when the promise is broken.
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
from training.schedule import Schedule, fine_tune

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
    """Saved after any training batch or epoch, loaded by a fresh Learner and resumed: the same bits as without the stop.

    In a frozen phase and in the one after it; weights, optimizer, callbacks, and a record that has each step and epoch once.
    """
    keeps = _Keeps()
    unbroken = make_learner(make(), keeps)
    _fit(unbroken, fine_tune(1))
    for place, state in keeps.states.items():
        learn = make_learner(make(), _Keeps())
        learn.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        with contextlib.redirect_stdout(io.StringIO()):
            learn.resume()
        found, expected = _end(learn), _end(unbroken)
        others = [name for name in expected if not same(found[name], expected[name])]
        assert not others, f"stopped {place} and resumed, there are others: {', '.join(others)}"


class _Keeps(Callback):
    # The state of the Learner after each training batch and each epoch.
    order = 1000

    def __init__(self) -> None:
        self.states: dict[str, bytes] = {}

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self._keep(learn, f"after batch {learn.iter} of epoch {learn.epoch}")

    def after_epoch(self, learn: Learner) -> None:
        self._keep(learn, f"after epoch {learn.epoch}")

    def _keep(self, learn: Learner, place: str) -> None:
        file = io.BytesIO()
        torch.save(learn.state_dict(), file)
        self.states[place] = file.getvalue()


def _end(learn: Learner) -> dict[str, Any]:
    # All that a run leaves, but the times.
    state = {
        name: part for name, part in learn.state_dict().items() if name not in ("callbacks", "generators", "epoch_generators")
    }
    return state | {f"{name}'s state": _timeless(part) for name, part in learn.state_dict()["callbacks"].items()}


def _timeless(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _timeless(part) for name, part in state.items() if not str(name).startswith("time/")}
    return list(map(_timeless, state)) if isinstance(state, list) else state


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


def _fit(learn: Learner, schedule: Schedule | int) -> None:
    torch.manual_seed(5)  # of the dropout
    with contextlib.redirect_stdout(io.StringIO()):
        learn.fit(schedule)


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


# --- optimizers ----------------------------------------------------------------------------------------------------------

MakeOptimizer = Callable[..., torch.optim.Optimizer]  # of parameters or groups of them, and lr


def check_optimizer(make: MakeOptimizer) -> None:
    """All of the promises below: whatever torch's tools for optimizers ask of one."""
    check_it_goes_downhill(make)
    check_groups_and_schedulers(make)
    check_frozen_parameters_are_untouched(make)
    check_optimizer_state_round_trip(make)
    check_grad_scaler(make)


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,), (1,))]


def _give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def check_it_goes_downhill(make: MakeOptimizer) -> None:
    """Steps with a closure return its loss and make it smaller."""
    parameters = _parameters()
    optimizer = make(parameters, lr=1e-2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = sum((p - 1).square().sum() for p in parameters)
        assert isinstance(total, Tensor)
        total.backward()
        return total

    losses = [optimizer.step(loss).item() for _ in range(30)]  # type: ignore[attr-defined, arg-type]
    assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"


def check_groups_and_schedulers(make: MakeOptimizer) -> None:
    """Each group, added later too, has a rate of its own, which torch's schedulers change; at the rate 0 nothing moves."""
    parameters = _parameters()
    start = [p.detach().clone() for p in parameters]
    optimizer = make([{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:2]}], lr=0.1)
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.2})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    _give_gradients(parameters, 0)
    optimizer.step()
    assert [torch.equal(p, s) for p, s in zip(parameters, start, strict=True)] == [True, False, False]
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.05, 0.1]


def check_frozen_parameters_are_untouched(make: MakeOptimizer) -> None:
    """A parameter without gradient keeps its value and gets no state; unfrozen, it steps as a new one."""
    parameters, fresh = _parameters(), _parameters()
    optimizer, other = make(parameters, lr=0.1), make(fresh, lr=0.1)
    frozen = parameters[0].detach().clone()
    for step in range(3):
        _give_gradients(parameters, step)
        parameters[0].requires_grad_(False)
        parameters[0].grad = parameters[1].grad = None
        optimizer.step()
    assert torch.equal(parameters[0], frozen), "a parameter that needs no gradient has moved"
    assert torch.equal(parameters[1], fresh[1]), "a parameter without gradient has moved"
    assert not optimizer.state.get(parameters[0])
    parameters[0].requires_grad_(True)
    for ps, o in ((parameters, optimizer), (fresh, other)):
        _give_gradients(ps, 9)
        o.step()
    assert torch.equal(parameters[0], fresh[0]), "an unfrozen parameter does not begin where a new one does"


def check_optimizer_state_round_trip(make: MakeOptimizer) -> None:
    """What `torch.load(weights_only=True)` reads of the state goes on with the same bits."""
    parameters = _parameters()
    optimizer = make(parameters, lr=0.1)
    for step in range(7):
        _give_gradients(parameters, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = make(copies, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(7, 14):
        for ps, o in ((parameters, optimizer), (copies, other)):
            _give_gradients(ps, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, copies, strict=True)), "the restored optimizer steps otherwise"


def check_grad_scaler(make: MakeOptimizer) -> None:
    """Torch's GradScaler steps with unscaled gradients, and not at all where they are not finite."""
    parameters, plain = _parameters(), _parameters()
    optimizer, other = make(parameters, lr=0.1), make(plain, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((1.0, math.inf, 1.0)):
        for ps, o in ((parameters, optimizer), (plain, other)):
            o.zero_grad()
            _give_gradients(ps, step)
        if factor == 1.0:
            other.step()
        scale = scaler.scale(torch.tensor(1.0)).item()  # it halves after a step that was not finite
        for p in parameters:
            assert p.grad is not None
            p.grad *= scale * factor
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(parameters, plain, strict=True))
