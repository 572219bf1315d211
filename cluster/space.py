"""Search spaces as values: what a sweep draws a recipe's settings from.

Spaces lie within spaces: `choice(one_cycle(choice(2, 5)), fine_tune(4, freeze_epochs=choice(1, 2)))` draws `freeze_epochs`
only where `fine_tune` was drawn. On the command line that is how it is written; in Python, where `one_cycle(choice(2, 5))`
would be called at once, `call(one_cycle, choice(2, 5))`.

What is drawn are numbers: by its path ("schedule", "schedule.1.freeze_epochs"), the place of an option or a value. `settled`
makes settings of them. So a draw is plain data, whatever the options are.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.schedule import SCHEDULES, as_words

GOLDEN = 0.6180339887
Draws = dict[str, float]


@dataclass(frozen=True)
class LogUniform:
    """Numbers between `low` and `high`, each factor as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"loguniform takes 0 < low < high, not {self.low!r}, {self.high!r}")


@dataclass(frozen=True)
class Uniform:
    """Numbers between `low` and `high`, each as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"uniform takes low < high, not {self.low!r}, {self.high!r}")


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 1:
            raise ValueError(f"{type(self).__name__.lower()} takes at least one value")


@dataclass(frozen=True)
class Grid(Choice):
    """Each of some values in turn: every one is tried `trials` times."""


@dataclass(frozen=True)
class Call:
    """What `function` makes of arguments that are drawn first. TypeError when it takes no such arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        inspect.signature(self.function).bind(*self.arguments, **dict(self.keywords))

    def parts(self) -> list[tuple[str, Any]]:
        """Each argument with its name, or its place."""
        return [*((str(place), a) for place, a in enumerate(self.arguments)), *self.keywords]

    def of(self, values: Iterable[Any]) -> Any:
        """The function's value for these arguments, in the order of `parts`."""
        settled = list(values)
        places = len(self.arguments)
        return self.function(*settled[:places], **dict(zip(dict(self.keywords), settled[places:], strict=True)))


@dataclass(frozen=True)
class AroundLrFind:
    """Rates within `factor` of what `lr_find` suggests for the first trial's Learner, each factor as likely."""

    factor: float = 10.0

    def __post_init__(self) -> None:
        if not 1 < self.factor < math.inf:
            raise ValueError(f"around_lr_find takes a factor above 1, not {self.factor!r}")

    def around(self, suggestion: float) -> LogUniform:
        """The rates around a suggestion."""
        return LogUniform(suggestion / self.factor, suggestion * self.factor)


Space = LogUniform | Uniform | Choice | Call | AroundLrFind
KINDS = (LogUniform, Uniform, Choice, Call, AroundLrFind)


def loguniform(low: float, high: float) -> LogUniform:
    """Numbers between `low` and `high`, each factor as likely."""
    return LogUniform(low, high)


def uniform(low: float, high: float) -> Uniform:
    """Numbers between `low` and `high`, each as likely."""
    return Uniform(low, high)


def choice(*options: Any) -> Choice:
    """One of `options`, each as likely; an option may hold spaces itself."""
    return Choice(options)


def grid(*options: Any) -> Grid:
    """Each of `options` in turn."""
    return Grid(options)


def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Call:
    """`function` of arguments that may be spaces: `call(fine_tune, 4, freeze_epochs=choice(1, 2))`."""
    return Call(function, arguments, tuple(keywords.items()))


def around_lr_find(factor: float = 10.0) -> AroundLrFind:
    """Rates from 1/`factor` to `factor` times the suggestion of `lr_find`, which runs once before the first trial."""
    return AroundLrFind(factor)


SPACES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (loguniform, uniform, choice, grid, around_lr_find)}


def _called_when_drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def make(*arguments: Any, **keywords: Any) -> Any:
        spaces = any(isinstance(a, Space) for a in (*arguments, *keywords.values()))
        return (functools.partial(call, function) if spaces else function)(*arguments, **keywords)

    return make


# What a setting of a sweep may be written with on the command line.
NAMES = SPACES | {name: _called_when_drawn(function) for name, function in SCHEDULES.items()}


