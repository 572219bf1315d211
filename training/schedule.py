"""Schedules as values: a schedule is a tuple of `Phase`s; it prints, compares, and becomes plain data and back.

Rates are multiples of the run's `lr`, so that one schedule serves any rate, in a sweep as well.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A value over the progress 0..1 of a phase: cosines between `points` (progress, value), fastai's `combined_cos`."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        at = [p for p, _ in self.points]
        if not all(math.isfinite(number) for point in self.points for number in point):
            raise ValueError(f"a curve is made of finite numbers, not {self.points!r}")
        if len(at) < 1 or at[0] != 0 or at[-1] > 1 or at != sorted(at):
            raise ValueError(f"a curve's points go from progress 0 up to at most 1, not {self.points!r}")

    def at(self, progress: float) -> float:
        """The value at `progress`; past the last point, the last value."""
        last_p, last_v = self.points[0]
        for p, v in self.points[1:]:
            if progress < p:
                share = (progress - last_p) / (p - last_p)
                return v + (last_v - v) * (1 + math.cos(math.pi * share)) / 2
            last_p, last_v = p, v
        return last_v


FLAT = Curve(((0.0, 1.0),))


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    epochs: how many. freeze_to: the parameter groups before this one do not train (0: all train, -1: only the last, None:
    as it was).
    lr: multiple of the run's `lr` over the phase. momentum: Adam's first beta, None: the optimizer's own.
    spread: the first group's rate is 1/spread of the last one's, those between in equal ratios.
    train_bn: whether the normalisation layers of frozen groups train all the same, None: as the Learner says.
    cache_features: compute once what the frozen layers make of each row, with the same losses (`training.features`).
    """

    epochs: int
    freeze_to: int | None = None
    lr: Curve = FLAT
    momentum: Curve | None = None
    spread: float = 1.0
    train_bn: bool | None = None
    cache_features: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"a phase has at least one epoch, a whole number, not {self.epochs!r}")
        if not isinstance(self.lr, Curve) or not isinstance(self.momentum, Curve | None):
            raise ValueError(f"a phase's rates are Curves over it, not {self.lr!r} and {self.momentum!r}")
        if not self.spread >= 1 or math.isinf(self.spread):
            raise ValueError(f"spread divides the first group's rate and is at least 1, not {self.spread!r}")


Schedule = tuple[Phase, ...]


def flat(epochs: int) -> Schedule:
    """`epochs` epochs at the run's rate: what `learn.fit(epochs)` does."""
    return (Phase(epochs),)


Moms = tuple[float, float, float]
MOMS: Moms = (0.95, 0.85, 0.95)  # at the start, where the rate is highest, at the end


def one_cycle(
    epochs: int,
    *,
    pct_start: float = 0.25,
    div: float = 25.0,
    div_final: float = 1e5,
    spread: float = 1.0,
    moms: Moms = MOMS,
) -> Schedule:
    """Warm up to the run's rate and anneal to almost nothing, momentum the other way (Smith, arXiv:1803.09820)."""
    return (_cycle(epochs, pct_start=pct_start, div=div, div_final=div_final, spread=spread, moms=moms),)


def flat_cos(epochs: int, *, div_final: float = 1e5, pct_start: float = 0.75) -> Schedule:
    """The run's rate until `pct_start` of the way, then a cosine down to 1/`div_final` of it."""
    _check_cycle(pct_start, 1.0, div_final)
    return (Phase(epochs, lr=Curve(((0.0, 1.0), (pct_start, 1.0), (1.0, 1 / div_final)))),)


def sgdr(n_cycles: int, cycle_len: int, *, cycle_mult: int = 2) -> Schedule:
    """Cosines from the run's rate to nothing, each `cycle_mult` times as long as the last (Loshchilov, arXiv:1608.03983)."""
    if n_cycles < 1:
        raise ValueError(f"there is at least one cycle, not n_cycles={n_cycles!r}")
    return tuple(Phase(cycle_len * cycle_mult**i, lr=Curve(((0.0, 1.0), (1.0, 0.0)))) for i in range(n_cycles))


def fine_tune(
    epochs: int,
    *,
    freeze_epochs: int = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
    moms: Moms = MOMS,
    cache_features: bool = False,
) -> Schedule:
    """Train the last group alone for `freeze_epochs`, then all groups at half the rate, the first at 1/`lr_mult` of it.

    cache_features: while the last group trains alone (`Phase`).
    """
    cycle = functools.partial(_cycle, pct_start=0.99, div=25.0, div_final=1e5, moms=moms)
    frozen = cycle(freeze_epochs, freeze_to=-1, cache_features=cache_features) if freeze_epochs else None
    whole = _cycle(epochs, pct_start=pct_start, div=div, div_final=1e5, top=0.5, spread=lr_mult, freeze_to=0, moms=moms)
    return (frozen, whole) if frozen else (whole,)


