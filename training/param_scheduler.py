"""Any hyper-parameter of the optimizer as a function of how far the training is; fastai's words for such functions.

The learning rate and the momentum are scheduled by `Phase`s as a rule; this is for the others, and for what a phase cannot say.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from training.callback import Callback
from training.hypers import group_hyper, set_group_hyper
from training.schedule import Curve

if TYPE_CHECKING:
    from training.learner import Learner

Sched = Callable[[float], float]


class ParamScheduler(Callback):
    """Sets hyper-parameters of all parameter groups before each training batch.

    scheds: by name ("lr", "mom", "wd", or the optimizer's own name for it) a function of the share 0..1 of the fit that is
    done, or a `Curve` over it. ValueError for a name the optimizer does not have. What was set before is restored in the end.
    """

    order = 61  # after ScheduledRates, whose rates it overrides
    needs_inputs = False

    def __init__(self, scheds: Mapping[str, Sched | Curve]):
        self.scheds = {name: s.at if isinstance(s, Curve) else s for name, s in scheds.items()}
        self._before: list[dict[str, float]] = []

    def before_fit(self, learn: "Learner") -> None:
        self._before = [{name: group_hyper(group, name) for name in self.scheds} for group in learn.opt.param_groups]

    def before_batch(self, learn: "Learner") -> None:
        if learn.training:
            done = (learn.epoch + learn.iter / learn.n_iter) / learn.n_epoch
            for name, sched in self.scheds.items():
                value = sched(done)
                for group in learn.opt.param_groups:
                    set_group_hyper(group, name, value)

    def after_fit(self, learn: "Learner") -> None:
        for group, before in zip(learn.opt.param_groups, self._before, strict=False):
            for name, value in before.items():
                set_group_hyper(group, name, value)
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        return {"before": [dict(hypers) for hypers in self._before]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = [dict(hypers) for hypers in state["before"]]


def SchedNo(start: float, end: float) -> Sched:  # noqa: N802  fastai's name
    """`start` all the time."""
    return partial(_no, start, end)


def SchedLin(start: float, end: float) -> Sched:  # noqa: N802
    """From `start` to `end` in a straight line."""
    return partial(_lin, start, end)


def SchedCos(start: float, end: float) -> Sched:  # noqa: N802
    """From `start` to `end` along half a cosine."""
    return partial(_cos, start, end)


def SchedExp(start: float, end: float) -> Sched:  # noqa: N802
    """From `start` to `end` by equal factors."""
    return partial(_exp, start, end)


def SchedPoly(start: float, end: float, power: float) -> Sched:  # noqa: N802
    """From `start` to `end` as progress ** `power`."""
    return partial(_poly, start, end, power)


def _no(start: float, end: float, done: float) -> float:
    return start


def _lin(start: float, end: float, done: float) -> float:
    return start + done * (end - start)


def _cos(start: float, end: float, done: float) -> float:
    return start + (1 + math.cos(math.pi * (1 - done))) * (end - start) / 2


def _exp(start: float, end: float, done: float) -> float:
    return start * (end / start) ** done


def _poly(start: float, end: float, power: float, done: float) -> float:
    return start + (end - start) * done**power


def combine_scheds(pcts: Sequence[float], scheds: Sequence[Sched]) -> Sched:
    """`scheds` one after the other, each for its share of the training; the shares add up to 1."""
    if len(pcts) != len(scheds) or not math.isclose(sum(pcts), 1) or min(pcts) < 0:
        raise ValueError(f"one share a function, together 1: not {list(pcts)} for {len(scheds)} functions")
    starts = [sum(pcts[:i]) for i in range(len(pcts))]
    return partial(_combined, starts, tuple(pcts), tuple(scheds))


def _combined(starts: Sequence[float], pcts: Sequence[float], scheds: Sequence[Sched], done: float) -> float:
    i = bisect.bisect_right(starts, done) - 1
    return scheds[i](min((done - starts[i]) / pcts[i], 1.0) if pcts[i] else 1.0)


def combined_cos(pct: float, start: float, middle: float, end: float) -> Curve:
    """A `Curve` from `start` to `middle` in the share `pct` of the training and on to `end`, along cosines."""
    return Curve(((0.0, start), (pct, middle), (1.0, end)))
