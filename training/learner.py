"""The `Learner`: data, model, loss and optimizer, and the loop that callbacks can change anywhere.

The loop, with its events (`Callback` has them in order; `learn.show_training_loop()` prints who listens):

    fit       for each phase: freeze, then for each epoch
    epoch       train: each batch, validate: each batch without gradients
    batch         predict, loss; in training: backward, step

What a Learner does beside its loop lies in files of its own: finding a rate, results, the state.
"""

import contextlib
import functools
import itertools
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from blocks.draws import sample_keys
from blocks.splits import TRAIN, VALID
from blocks.tensors import TensorBase, as_plain
from training import distributed, lr_find, precision, results, state
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
from training.checks import (
    as_number,
    as_rate,
    check_batch,
    check_differentiable,
    check_groups,
    check_has_reduction,
    check_loss,
    check_parts,
    in_our_words,
    listed,
)
from training.composed import Optimizer
from training.failure import say_where
from training.hypers import set_group_hyper
from training.in_pieces import in_pieces
from training.losses import loss_for
from training.metrics import Metric, MetricFunction, as_metric
from training.optimizer import (
    Adam,
    OptimizerFunction,
    freeze_to,
    keep_norms_still,
    one_group,
    parameter_groups,
)
from training.schedule import MOMS, Moms, Phase, Schedule, flat, flat_cos, sgdr, top_and_spread, total_epochs
from training.schedule import fine_tune as fine_tune_schedule
from training.schedule import one_cycle as one_cycle_schedule
from training.state import Position, generators, set_generators

if TYPE_CHECKING:
    from blocks.dataloaders import DataLoaders
    from training.features import Features
    from training.ranks import Ranks

IN_FLOAT32: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
Splitter = Callable[[nn.Module], Sequence[Sequence[nn.Parameter]]]
Rate = float | slice

IN_BATCH = frozenset(EVENTS[EVENTS.index("before_batch") : EVENTS.index("after_batch") + 1])
OF_A_BATCH = ("xb", "yb", "pred", "loss", "loss_grad")  # what a callback changes as learn.xb, not as self.xb
ALONE = frozenset({"after_create", "after_cancel_fit", "after_fit"})  # not every rank may get there


class Runner(Protocol):
    """Somewhere else a Learner can train: it runs `learn.fit(schedule)` there and brings the result home.

    resume: the name of the run there to go on with.
    """

    def run(self, learn: "Learner", schedule: Schedule, lr: Rate, resume: str | None) -> None: ...


