"""Search spaces as values: what a sweep draws a recipe's settings from."""

from dataclasses import dataclass
from typing import Any

from training.schedule import as_words


@dataclass(frozen=True)
class LogUniform:
    """Numbers between `low` and `high`, each factor as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"loguniform takes 0 < low < high, not {self.low!r}, {self.high!r}")


@dataclass(frozen=True)
class Uniform:
    """Numbers between `low` and `high`, each as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"uniform takes low < high, not {self.low!r}, {self.high!r}")


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 1:
            raise ValueError("choice takes at least one value")


@dataclass(frozen=True)
class Grid(Choice):
    """Each of some values in turn: every one is tried `trials` times."""


Space = LogUniform | Uniform | Choice
KINDS = (LogUniform, Uniform, Choice)


def loguniform(low: float, high: float) -> LogUniform:
    """Numbers between `low` and `high`, each factor as likely."""
    return LogUniform(low, high)


def uniform(low: float, high: float) -> Uniform:
    """Numbers between `low` and `high`, each as likely."""
    return Uniform(low, high)


def choice(*options: Any) -> Choice:
    """One of `options`, each as likely."""
    return Choice(options)


def grid(*options: Any) -> Grid:
    """Each of `options` in turn."""
    return Grid(options)


SPACES = {f.__name__: f for f in (loguniform, uniform, choice, grid)}


def space_words(value: Any) -> str:
    """A space, or a fixed value, as the command line takes it."""
    if not isinstance(value, Space):
        return as_words(value)
    parts = value.options if isinstance(value, Choice) else (value.low, value.high)
    return f"{type(value).__name__.lower()}({', '.join(as_words(p) for p in parts)})"
