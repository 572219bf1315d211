"""The `Learner`: data, model, loss and optimizer, and the loop that callbacks can change anywhere.

The loop, with its events (`Callback` has them in order):

    fit       for each phase: freeze, then for each epoch
    epoch       train: each batch, validate: each batch without gradients
    batch         predict, loss; in training: backward, step
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from blocks.dataloaders import DataLoaders
from blocks.draws import sample_keys
from blocks.feed import Feed
from blocks.tensors import TensorBase, as_plain
from training import distributed
from training.callback import (
    EVENTS,
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
from training.callbacks import BatchTransforms, Progress, Recorder, ScheduledRates
from training.composed import Optimizer
from training.losses import loss_for
from training.metrics import AvgMetric, MetricFunction, as_metric
from training.optimizer import Adam, OptimizerFunction, freeze_to, one_group, parameter_groups
from training.schedule import Phase, Schedule, flat, schedule_to_plain, total_epochs
from training.schedule import fine_tune as fine_tune_schedule
from training.schedule import one_cycle as one_cycle_schedule

Splitter = Callable[[nn.Module], Sequence[Sequence[nn.Parameter]]]


class Runner(Protocol):
    """Somewhere else a Learner can train: it runs `learn.fit(schedule)` there and brings the result home."""

    def run(self, learn: "Learner", schedule: Schedule, lr: float) -> None: ...


class Learner:
    """Trains `model` on `dls`.

    dls: `DataLoaders`, or any object whose `train` and `valid` are iterables of (input, ..., target) batches.
    loss_func: (pred, *targets) -> scalar mean over rows; inferred from the type of the target when the data has one.
    opt_func: parameter groups -> torch optimizer. splitter: model -> groups of parameters, first to last, for freezing
    and for rates of their own. metrics: functions of (pred, target), or `AvgMetric`s. device: the GPU if there is one.
    """

    # What callbacks read and write while a batch is on its way.
    xb: tuple[Any, ...]
    yb: tuple[Any, ...]
    pred: Any
    loss: Any
    loss_grad: Any

    def __init__(
        self,
        dls: DataLoaders,
        model: nn.Module,
        loss_func: Callable[..., Tensor] | None = None,
        opt_func: OptimizerFunction = Adam,
        lr: float = 1e-3,
        splitter: Splitter = one_group,
        callbacks: Iterable[Callback] = (),
        metrics: MetricFunction | AvgMetric | Iterable[MetricFunction | AvgMetric] = (),
        device: torch.device | None = None,
    ):
        self.dls, self.model, self.opt_func, self.lr, self.splitter = dls, model, opt_func, lr, splitter
        self.loss_func = loss_func or loss_for(target_type(dls))
        many = metrics if isinstance(metrics, Iterable) else [metrics]
        self.metrics = [as_metric(m) for m in many]
        self.device = device or distributed.default_device()
        self._opt: torch.optim.Optimizer | None = None
        self.recorder = Recorder()
        self.callbacks: list[Callback] = []
        self._listeners: dict[str, list[Callable[[Learner], None]]] = {}
        self.schedule: Schedule = ()
        self.run_lr = lr
        self.epoch = self.iter = 0
        self.epochs_trained = 0  # over all fits: each epoch draws an order of its own
        self.training = False
        for callback in (BatchTransforms(), self.recorder, ScheduledRates(), Progress(), *callbacks):
            self.add_callback(callback)

    # --- callbacks -----------------------------------------------------------------------------------------------------

    def add_callback(self, callback: Callback) -> None:
        """Have `callback` called from now on, in its `order`."""
        if not isinstance(callback, Callback):
            raise TypeError(f"a callback is an object of a subclass of Callback, not {callback!r}")
        self.callbacks = sorted([*self.callbacks, callback], key=lambda c: c.order)
        self._listen()
        callback.after_create(self)

    def remove_callback(self, callback: Callback) -> None:
        """Have `callback` called no more."""
        self.callbacks = [c for c in self.callbacks if c is not callback]
        self._listen()

    def _listen(self) -> None:
        # Found once, so that an event nobody listens to costs one look-up.
        self._listeners = {
            event: [getattr(c, event) for c in self.callbacks if getattr(type(c), event) is not getattr(Callback, event)]
            for event in EVENTS
        }

    def __call__(self, event: str) -> None:
        """Call `event` of each callback, in order."""
        for method in self._listeners[event]:
            try:
                method(self)
            except CancelException:
                raise
            except Exception as error:
                self._say_where(error, method, event)
                raise

    def _say_where(self, error: Exception, method: Any, event: str) -> None:
        error.add_note(f"in {type(method.__self__).__name__}.{event}, epoch {self.epoch}, batch {self.iter}")

    def _with_events(self, body: Callable[[], None], event: str, cancel: type[CancelException]) -> None:
        # Takes the body as a function, because a `with` block cannot skip its body when `before_...` cancels.
        try:
            self(f"before_{event}")
            body()
        except cancel:
            self(f"after_cancel_{event}")
        self(f"after_{event}")

    # --- training ------------------------------------------------------------------------------------------------------

    def fit(self, schedule: Schedule | int, lr: float | None = None, *, on: Runner | None = None) -> None:
        """Train by `schedule`, a tuple of `Phase`s or a number of epochs at a flat rate; here, or `on` some workers."""
        phases = flat(schedule) if isinstance(schedule, int) else schedule
        if not isinstance(phases, tuple) or not phases or not all(isinstance(p, Phase) for p in phases):
            raise TypeError(f"a schedule is a number of epochs or a tuple of Phases such as one_cycle(5), not {schedule!r}")
        self.schedule = phases
        self.run_lr = self.lr if lr is None else lr
        if on is not None:
            on.run(self, self.schedule, self.run_lr)
            return
        self.n_epoch = total_epochs(self.schedule)
        self.epoch = 0
        self._to_device()
        try:
            self("before_fit")
            self._all_phases()
        except CancelFitException:
            self("after_cancel_fit")
        finally:
            self._forward = self.model
            distributed.alone_again(self.model)
            self._end_fit()

    def _end_fit(self) -> None:
        # Each callback gets to restore what it changed, after another one's error too; the first error is the one raised.
        first: Exception | None = None
        for method in self._listeners["after_fit"]:
            try:
                method(self)
            except Exception as error:  # noqa: BLE001
                self._say_where(error, method, "after_fit")
                if first is None:
                    first = error
                else:
                    first.add_note(f"then {type(error).__name__}: {error} ({'; '.join(error.__notes__)})")
        if first is not None:
            raise first

    def fit_one_cycle(self, epochs: int, lr_max: float | None = None, *, on: Runner | None = None) -> None:
        """Train by `one_cycle(epochs)`."""
        self.fit(one_cycle_schedule(epochs), lr_max, on=on)

    def fine_tune(self, epochs: int, base_lr: float | None = None, *, freeze_epochs: int = 1, on: Runner | None = None) -> None:
        """Train the last group alone first, then everything: `fine_tune(epochs)`."""
        self.fit(fine_tune_schedule(epochs, freeze_epochs=freeze_epochs), base_lr, on=on)

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer over the splitter's groups, made when it is first needed."""
        if self._opt is None:
            self._opt = self.opt_func(parameter_groups(self.layer_groups, self.model))
        return self._opt

    @property
    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters as the splitter groups them, first to last."""
        return [list(group) for group in self.splitter(self.model)]

    def freeze_to(self, n: int, train_bn: bool = True) -> None:
        """Only groups from the `n`-th on train; negative numbers count from the end."""
        freeze_to(self.layer_groups, self.model, n, train_bn)

    def freeze(self) -> None:
        """Only the last group trains."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """All groups train."""
        self.freeze_to(0)

    def _to_device(self) -> None:
        self.model.to(self.device)
        if isinstance(self.loss_func, nn.Module):
            self.loss_func.to(self.device)
        self._forward = self.model

    def _all_phases(self) -> None:
        for self.phase in self.schedule:
            if self.phase.freeze_to is not None:
                self.freeze_to(self.phase.freeze_to, self.phase.train_bn)
            self._forward = distributed.averaging(self.model)
            for self.epoch_in_phase in range(self.phase.epochs):
                self._with_events(self._one_epoch, "epoch", CancelEpochException)
                self.epoch += 1
                self.epochs_trained += 1

    def _one_epoch(self) -> None:
        self.training, self.dl = True, self.dls.train
        if isinstance(self.dl, Feed):
            self.dl.set_epoch(self.epochs_trained)
        self.model.train()
        self._with_events(self._all_batches, "train", CancelTrainException)
        self._validate()

    def _validate(self) -> None:
        self.training, self.dl = False, self.dls.valid
        self.model.eval()
        distributed.average_buffers(self.model)
        with torch.no_grad():
            self._with_events(self._all_batches, "validate", CancelValidException)

    def _all_batches(self) -> None:
        try:
            self.n_iter = len(self.dl)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                f"the data has no length ({type(self.dl).__name__}): an iterator can be used once, give a list or a DataLoader"
            ) from None
        if self.training and isinstance(self.opt, Optimizer):
            said = self.opt.choose_kernel(self.n_iter * self.n_epoch)
            if said and distributed.rank() == 0:
                print(said, flush=True)
        drawn = 0
        for self.iter, batch in enumerate(self.dl):
            drawn += 1
            self._split(batch)
            self._with_events(self._one_batch, "batch", CancelBatchException)
        if self.training and not drawn:
            raise ValueError(
                "the training data gave no batches in this epoch: an iterator can be used once, give a list or a DataLoader"
            )

    def _split(self, batch: Sequence[Any]) -> None:
        n_inp = getattr(self.dls, "n_inp", 1)
        on_device = [self._move(column) for column in batch]
        self.xb, self.yb = tuple(on_device[:n_inp]), tuple(on_device[n_inp:])
        self.rows = len(self.xb[0])
        # Plain batches of several ranks are taken to be of one size.
        self.global_rows = getattr(batch, "global_rows", self.rows * distributed.world())
        self._keys = getattr(batch, "keys", None)
        self.pred = self.loss = self.loss_grad = None

    @property
    def keys(self) -> Tensor:
        """The key of each row's random draws, int64 (rows,) (`blocks.draws`); plain batches are numbered as they come."""
        if self._keys is None:
            before = (self.iter * distributed.world() + distributed.rank()) << 32
            self._keys = sample_keys(0, self.epochs_trained, np.arange(self.rows) + before)
        return self._keys.to(self.device)

    def _move(self, column: Any) -> Any:
        return column.to(self.device, non_blocking=True) if isinstance(column, Tensor) else column

    def _one_batch(self) -> None:
        forward = self._forward if self.training else self.model
        # Plain tensors from here on: dispatch on a subclass costs microseconds for every operation of the model.
        self.pred = forward(*(as_plain(x) for x in self.xb))
        self("after_pred")
        if self.yb:
            self.loss_grad = self.loss_func(self.pred, *(as_plain(y) for y in self.yb))
            self.loss = self.loss_grad.detach().clone()
            self("after_loss")
        if self.training and self.yb:
            self._with_events(self._backward, "backward", CancelBackwardException)
            self._with_events(self._step, "step", CancelStepException)
            self.opt.zero_grad()

    def _backward(self) -> None:
        # Gradients are averaged over ranks; this makes that the mean over the rows of the global batch.
        weight = self.rows * distributed.world() / self.global_rows
        (self.loss_grad if weight == 1 else self.loss_grad * weight).backward()

    def _step(self) -> None:
        self.opt.step()

    # --- results -------------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Loss and metrics over the validation part, by name."""
        self._to_device()
        self.recorder.values = {}
        self._validate()
        return {name: value for name, value in self.recorder.values.items() if name.startswith("valid/")}

    def get_preds(self, batches: Iterable[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Activations (probabilities, for a classifier) and targets of the validation part, or of `batches`, on the CPU."""
        self._to_device()
        self.training = False
        self.model.eval()
        preds, targets = [], []
        with torch.no_grad():
            for batch in self.dls.valid if batches is None else batches:
                self._split(batch)
                for callback in self.callbacks:
                    if isinstance(callback, BatchTransforms):
                        callback.before_batch(self)
                pred = self.model(*(as_plain(x) for x in self.xb))
                preds.append(self.activation(pred).cpu())
                targets += [as_plain(y).cpu() for y in self.yb]
        return torch.cat(preds), torch.cat(targets) if targets else torch.empty(0)

    def activation(self, pred: Tensor) -> Tensor:
        """The model's output as probabilities or values, as the loss function says."""
        return getattr(self.loss_func, "activation", lambda p: p)(pred)

    def show_results(self, n: int = 16) -> Any:
        """A matplotlib figure of validation samples, titled target / prediction."""
        from blocks.show import show_samples

        batch = next(iter(self.dls.valid))
        probabilities, _ = self.get_preds([batch])
        decoded = self.dls.decode_batch(self.dls.one_batch())[:n]
        best = probabilities.argmax(dim=1)
        names = self.dls.vocab
        titles = [f"{sample[-1]} / {names[int(b)] if names else int(b)}" for sample, b in zip(decoded, best, strict=False)]
        return show_samples(decoded, titles)

    def export(self, path: Any) -> Any:
        """Write the model as data to the folder `path`; see `training.export`."""
        from training.export import export

        return export(self, path)

    # --- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule, position and callbacks: tensors, numbers, strings, lists and dicts only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": None if self._opt is None else self._opt.state_dict(),
            "schedule": schedule_to_plain(self.schedule),
            "position": {"epoch": self.epoch, "epochs_trained": self.epochs_trained, "lr": self.run_lr},
            "trains": [name for name, p in self.model.named_parameters() if p.requires_grad],
            "callbacks": {key: c.state_dict() for key, c in self._keyed_callbacks()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, of a Learner with the same model and callbacks."""
        from training.schedule import schedule_from_plain

        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self._to_device()
            self.opt.load_state_dict(state["optimizer"])
        self.schedule = schedule_from_plain(state["schedule"])
        position = state["position"]
        self.epoch, self.epochs_trained, self.run_lr = position["epoch"], position["epochs_trained"], position["lr"]
        trains = set(state["trains"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trains)
        for key, callback in self._keyed_callbacks():
            if key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][key])

    def _keyed_callbacks(self) -> Iterator[tuple[str, Callback]]:
        # By name; the second of a class by name and number.
        seen: Counter[str] = Counter()
        for callback in self.callbacks:
            seen[callback.name] += 1
            yield callback.name + (f" {seen[callback.name]}" if seen[callback.name] > 1 else ""), callback


def target_type(dls: DataLoaders) -> type[Tensor]:
    """The type of the data's last column: TensorCategory for class labels, Tensor where nothing is known."""
    first = next(iter(dls.train), None)
    if first is None:
        raise ValueError("the training data gives no batches, so the loss cannot be inferred from them")
    last = first[-1]
    return type(last) if isinstance(last, TensorBase) else Tensor
