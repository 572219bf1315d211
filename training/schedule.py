"""Schedules as values: a schedule is a tuple of `Phase`s; it prints, compares, and becomes plain data and back.

Rates are multiples of the run's `lr`, so that one schedule serves any rate, in a sweep as well.
"""

import dataclasses
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
    train_bn: the normalisation layers of frozen groups train all the same.
    """

    epochs: int
    freeze_to: int | None = None
    lr: Curve = FLAT
    momentum: Curve | None = None
    spread: float = 1.0
    train_bn: bool = True

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


def one_cycle(
    epochs: int, *, pct_start: float = 0.25, div: float = 25.0, div_final: float = 1e5, spread: float = 1.0
) -> Schedule:
    """Warm up to the run's rate and anneal to almost nothing, momentum the other way (Smith, arXiv:1803.09820)."""
    return (_cycle(epochs, pct_start=pct_start, div=div, div_final=div_final, spread=spread),)


def fine_tune(
    epochs: int,
    *,
    freeze_epochs: int = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
) -> Schedule:
    """Train the last group alone for `freeze_epochs`, then all groups at half the rate, the first at 1/`lr_mult` of it."""
    frozen = _cycle(freeze_epochs, pct_start=0.99, div=25.0, div_final=1e5, freeze_to=-1) if freeze_epochs else None
    whole = _cycle(epochs, pct_start=pct_start, div=div, div_final=1e5, top=0.5, spread=lr_mult, freeze_to=0)
    return (frozen, whole) if frozen else (whole,)


def _cycle(
    epochs: int,
    *,
    pct_start: float,
    div: float,
    div_final: float,
    top: float = 1.0,
    spread: float = 1.0,
    freeze_to: int | None = None,
) -> Phase:
    if not (div > 0 and div_final > 0 and 0 <= pct_start <= 1):
        raise ValueError(
            f"pct_start is at least 0 and at most 1, div and div_final above 0, not {pct_start!r}, {div!r}, {div_final!r}"
        )
    return Phase(
        epochs,
        freeze_to=freeze_to,
        lr=Curve(((0.0, top / div), (pct_start, top), (1.0, top / div_final))),
        momentum=Curve(((0.0, 0.95), (pct_start, 0.85), (1.0, 0.95))),
        spread=spread,
    )


# What a schedule may be written with on the command line; a printed schedule can be read back.
SCHEDULES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (flat, one_cycle, fine_tune, Phase, Curve)}


def as_words(value: Any) -> str:
    """A setting's value as a person would write it: a schedule by the shortest call that makes it, else its repr."""
    if not isinstance(value, tuple) or not value or not all(isinstance(p, Phase) for p in value):
        return value if isinstance(value, str) else repr(value)
    *before, last = value
    short = [flat(last.epochs), one_cycle(last.epochs)]
    names = [f"flat({last.epochs})", f"one_cycle({last.epochs})"]
    frozen = before[0].epochs if before else 0
    short.append(fine_tune(last.epochs, freeze_epochs=frozen))
    names.append(f"fine_tune({last.epochs}, freeze_epochs={frozen})")
    return names[short.index(value)] if value in short else repr(value)


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