def space_words(value: Any) -> str:
    """A space, or a fixed value, as the command line takes it."""
    match value:
        case Choice(options):
            return f"{type(value).__name__.lower()}({', '.join(map(_inner_words, options))})"
        case LogUniform(low, high) | Uniform(low, high):
            return f"{type(value).__name__.lower()}({low!r}, {high!r})"
        case AroundLrFind(factor):
            return f"around_lr_find({factor!r})"
        case Call(function, arguments, keywords):
            words = [*map(_inner_words, arguments), *(f"{name}={_inner_words(a)}" for name, a in keywords)]
            return f"{function.__name__}({', '.join(words)})"
    return as_words(value)


def _inner_words(value: Any) -> str:
    return repr(value) if isinstance(value, str) else space_words(value)


# --- drawing -----------------------------------------------------------------------------------------------------------


def draws_of(
    spaces: Mapping[str, Any],
    choose: Callable[[str, Choice], Iterable[int]],
    number: Callable[[str, LogUniform | Uniform], float],
) -> Iterator[Draws]:
    """Draws of all spaces: one, or one for each combination where `choose` gives several options.

    choose: path and choice -> the places of the options to take. number: path and range -> a number. Both are asked for
    what lies on the way of the options that were taken, and for nothing else.
    """
    combinations: list[Draws] = [{}]
    for name, space in spaces.items():
        combinations = [
            {**before, **more} for before in combinations for more in _draws(space, name, choose, number)
        ]  # fmt: skip
    yield from combinations


def _draws(
    space: Any,
    path: str,
    choose: Callable[[str, Choice], Iterable[int]],
    number: Callable[[str, LogUniform | Uniform], float],
) -> Iterator[Draws]:
    match space:
        case Choice(options):
            for place in choose(path, space):
                for more in _draws(options[place], f"{path}.{place}", choose, number):
                    yield {path: place, **more}
        case LogUniform() | Uniform():
            yield {path: number(path, space)}
        case Call():
            yield from draws_of({f"{path}.{name}": part for name, part in space.parts()}, choose, number)
        case _:
            yield {}


def settled(spaces: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
    """The settings that `draws` stands for; what is no space is itself."""
    return {name: _settled(space, name, draws) for name, space in spaces.items()}


def _settled(space: Any, path: str, draws: Draws) -> Any:
    match space:
        case Choice(options):
            place = int(draws[path])
            return _settled(options[place], f"{path}.{place}", draws)
        case LogUniform() | Uniform():
            return draws[path]
        case Call():
            return space.of(_settled(part, f"{path}.{name}", draws) for name, part in space.parts())
        case AroundLrFind():
            raise AssertionError(f"{path}: lr_find has not run")
    return space


def candidates(space: Any) -> list[Any]:
    """Every value that choices can take, and of a range its ends and one between that is no whole number."""
    match space:
        case Choice(options):
            return [value for option in options for value in candidates(option)]
        case LogUniform(low, high) | Uniform(low, high):
            return [low, high, low + (high - low) * GOLDEN]
        case Call():
            return [space.of(values) for values in itertools.product(*(candidates(part) for _, part in space.parts()))]
        case AroundLrFind():
            return [1e-3]
    return [space]


def around_suggestion(space: Any, suggestion: float) -> Any:
    """A space with its `around_lr_find`s, wherever they lie in it, as rates around what `lr_find` suggests."""

    def inner(part: Any) -> Any:
        return around_suggestion(part, suggestion)

    match space:
        case AroundLrFind():
            return space.around(suggestion)
        case Choice(options):
            return type(space)(tuple(map(inner, options)))
        case Call(function, arguments, keywords):
            return Call(function, tuple(map(inner, arguments)), tuple((name, inner(a)) for name, a in keywords))
    return space


def inner_parts(space: Any) -> list[Any]:
    """What lies directly within a space: a choice's options, a call's arguments."""
    match space:
        case Choice(options):
            return list(options)
        case Call():
            return [part for _, part in space.parts()]
    return []


def ranges(space: Any) -> list[LogUniform | Uniform | AroundLrFind]:
    """The ranges in a space, of which there are endlessly many values."""
    if isinstance(space, LogUniform | Uniform | AroundLrFind):
        return [space]
    return [r for part in inner_parts(space) for r in ranges(part)]
