"""`learn.lr_find()`: a short mock training over rising rates, and what its losses say about a good one.

Nothing of it stays: weights, optimizer, record and random generators are what they were, and no file is written.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training import distributed
from training.callback import Callback, CancelFitException, CancelValidException
from training.schedule import flat

if TYPE_CHECKING:
    from training.learner import Learner, Runner

SMOOTHING = 0.98  # the share of the past in the mean of the losses
DIVERGED = 4.0  # times the best loss
SuggestFunction = Callable[[np.ndarray, np.ndarray], float]


def valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate two thirds down the longest stretch over which the losses keep falling."""
    length = np.ones(len(losses), dtype=int)
    for end in range(1, len(losses)):
        below = length[:end][losses[:end] > losses[end]]
        length[end] = 1 + below.max(initial=0)
    end = int(length.argmax())
    third = length[end] / 3
    return float(lrs[end - length[end] + int(third) + int(third / 2) + 1])


def steep(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate at which the loss falls fastest over the logarithm of the rate."""
    return float(lrs[(np.diff(losses) / np.diff(np.log(lrs))).argmin()])


def minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    """A tenth of the rate with the lowest loss."""
    return float(lrs[losses.argmin()] / 10)


def slide(lrs: np.ndarray, losses: np.ndarray, width: int = 15, threshold: float = 0.005) -> float:
    """The left end of a window slid down from the highest rate until the loss falls as fast at both its ends."""
    slope = np.gradient(losses)
    for right in range(len(losses) - 1, width - 1, -1):
        if abs(slope[right] - slope[right - width]) <= threshold:
            return float(lrs[min(right - width + 1, len(lrs) - 1)])
    return float(lrs[0])


@dataclass(frozen=True)
class FoundRates:
    """Rates and smoothed losses of the mock training, and the suggested rates: `found.valley`, or by name."""

    lrs: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    suggestions: dict[str, float]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> float:
            try:
                return self.__dict__["suggestions"][name]
            except KeyError:
                raise AttributeError(f"{name!r} was not among the suggest_funcs") from None

    def plot(self) -> Any:
        """A matplotlib figure of the losses over the rates, with the suggestions."""
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axis = figure.subplots()
        axis.plot(self.lrs, self.losses)
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
        for number, (name, rate) in enumerate(self.suggestions.items()):
            axis.plot(rate, np.interp(rate, self.lrs, self.losses), "o", color=f"C{number + 1}", label=f"{name} {rate:.2e}")
        if self.suggestions:
            axis.legend()
        return figure


class LRFinder(Callback):
    """Trains each batch at a higher rate, and stops when the last is reached or the loss has grown out of bounds; fastai's.

    lrs, losses: the rates and the smoothed losses. What it trained stays: `lr_find` is what undoes it.
    """

    order = 65  # after ScheduledRates
    needs_inputs = False

    def __init__(self, start_lr: float = 1e-7, end_lr: float = 10.0, num_it: int = 100, stop_div: bool = True):
        if not 0 < start_lr < end_lr or num_it < 20:
            raise ValueError(
                f"rates rise from above 0, in 20 batches or more, not from {start_lr!r} to {end_lr!r} in {num_it!r} batches"
            )
        self.start_lr, self.ratio, self.num_it, self.stop_div = start_lr, end_lr / start_lr, num_it, stop_div
        self._forget()

    def _forget(self) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.mean = 0.0

    def before_fit(self, learn: "Learner") -> None:
        if learn.epoch == learn.start_epoch:  # not in a fit that goes on after a restart
            self._forget()

    def before_batch(self, learn: "Learner") -> None:
        self.lr = self.start_lr * self.ratio ** (len(self.lrs) / self.num_it)
        for group in learn.opt.param_groups:
            group["lr"] = self.lr

    def after_batch(self, learn: "Learner") -> None:
        mine = torch.zeros(2, dtype=torch.float64)
        if learn.loss is not None:  # else the batch was cancelled before
            mine = torch.stack([learn.loss.cpu().double(), torch.ones((), dtype=torch.float64)]) * learn.loss_count
        total, count = distributed.sum_over_ranks(mine).tolist()
        if not count:
            return
        self.mean += (1 - SMOOTHING) * (total / count - self.mean)
        self.lrs.append(self.lr)
        self.losses.append(self.mean / (1 - SMOOTHING ** len(self.lrs)))
        diverged = not self.losses[-1] <= DIVERGED * min(self.losses)  # so that NaN has diverged
        if len(self.lrs) >= self.num_it or (self.stop_div and diverged):
            raise CancelFitException

    def before_validate(self, learn: "Learner") -> None:
        raise CancelValidException

    def state_dict(self) -> dict[str, Any]:  # so that they come home from workers
        return {"lrs": self.lrs, "losses": self.losses, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lrs, self.losses, self.mean = list(state["lrs"]), list(state["losses"]), state["mean"]


def lr_find(
    learn: "Learner",
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_it: int = 100,
    *,
    stop_div: bool = True,
    suggest_funcs: Iterable[SuggestFunction] = (valley,),
    on: "Runner | None" = None,
) -> FoundRates:
    """Train `num_it` batches at rates from `start_lr` to `end_lr` in equal ratios, see where the loss falls, undo it all.

    stop_div: stop once the smoothed loss is four times its best. suggest_funcs: of (rates, losses), such as `valley`,
    `slide`, `steep`, `minimum`. Callbacks that listen to the end of an epoch take no part: they print, save and stop by
    what an epoch brought. on: as for `fit`, with the same suggestions. Smith, arXiv:1506.01186.
    """
    rising = LRFinder(start_lr, end_lr, num_it, stop_div)
    of_epochs = [c for c in learn.callbacks if type(c).after_epoch is not Callback.after_epoch]
    before, to_restore = copy.deepcopy(learn.state_dict()), learn._to_restore
    try:
        with learn.removed_callbacks(*of_epochs):
            batches = len(learn.dls.train) if isinstance(learn.dls.train, Sized) else 1  # the loop says what is wrong
            epochs = math.ceil(num_it / max(1, batches))
            learn.fit(flat(epochs), callbacks=[rising], on=on)
    finally:
        learn.load_state_dict(before)
        learn._to_restore = to_restore
    # The first tenth only warms the mean up, the last few batches have blown up.
    lrs, losses = np.array(rising.lrs)[num_it // 10 : -5], np.array(rising.losses)[num_it // 10 : -5]
    finite = np.isfinite(losses)
    lrs, losses = lrs[finite], losses[finite]
    if not rising.lrs:
        raise ValueError("no batch had a loss: the batches have no targets, or a callback cancels all of them before")
    if not math.isfinite(rising.losses[0]):
        raise ValueError(f"the first loss is {rising.losses[0]} already: look at the data and the loss function")
    if len(lrs) < 3:
        raise ValueError(f"the loss grew out of bounds within {len(rising.lrs)} batches: begin below start_lr={start_lr}")
    return FoundRates(lrs, losses, {f.__name__: f(lrs, losses) for f in suggest_funcs})