def gradual_unfreeze(
    epochs: int,
    *,
    stages: int = 3,
    stage_epochs: int = 1,
    decay: float = 2.0,
    spread: float = 2.6**4,
    cache_features: bool = False,
) -> Schedule:
    """One more group from the last for each of `stages`, at 1/`decay` of the rate before, then all groups for `epochs`.

    From the second stage on the first group's rate is 1/`spread` of the last one's. Howard & Ruder, arXiv:1801.06146.
    cache_features: in the first stage, where the last group trains alone (`Phase`).
    """
    if stages < 1 or not decay > 0:
        raise ValueError(f"there is at least one stage and decay is above 0, not stages={stages!r}, decay={decay!r}")
    cycle = functools.partial(_cycle, pct_start=0.25, div=25.0, div_final=1e5)
    first = [
        cycle(
            stage_epochs,
            top=decay**-i,
            spread=spread if i else 1.0,
            freeze_to=-1 - i,
            cache_features=cache_features and i == 0,
        )
        for i in range(stages)
    ]
    return (*first, cycle(epochs, top=decay**-stages, spread=spread, freeze_to=0))


def _cycle(
    epochs: int,
    *,
    pct_start: float,
    div: float,
    div_final: float,
    top: float = 1.0,
    spread: float = 1.0,
    freeze_to: int | None = None,
    moms: Moms = MOMS,
    cache_features: bool = False,
) -> Phase:
    _check_cycle(pct_start, div, div_final)
    if len(moms) != 3:
        raise ValueError(f"moms are the momentum at the start, the middle and the end of a cycle, not {moms!r}")
    start, middle, end = moms
    return Phase(
        epochs,
        freeze_to=freeze_to,
        lr=Curve(((0.0, top / div), (pct_start, top), (1.0, top / div_final))),
        momentum=Curve(((0.0, start), (pct_start, middle), (1.0, end))),
        spread=spread,
        cache_features=cache_features,
    )


def _check_cycle(pct_start: float, div: float, div_final: float) -> None:
    if not (div > 0 and div_final > 0 and 0 <= pct_start <= 1):
        raise ValueError(
            f"pct_start is at least 0 and at most 1, div and div_final above 0, not {pct_start!r}, {div!r}, {div_final!r}"
        )


def top_and_spread(lr: float | slice) -> tuple[float, float]:
    """The last parameter group's rate, and how many times smaller the first one's is.

    A number: one rate for all. `slice(first, last)`: these. `slice(last)`: a tenth of it for the first, as fastai's.
    """
    if not isinstance(lr, slice):
        return lr, 1.0
    if lr.stop is None or lr.step is not None or not 0 < (lr.start or lr.stop) <= lr.stop:
        raise ValueError(f"rates are slice(first, last) with first <= last, or slice(last), not {lr!r}")
    return lr.stop, lr.stop / lr.start if lr.start else 10.0


def scaled(lr: float | slice, factor: float) -> float | slice:
    """The rate, or the rates of the first and the last parameter group, times `factor`."""
    return slice(lr.start and lr.start * factor, lr.stop * factor) if isinstance(lr, slice) else lr * factor


BUILDERS: tuple[Callable[..., Schedule], ...] = (flat, one_cycle, flat_cos, sgdr, fine_tune, gradual_unfreeze)

# What a schedule may be written with on the command line; a printed schedule can be read back.
SCHEDULES: dict[str, Callable[..., Any]] = {f.__name__: f for f in BUILDERS} | {"Phase": Phase, "Curve": Curve}


def as_words(value: Any) -> str:
    """A setting's value as a person would write it: a schedule by the shortest call that makes it, else its repr."""
    if not isinstance(value, tuple) or not value or not all(isinstance(p, Phase) for p in value):
        return value if isinstance(value, str) else repr(value)
    *before, last = value
    frozen = before[0].epochs if before else 0
    short = {f"flat({last.epochs})": flat(last.epochs), f"one_cycle({last.epochs})": one_cycle(last.epochs)}
    short[f"flat_cos({last.epochs})"] = flat_cos(last.epochs)
    short[f"sgdr({len(value)}, {value[0].epochs})"] = sgdr(len(value), value[0].epochs)
    cached = value[0].cache_features
    also = ", cache_features=True" if cached else ""
    tuned = fine_tune(last.epochs, freeze_epochs=frozen, cache_features=cached)
    short[f"fine_tune({last.epochs}, freeze_epochs={frozen}{also})"] = tuned
    if before:
        unfreezing = gradual_unfreeze(last.epochs, stages=len(before), stage_epochs=frozen, cache_features=cached)
        short[f"gradual_unfreeze({last.epochs}, stages={len(before)}, stage_epochs={frozen}{also})"] = unfreezing
    return next((words for words, schedule in short.items() if schedule == value), repr(value))


def total_epochs(schedule: Schedule) -> int:
    """Epochs over all phases."""
    return sum(phase.epochs for phase in schedule)


def schedule_to_plain(schedule: Schedule) -> list[dict[str, Any]]:
    """The schedule as numbers, lists and dicts."""
    return [json.loads(json.dumps(dataclasses.asdict(phase))) for phase in schedule]


def schedule_from_plain(plain: list[dict[str, Any]]) -> Schedule:
    """The schedule that `schedule_to_plain` described."""

    def curve(points: dict[str, Any] | None) -> Curve | None:
        return points and Curve(tuple((p, v) for p, v in points["points"]))  # type: ignore[return-value]

    return tuple(Phase(**{**p, "lr": curve(p["lr"]), "momentum": curve(p["momentum"])}) for p in plain)
