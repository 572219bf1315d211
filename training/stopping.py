"""Callbacks that watch a recorded value after each epoch: keep the best model, stop early, lower the rate; stop at NaN.

All ranks see the same reduced values, so they decide alike.
"""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training import distributed
from training.callback import Callback, CancelFitException, CancelTrainException, CancelValidException
from training.optimizer import own_momentum_again
from training.schedule import scaled, top_and_spread

if TYPE_CHECKING:
    from training.learner import Learner


class ValueWatcher(Callback):
    """Knows after each epoch whether `monitor` is better than ever before; fastai's TrackerCallback.

    monitor: a name in `learn.recorder.history`, such as "valid/loss" or "valid/accuracy", or what a callback puts into
    `learn.recorder.values` in `after_validate` at the latest. higher_is_better: what better means (fastai's comp); None: as
    the metric says. min_delta: a smaller gain does not count.
    A new fit starts afresh, unless reset_on_fit is False. ValueError for a monitor that nothing records.
    """

    order = 75

    def __init__(
        self,
        monitor: str = "valid/loss",
        higher_is_better: bool | None = None,
        min_delta: float = 0.0,
        reset_on_fit: bool = True,
    ):
        if min_delta < 0:
            raise ValueError(f"min_delta is the least gain that counts, 0 or more, not {min_delta!r}")
        self.monitor, self.higher_is_better, self.min_delta, self.reset_on_fit = (
            monitor,
            higher_is_better,
            min_delta,
            reset_on_fit,
        )
        self.best: float | None = None
        self.waited = 0  # epochs since the best one

    def before_fit(self, learn: "Learner") -> None:
        self._sign = 1.0 if _higher_is_better(learn, self.monitor, self.higher_is_better) else -1.0
        if self.reset_on_fit and learn.epoch == learn.start_epoch:  # not in a fit that goes on after a restart
            self.reset()

    def reset(self) -> None:
        """Forget the best value."""
        self.best, self.waited = None, 0

    def improved(self, learn: "Learner") -> bool | None:
        """Whether this epoch's value is the best so far, which is then remembered; None when it was not recorded."""
        values = learn.recorder.values
        value = values.get(self.monitor)
        if value is None and "valid/loss" in values and self.monitor not in _directions(learn):
            raise ValueError(f"nothing recorded {self.monitor!r} in epoch {learn.epoch}, only {', '.join(values)}")
        if value is None:
            warnings.warn(
                f"{self.name} watches {self.monitor}, which epoch {learn.epoch} did not record: cancelled or empty",
                stacklevel=2,
            )
            return None
        first = self.best is None or (math.isnan(self.best) and not math.isnan(value))
        gain = math.inf if self.best is None or first else self._sign * (value - self.best) - self.min_delta
        if gain > 0:  # false for NaN
            self.best, self.waited = value, 0
            return True
        self.waited += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def _directions(learn: "Learner") -> dict[str, bool]:
    # What the Learner itself records, and whether higher is better.
    return {"train/loss": False, "valid/loss": False} | {f"valid/{m.name}": m.higher_is_better for m in learn.metrics}


def _higher_is_better(learn: "Learner", monitor: str, given: bool | None) -> bool:
    if given is not None:
        return given
    known = _directions(learn)
    if monitor not in known:
        raise ValueError(
            f"nothing records {monitor!r}: monitor one of {', '.join(known)}, or, where a callback of yours records it, say "
            "higher_is_better=True or False"
        )
    return known[monitor]


class SaveBest(ValueWatcher):
    """Ends the training with the weights of its best epoch, a cancelled one too; fastai's SaveModelCallback.

    After an error the weights stay what they are, so that the run can be resumed.
    The best weights are kept in memory, so this works on any worker, and they are part of the callback's state.
    path: a file that they are written to as well, by rank 0, as `torch.save({"model": ..., "optimizer": ...})`.
    every_epoch: write each epoch's (or each n-th epoch's) weights to path with the epoch's number before the ending instead.
    at_end: write the last weights to path when the training ends, and go back to no others. with_opt: keep the optimizer's
    state as well.
    """

    def __init__(
        self,
        monitor: str = "valid/loss",
        higher_is_better: bool | None = None,
        min_delta: float = 0.0,
        path: str | Path | None = None,
        every_epoch: int = 0,
        at_end: bool = False,
        with_opt: bool = False,
        reset_on_fit: bool = True,
    ):
        super().__init__(monitor, higher_is_better, min_delta, reset_on_fit)
        if every_epoch and at_end:
            raise ValueError("every_epoch and at_end exclude each other: the last epoch is one of every epoch")
        if (every_epoch or at_end) and path is None:
            raise ValueError("every_epoch and at_end write files: give path=...")
        self.path = None if path is None else Path(path)
        self.every_epoch, self.at_end, self.with_opt = int(every_epoch), at_end, with_opt
        self.kept: dict[str, Any] | None = None
        self._ended = False

    def reset(self) -> None:
        super().reset()
        self.kept = None

    def before_fit(self, learn: "Learner") -> None:
        self._ended = learn.epoch == learn.n_epoch  # of a run that goes on after its last epoch
        if not self.every_epoch and not self.at_end:
            super().before_fit(learn)

    def after_epoch(self, learn: "Learner") -> None:
        self._ended = learn.epoch + 1 == learn.n_epoch
        if self.every_epoch:
            if learn.epoch % self.every_epoch == 0:
                assert self.path is not None
                self._write(self.path.with_stem(f"{self.path.stem}_{learn.epoch}"), self._state_of(learn))
        elif not self.at_end and self.improved(learn):
            self.kept = self._state_of(learn)
            if self.path is not None:
                self._write(self.path, self.kept)

    def after_cancel_fit(self, learn: "Learner") -> None:
        self._ended = True

    def after_fit(self, learn: "Learner") -> None:
        if not self._ended:
            return
        if self.at_end:
            assert self.path is not None
            self._write(self.path, self._state_of(learn))
        elif self.kept is not None:
            learn.model.load_state_dict(self.kept["model"])
            if "optimizer" in self.kept:
                learn.opt.load_state_dict(self.kept["optimizer"])
                own_momentum_again(learn.opt)

    def _state_of(self, learn: "Learner") -> dict[str, Any]:
        state = {"model": _copied(learn.model.state_dict())}
        return state | {"optimizer": _copied(learn.opt.state_dict())} if self.with_opt else state

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            torch.save(state, unfinished)
            unfinished.replace(path)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = state["kept"]