class Learner:
    """Trains `model` on `dls`.

    dls: `DataLoaders`, or any object whose `train` and `valid` are iterables of (input, ..., target) batches.
    loss_func: (pred, *targets) -> scalar mean over rows; inferred from the type of the target when the data has one.
    opt_func: parameter groups -> torch optimizer. splitter: model -> groups of parameters, first to last, for freezing
    and for rates of their own. metrics: functions of (pred, target), or `Metric`s.
    wd: weight decay, None: the optimizer's own; biases and normalisation have none unless `wd_bn_bias`.
    train_bn: normalisation layers of frozen groups train; else they stand still, their running statistics as well. moms: the
    momentum at the start, the middle and the end of a cycle. device: the GPU if there is one.
    """

    # What callbacks read and write while a batch is on its way.
    batch: Sequence[Any]  # as it was drawn
    xb: tuple[Any, ...]
    yb: tuple[Any, ...]
    pred: Any
    loss: Any
    loss_grad: Any
    autocast: contextlib.AbstractContextManager[Any]  # what the model works in

    @in_our_words
    def __init__(
        self,
        dls: "DataLoaders",
        model: nn.Module,
        loss_func: Callable[..., Tensor] | None = None,
        opt_func: OptimizerFunction = Adam,
        lr: Rate = 1e-3,
        splitter: Splitter = one_group,
        callbacks: Callback | Iterable[Callback] = (),
        metrics: MetricFunction | Metric | Iterable[MetricFunction | Metric] = (),
        *,
        wd: float | None = None,
        wd_bn_bias: bool = False,
        train_bn: bool = True,
        moms: Moms = MOMS,
        device: torch.device | None = None,
    ):
        check_parts(dls, model, loss_func, opt_func)
        self.dls, self.model, self.opt_func, self.lr, self.splitter = dls, model, opt_func, lr, splitter
        self.wd, self.wd_bn_bias, self.train_bn, self.moms = wd, wd_bn_bias, train_bn, moms
        self.loss_func = loss_func or loss_for(self.target_type)
        many = metrics if isinstance(metrics, Iterable) else [metrics]
        self.metrics = [as_metric(m) for m in many]
        twice = [name for name, number in Counter(m.name for m in self.metrics).items() if number > 1]
        if twice:
            raise ValueError(
                f"several metrics are called {', '.join(twice)}, but the record has one value a name: give each a name of its "
                "own, as AvgMetric(function, name=...) or dataclasses.replace(metric, name=...)"
            )
        self.device = device or distributed.default_device()
        self._opt: torch.optim.Optimizer | None = None
        self._ranks: Ranks | None = None
        self.sync_bn = True  # on several ranks: see `Ranks`
        self.max_rows: int | None = None  # that go through the model at once: see `in_pieces`
        self._features: Features | None = None  # of the phase, where it caches them
        self.recorder = Recorder()
        self.callbacks: list[Callback] = []
        self._listeners: dict[str, list[Callable[[Learner], None]]] = {}
        self.schedule: Schedule = ()
        self.position = Position()
        self.run_lr = lr
        self.epoch = self.iter = self.start_epoch = 0
        self.stalled = 0.0  # seconds
        self.epochs_trained = 0  # over all fits: each epoch draws an order of its own
        self.epoch_generators: dict[str, Any] | None = None
        self._to_restore: dict[str, Any] | None = None
        self.training = False
        self.stepped = False  # with the batch's gradients
        self.split_idx = VALID  # the part whose transforms the batch gets
        for callback in (BatchTransforms(), self.recorder, ScheduledRates(), Progress(), *listed(callbacks)):
            self.add_callback(callback)

    # --- callbacks -----------------------------------------------------------------------------------------------------

    def add_callback(self, callback: Callback) -> None:
        """Have `callback` called from now on, in its `order`."""
        if not isinstance(callback, Callback):
            call = f": make one, {callback.__name__}()" if isinstance(callback, type) else ""
            raise TypeError(f"a callback is an object of a subclass of Callback, not {callback!r}{call}")
        self.callbacks = sorted([*self.callbacks, callback], key=lambda c: c.order)
        self._listen()
        callback.after_create(self)

    def remove_callback(self, callback: Callback | type[Callback]) -> None:
        """Have `callback`, or all of that class, called no more."""
        gone = [c for c in self.callbacks if c is callback or (isinstance(callback, type) and isinstance(c, callback))]
        self.callbacks = [c for c in self.callbacks if c not in gone]
        self._listen()

    def add_cbs(self, callbacks: Iterable[Callback]) -> None:
        """Have each of `callbacks` called from now on."""
        for callback in callbacks:
            self.add_callback(callback)

    def remove_cbs(self, callbacks: Iterable[Callback | type[Callback]]) -> None:
        """Have none of `callbacks` called any more."""
        for callback in callbacks:
            self.remove_callback(callback)

    def _listen(self) -> None:
        # Found once, so that an event nobody listens to costs one look-up.
        self._listeners = {event: [] for event in EVENTS}
        for callback in self.callbacks:
            for event in _overridden(type(callback)):  # type: ignore[arg-type]
                self._listeners[event].append(getattr(callback, event))

    @contextlib.contextmanager
    def added_callbacks(self, *callbacks: Callback | Iterable[Callback]) -> Iterator[None]:
        """With these callbacks as well."""
        added = [c for given in callbacks for c in listed(given)]
        self.add_cbs(added)
        try:
            yield
        finally:
            self.remove_cbs(added)

    @contextlib.contextmanager
    def removed_callbacks(self, *callbacks: Callback | Iterable[Callback]) -> Iterator[None]:
        """Without these callbacks."""
        before, removed = self.callbacks, [c for given in callbacks for c in listed(given)]
        self.callbacks = [c for c in before if c not in removed]
        self._listen()
        try:
            yield
        finally:
            added = [c for c in self.callbacks if c not in before]
            self.callbacks = sorted([*before, *added], key=lambda c: c.order)
            self._listen()

    @contextlib.contextmanager
    def no_bar(self) -> Iterator[None]:
        """Without a progress bar; the line an epoch is printed all the same."""
        bars = [c for c in self.callbacks if isinstance(c, Progress) and c.bar]
        for progress in bars:
            progress.bar = False
        try:
            yield
        finally:
            for progress in bars:
                progress.bar = True

    def no_logging(self) -> contextlib.AbstractContextManager[None]:
        """Without a printed line an epoch, and without a progress bar."""
        return self.removed_callbacks(*(c for c in self.callbacks if isinstance(c, Progress)))

    # fastai's names. It has a bar of the epochs as well, which is `no_mbar`'s.
    add_cb, remove_cb, added_cbs, removed_cbs, no_mbar = (
        add_callback,
        remove_callback,
        added_callbacks,
        removed_callbacks,
        no_bar,
    )

    if not TYPE_CHECKING:  # a misspelled attribute stays an error for mypy

        def __getattr__(self, name: str) -> Any:
            """The callback of that name: `learn.save_best` is the `SaveBest` it has."""
            own = getattr(type(self), name, None)
            if isinstance(own, property | functools.cached_property):
                # It failed: its own error says more, such as that of a splitter.
                return own.__get__(self)
            found = [c for c in self.__dict__.get("callbacks", ()) if _snake(c.name) == name]
            if not found:
                raise AttributeError(f"this Learner has neither an attribute nor a callback {name!r}")
            return found[0]

    def __call__(self, event: str) -> None:
        """Call `event` of each callback that is switched on, in order."""
        in_batch = event in IN_BATCH
        for method in self._listeners[event]:
            callback: Callback = method.__self__  # type: ignore[attr-defined]
            if not callback.run or (in_batch and not (callback.run_train if self.training else callback.run_valid)):
                continue
            try:
                method(self)
            except CancelException as cancel:
                if self._ranks is None or not self._ranks.takes(cancel, self.training, in_batch):
                    raise
                break
        if self._ranks is not None and not in_batch and event not in ALONE:
            self._ranks.agree()

    def _with_events(
        self,
        body: Callable[[], None],
        event: str,
        cancel: type[CancelException],
        done: Callable[[], None] | None = None,
    ) -> None:
        # Takes the body as a function, because a `with` block cannot skip its body when `before_...` cancels.
        # done: what is true from then on, cancelled or not; noted before `after_...`, where callbacks save the state.
        try:
            self(f"before_{event}")
            body()
        except cancel:
            self(f"after_cancel_{event}")
        if done is not None:
            done()
        self(f"after_{event}")

    # --- training ------------------------------------------------------------------------------------------------------

    @in_our_words
    def fit(
        self,
        schedule: Schedule | int,
        lr: Rate | None = None,
        *,
        wd: float | None = None,
        callbacks: Callback | Iterable[Callback] = (),
        start_epoch: int = 0,
        on: Runner | None = None,
        resume: str | None = None,
    ) -> None:
        """Train by `schedule`, a tuple of `Phase`s or a number of epochs at a flat rate; here, or `on` some workers.

        lr: the rate, or `slice(first, last)` for those of the first and the last parameter group, those between in equal
        ratios; `slice(last)` gives the first a tenth. wd: weight decay from now on. callbacks: for this run only.
        start_epoch: begin the schedule there. resume: the run on those workers to go on with, which was broken off.
        """
        phases = flat(schedule) if isinstance(schedule, int) and not isinstance(schedule, bool) else schedule
        if not isinstance(phases, tuple) or not phases or not all(isinstance(p, Phase) for p in phases):
            raise TypeError(f"a schedule is a number of epochs or a tuple of Phases such as one_cycle(5), not {schedule!r}")
        if not 0 <= start_epoch < total_epochs(phases) or (start_epoch and on is not None):
            raise ValueError(
                f"start_epoch={start_epoch}: a run in this process begins at one of its epochs 0 to {total_epochs(phases) - 1}"
            )
        if resume is not None and on is None:
            raise ValueError(
                f"resume={resume!r} names a run on workers: give on=... as well; here, load a state and learn.resume()"
            )
        self.schedule = phases
        self.run_lr = as_rate(self.lr if lr is None else lr)
        top_and_spread(self.run_lr)  # says now what is wrong with it
        if wd is not None:
            self.set_wd(wd)
        with self.added_callbacks(callbacks):
            if on is not None:
                on.run(self, self.schedule, self.run_lr, resume)
                return
            self.position, self._to_restore, self.start_epoch = Position(), None, start_epoch
            while self.position.epochs_before(phases) < start_epoch:
                self.position = self.position.next_epoch(phases)
            begun = phases[self.position.phase]
            if self.position.epoch and begun.freeze_to is not None:  # else the loop does so where the phase begins
                self.freeze_to(begun.freeze_to, begun.train_bn)
            if self._opt is not None:
                self._opt.zero_grad()
            self._run()

    def resume(self, *, callbacks: Callback | Iterable[Callback] = ()) -> None:
        """Go on with the run that was stopped, or whose state was loaded, from the batch at which it stood.

        With the same data, callbacks and number of ranks, the results are those of the unbroken run, bit for bit on a CPU.
        """
        if not self.schedule:
            raise ValueError("there is no run to go on with: load the state of one first, or call fit")
        with self.added_callbacks(callbacks):
            self._run()

    @in_our_words
    def fit_one_cycle(
        self,
        epochs: int,
        lr_max: Rate | None = None,
        *,
        div: float = 25.0,
        div_final: float = 1e5,
        pct_start: float = 0.25,
        moms: Moms | None = None,
        **fit: Any,
    ) -> None:
        """Train by `one_cycle(epochs, ...)`; `fit`: further arguments of `fit`."""
        schedule = one_cycle_schedule(epochs, div=div, div_final=div_final, pct_start=pct_start, moms=moms or self.moms)
        self.fit(schedule, lr_max, **fit)

    @in_our_words
    def fit_flat_cos(
        self, epochs: int, lr: Rate | None = None, *, div_final: float = 1e5, pct_start: float = 0.75, **fit: Any
    ) -> None:
        """Train by `flat_cos(epochs, ...)`; `fit`: further arguments of `fit`."""
        self.fit(flat_cos(epochs, div_final=div_final, pct_start=pct_start), lr, **fit)

    def fit_sgdr(self, n_cycles: int, cycle_len: int, lr_max: Rate | None = None, *, cycle_mult: int = 2, **fit: Any) -> None:
        """Train by `sgdr(n_cycles, cycle_len, ...)`; `fit`: further arguments of `fit`."""
        self.fit(sgdr(n_cycles, cycle_len, cycle_mult=cycle_mult), lr_max, **fit)

    def fine_tune(
        self,
        epochs: int,
        base_lr: Rate | None = None,
        *,
        freeze_epochs: int = 1,
        lr_mult: float = 100.0,
        pct_start: float = 0.3,
        div: float = 5.0,
        cache_features: bool = False,
        **fit: Any,
    ) -> None:
        """Train the last group alone first, then everything: `fine_tune(epochs, ...)`; `fit`: further arguments of `fit`."""
        schedule = fine_tune_schedule(
            epochs,
            freeze_epochs=freeze_epochs,
            lr_mult=lr_mult,
            pct_start=pct_start,
            div=div,
            moms=self.moms,
            cache_features=cache_features,
        )
        self.fit(schedule, base_lr, **fit)

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer over the splitter's groups, made when it is first needed."""
        if self._opt is None:
            self._opt = self.opt_func(parameter_groups(self.layer_groups, self.model))
            self.set_wd(self.wd)
        return self._opt

    def set_wd(self, wd: float | None) -> None:
        """Weight decay from now on, where the parameters have any; None: what the optimizer has."""
        self.wd = None if wd is None else as_number(wd, "wd")
        if self.wd is not None:
            for group in self.opt.param_groups:
                if self.wd_bn_bias or group.get("decays", True):
                    set_group_hyper(group, "wd", self.wd)

    @property
    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters as the splitter groups them, first to last."""
        return check_groups(self.splitter(self.model), self.model)

    def freeze_to(self, n: int, train_bn: bool | None = None) -> None:
        """Only groups from the `n`-th on train; negative numbers count from the end. train_bn: None: the Learner's."""
        freeze_to(self.layer_groups, self.model, n, self.train_bn if train_bn is None else train_bn)

    def freeze(self) -> None:
        """Only the last group trains."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """All groups train."""
        self.freeze_to(0)

    @functools.cached_property
    def target_type(self) -> type[Tensor]:
        """The type of the data's last column: TensorCategory for class labels, Tensor where nothing is known."""
        return target_type(self.dls)

    @functools.cached_property
    def target_kinds(self) -> tuple[type[Tensor], ...]:
        """The types of a batch's targets."""
        return results.target_kinds(self.dls)

    def _to_device(self) -> None:
        self.model.to(self.device)
        if isinstance(self.loss_func, nn.Module):
            self.loss_func.to(self.device)

    # --- the loop ------------------------------------------------------------------------------------------------------

    @distributed.ends_for_all()
    def _run(self) -> None:
        self.n_epoch = total_epochs(self.schedule)
        self.epoch = self.position.epochs_before(self.schedule)
        self._to_device()
        if distributed.world() > 1:
            from training.ranks import Ranks

            self._ranks = Ranks(self.model, self.sync_bn)
        off = [c for c in self.callbacks if not c.run]
        try:
            self._all_phases()
        except Exception as error:
            say_where(self, error)
            raise
        finally:
            if self._ranks is not None:
                self._ranks.end()
                self._ranks = None
            self._features = None
            self._end_fit(off)

    def _end_fit(self, off: Sequence[Callback]) -> None:
        # Each callback gets to restore what it changed, after another one's error too; the first error is the one raised.
        first: Exception | None = None
        for method in self._listeners["after_fit"]:
            if method.__self__ in off:  # type: ignore[attr-defined]
                continue  # it did not hear of the beginning
            try:
                method(self)
            except Exception as error:  # noqa: BLE001
                say_where(self, error)
                if first is None:
                    first = error
                else:
                    first.add_note(f"then {type(error).__name__}: {error} ({'; '.join(error.__notes__)})")
        for callback in self.callbacks:
            if not callback.run:
                callback.run = True
        if first is not None:
            raise first

    def _all_phases(self) -> None:
        try:
            self("before_fit")
            self._each_phase()
        except CancelFitException:
            self("after_cancel_fit")

    def _each_phase(self) -> None:
        if self.position.opens_epoch:
            self._restore()
        try:
            while self.position.phase < len(self.schedule):
                self.phase, self.epoch_in_phase = self.schedule[self.position.phase], self.position.epoch
                if self.phase.freeze_to is not None and self.epoch_in_phase == 0 and self.position.opens_epoch:
                    self.freeze_to(self.phase.freeze_to, self.phase.train_bn)
                self._with_events(self._one_epoch, "epoch", CancelEpochException, self._epoch_is_done)
                self.epoch += 1
        except BaseException:  # a cancel, an error, Ctrl-C: `resume` can go on from here
            if self._to_restore is None:  # else it has not come to the place where the last one stopped
                state.remember(self)
            raise

    def _restore(self) -> None:
        # After the events before the place where a loaded run goes on: what callbacks set up in them is then as it was.
        state.restore(self)
        self._to_restore = None

    def _epoch_is_done(self) -> None:
        self.position = self.position.next_epoch(self.schedule)
        self.epochs_trained += 1

    def _one_epoch(self) -> None:
        self._features = self._features_of(self.phase)
        if not self.position.trained:
            self._train()
        self._restore()
        self._validate((self._features.dls if self._features else self.dls).valid)

    def _features_of(self, phase: Phase) -> "Features | None":
        if not phase.cache_features:
            return None
        from training.features import features_of  # not with the Learner: it takes a while to import

        return self._features if self._features and self._features.phase is phase else features_of(self, phase)

    @property
    def fed(self) -> "DataLoaders":
        """Where the batches come from: `dls`, or in a phase that caches them the features of its rows."""
        return self._features.dls if self._features and self._features.feed(self.dl) else self.dls

    def _train(self) -> None:
        self.training, self.split_idx, self.dl = True, TRAIN, (self._features.dls if self._features else self.dls).train
        if hasattr(self.dl, "set_epoch"):
            self.dl.set_epoch(self.epochs_trained)
        self.model.train()
        if not (self.train_bn if self.phase.train_bn is None else self.phase.train_bn):
            keep_norms_still(self.model)
        self._with_events(self._all_batches, "train", CancelTrainException, self._train_is_done)
        for callback in self.callbacks:
            own = [name for name in OF_A_BATCH if hasattr(callback, name)]
            if own:
                warnings.warn(
                    f"{callback.name} has attributes of its own called {', '.join(own)}: the Learner's are learn.{own[0]} and "
                    "so on, and do not change with them",
                    stacklevel=2,
                )

    def _train_is_done(self) -> None:
        self.position.trained = True

    def _validate(self, dl: Iterable[Any]) -> None:
        self.training, self.split_idx, self.dl = False, VALID, dl
        self.model.eval()
        distributed.average_buffers(self.model)
        try:
            with torch.no_grad():
                self._with_events(self._all_batches, "validate", CancelValidException)
        except Exception as error:  # of those, too, who validate or predict outside of a fit
            say_where(self, error)
            raise

    def _all_batches(self) -> None:
        start = self.position.batch if self.training else 0
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
        try:
            for self.iter, self.batch in enumerate(self._waited_for(self._from_batch(start)), start):
                drawn += 1
                self._split()
                self._with_events(self._one_batch, "batch", CancelBatchException, self._batch_is_done)
        except CancelException as cancel:
            if self._ranks is None or self.training:
                raise
            self._ranks.vote(cancel)  # nobody waits for this rank before the end of the part
        if self.training and not drawn and not start:
            raise ValueError(
                "the training data gave no batches in this epoch: an iterator can be used once, give a list or a DataLoader"
            )
        if self._ranks is not None:
            self._ranks.agree()

    def _waited_for(self, batches: Iterable[Any]) -> Iterator[Any]:
        # Adds up in `stalled` the seconds that the loop waits for data.
        drawn = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(drawn)
            except StopIteration:
                return
            finally:
                self.stalled += time.perf_counter() - began
            yield batch

    def _from_batch(self, start: int) -> Iterable[Any]:
        if self.training and not hasattr(self.dl, "batches"):
            return self._plain_from_batch(start)
        if start:
            self._restore()
        return self.dl.batches(start=start) if start else self.dl  # type: ignore[attr-defined]

    def _plain_from_batch(self, start: int) -> Iterable[Any]:
        # A torch DataLoader draws its order from the global generator: skipped batches are drawn as they were then.
        if not start:
            self.epoch_generators = generators()
            return self.dl
        self._restore()
        now = generators()
        assert self.epoch_generators is not None
        set_generators(self.epoch_generators)
        rest = iter(self.dl)
        for _ in itertools.islice(rest, start):
            pass
        set_generators(now)
        return rest

    def _batch_is_done(self) -> None:
        if self.training:
            self.position.batch = self.iter + 1

    def _split(self) -> None:
        n_inp = getattr(self.fed, "n_inp", 1)
        check_batch(self.batch, n_inp)
        on_device = [self._move(column) for column in self.batch]
        self.xb, self.yb = tuple(on_device[:n_inp]), tuple(on_device[n_inp:])
        # A rank without rows of its own is given one to stay in step with.
        self.rows = getattr(self.batch, "own_rows", len(self.xb[0]))
        # Plain batches of several ranks are taken to be of one size.
        self.global_rows = getattr(self.batch, "global_rows", self.rows * distributed.world())
        self.pred = self.loss = self.loss_grad = None
        self.autocast = IN_FLOAT32
        self.stepped = False
        self.loss_count: Tensor | float = self.rows
        if self._ranks is not None:
            self._ranks.begin_batch(self.training, borrowed=self.rows == 0)

    @property
    def keys(self) -> Tensor:
        """The key of each row's random draws, int64 (rows,) (`blocks.draws`); plain batches are numbered as they come."""
        keys = getattr(self.batch, "keys", None)
        if keys is None:
            before = (self.iter * distributed.world() + distributed.rank()) << 32
            keys = sample_keys(0, self.epochs_trained, np.arange(len(self.xb[0])) + before)
        return keys.to(self.device)

    def _move(self, column: Any) -> Any:
        return column.to(self.device, non_blocking=True) if isinstance(column, Tensor) else column

    def _one_batch(self) -> None:
        # Plain tensors from here on: dispatch on a subclass costs microseconds for every operation of the model.
        predict = self.model if self._features is None or self.fed is self.dls else self._features.predict
        inputs = [as_plain(x) for x in self.xb]
        with self.autocast:
            self.pred = predict(*inputs) if self.max_rows is None else in_pieces(predict, self.model, inputs, self.max_rows)
        self("after_pred")
        if self.yb:
            self._take_loss(*(as_plain(y) for y in self.yb))
            self("after_loss")
        if self.training and self.yb:
            self._learn_from_batch()

    def _take_loss(self, *targets: Any) -> None:
        self.loss_grad = self.loss_func(self.pred, *targets)
        check_loss(self.loss_grad)
        self.loss = self.loss_grad.detach().clone()
        # What the loss is the mean over: rows, unless it says otherwise (class weights, targets that do not count).
        count = getattr(self.loss_func, "count", None)
        if count is not None and self.rows:
            self.loss_count = count(self.pred, *targets)

    def _learn_from_batch(self) -> None:
        keep = False
        try:
            self._with_events(self._backward, "backward", CancelBackwardException)
            self._with_events(self._step, "step", CancelStepException)
        except CancelBatchException:
            keep = True  # gradients that a callback accumulates
            raise
        finally:
            if not keep:
                self.opt.zero_grad()

    def _backward(self) -> None:
        check_differentiable(self.loss_grad)
        if self._ranks is None:
            self.loss_grad.backward()
        else:
            self._ranks.backward(self.loss_grad, self.loss_count)

    def _step(self) -> None:
        self.opt.step()
        self.stepped = True
        self._batch_is_done()

    # --- results -------------------------------------------------------------------------------------------------------

    @distributed.ends_for_all()
    def validate(self, dl: Iterable[Any] | None = None) -> dict[str, float]:
        """Loss and metrics over the validation part, or `dl`, by name."""
        self._to_device()
        self.recorder.values = {}
        self._validate(self.dls.valid if dl is None else dl)
        return {name: value for name, value in self.recorder.values.items() if name.startswith("valid/")}

    @contextlib.contextmanager
    def validation_context(self, *callbacks: Callback) -> Iterator[None]:
        """With the model where it predicts, in float32, on all rows, these callbacks too, and nothing recorded or printed."""
        if next(self.model.parameters(), torch.empty(0)).device != self.device:  # to move all takes a while, also to nowhere
            self._to_device()
        before, listeners = self.callbacks, self._listeners
        self.callbacks = sorted([*(c for c in before if not c.remove_on_fetch), *callbacks], key=lambda c: c.order)
        self._listen()
        try:
            yield
        finally:
            self.callbacks, self._listeners = before, listeners

    @contextlib.contextmanager
    def loss_not_reduced(self) -> Iterator[None]:
        """With a loss for each target instead of their mean."""
        own: Any = self.loss_func
        reduction = getattr(own, "reduction", None)
        try:
            if reduction is not None:
                own.reduction = "none"
            else:
                check_has_reduction(own)
                self.loss_func = functools.partial(own, reduction="none")
            yield
        finally:
            self.loss_func = own
            if reduction is not None:
                own.reduction = reduction

    def activation(self, pred: Tensor) -> Tensor:
        """The model's output as probabilities or values, as the loss function says."""
        return getattr(self.loss_func, "activation", lambda p: p)(pred)

    def export(self, path: Any, program: bool = False) -> Any:
        """Write the model as data to the folder `path`; see `training.export`."""
        from training.export import export

        return export(self, path, program)

    # --- methods in files of their own -----------------------------------------------------------------------------------

    lr_find = lr_find.lr_find
    get_preds = results.get_preds
    predict = results.predict
    tta = results.tta
    show_results = results.show_results
    summary = results.summary
    show_training_loop = results.show_training_loop
    to_bf16 = precision.to_bf16
    to_fp16 = precision.to_fp16
    to_fp32 = precision.to_fp32
    to_channels_last = to_channelslast = precision.to_channels_last
    compile = precision.compile
    state_dict = state.state_dict
    load_state_dict = state.load_state_dict
    save = state.save
    load = state.load


def target_type(dls: "DataLoaders") -> type[Tensor]:
    """The type of the data's last column: TensorCategory for class labels, Tensor where nothing is known."""
    first = next(iter(dls.train), None)
    if first is None:
        raise ValueError("the training data gives no batches, so the loss cannot be inferred from them")
    last = first[-1]
    return type(last) if isinstance(last, TensorBase) else Tensor


@functools.cache
def _overridden(kind: type[Callback]) -> tuple[str, ...]:
    return tuple(event for event in EVENTS if getattr(kind, event) is not getattr(Callback, event))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