def _copied(state: Any) -> Any:
    # To the CPU: a second model on the GPU may not fit.
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


class EarlyStopping(ValueWatcher):
    """Ends the training when `patience` epochs in a row brought nothing better; fastai's EarlyStoppingCallback.

    It ends it where the next epoch would begin, so that the last one is recorded, printed and kept like any other.
    """

    order = -100  # before anybody prepares for an epoch that will not be

    def __init__(
        self,
        monitor: str = "valid/loss",
        higher_is_better: bool | None = None,
        min_delta: float = 0.0,
        patience: int = 1,
        reset_on_fit: bool = True,
    ):
        super().__init__(monitor, higher_is_better, min_delta, reset_on_fit)
        self.patience = _at_least_one(patience)

    def after_epoch(self, learn: "Learner") -> None:
        self.improved(learn)

    def before_epoch(self, learn: "Learner") -> None:
        if self.waited >= self.patience:
            if distributed.rank() == 0:
                print(f"stopped early: {self.monitor} was best, {self.best:.4f}, {self.waited} epochs ago", flush=True)
            raise CancelFitException


class ReduceLROnPlateau(ValueWatcher):
    """Divides the run's rate by `factor`, down to `min_lr`, each time `patience` epochs in a row brought nothing better."""

    def __init__(
        self,
        monitor: str = "valid/loss",
        higher_is_better: bool | None = None,
        min_delta: float = 0.0,
        patience: int = 1,
        factor: float = 10.0,
        min_lr: float = 0.0,
        reset_on_fit: bool = True,
    ):
        super().__init__(monitor, higher_is_better, min_delta, reset_on_fit)
        if factor <= 1:
            raise ValueError(f"the rate is divided by factor, which is above 1, not {factor!r}")
        self.patience, self.factor, self.min_lr = _at_least_one(patience), factor, min_lr

    def after_epoch(self, learn: "Learner") -> None:
        if self.improved(learn) is False and self.waited >= self.patience:
            self.waited = 0
            # The schedule is made of multiples of the run's rate, so this lowers all that is left of it.
            rate, _ = top_and_spread(learn.run_lr)
            if rate:
                learn.run_lr = scaled(learn.run_lr, max(rate / self.factor, min(self.min_lr, rate)) / rate)


def _at_least_one(patience: int) -> int:
    if patience < 1:
        raise ValueError(f"patience is a number of epochs, at least 1, not {patience!r}")
    return patience


class TerminateOnNaN(Callback):
    """Ends the training when a training loss is not finite; fastai's TerminateOnNaNCallback. It reads each batch's loss."""

    order = -9

    def after_loss(self, learn: "Learner") -> None:
        if learn.training and not math.isfinite(learn.loss):
            print(f"stopped: the loss of epoch {learn.epoch}, batch {learn.iter} is {float(learn.loss)}", flush=True)
            raise CancelFitException


class ShortEpoch(Callback):
    """Ends each part of an epoch after the share `pct` of its batches, to try things out; fastai's ShortEpochCallback."""

    remove_on_fetch = True

    def __init__(self, pct: float = 0.01, short_valid: bool = True):
        if not 0 < pct <= 1:
            raise ValueError(f"pct is a share above 0 and at most 1, not {pct!r}")
        self.pct, self.short_valid = pct, short_valid

    def after_batch(self, learn: "Learner") -> None:
        if learn.iter + 1 < self.pct * learn.n_iter:
            return
        if learn.training:
            raise CancelTrainException
        if self.short_valid:
            raise CancelValidException


# fastai's names
TrackerCallback = ValueWatcher
SaveModelCallback = SaveBest
EarlyStoppingCallback = EarlyStopping
TerminateOnNaNCallback = TerminateOnNaN
ShortEpochCallback = ShortEpoch
