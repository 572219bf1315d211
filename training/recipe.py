"""`Recipe`: everything one training run needs, as a value, made by a recipe function whose arguments are its settings.

    @recipe
    def pets(*, arch: str = "resnet34", lr: float = 1e-3, schedule: Schedule = fine_tune(3)) -> Recipe:
        "Cats and dogs, 37 breeds."
        return Recipe(block=..., source=..., learner=partial(pets_learner, arch=arch), lr=lr, schedule=schedule)

The command line, a sweep's space and a job set the same names. Calling a recipe function does no I/O and builds no model.
"""

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import UserError
from training.expressions import NotAnExpression, is_call, read_expression
from training.schedule import SCHEDULES, Schedule, as_words, total_epochs

if TYPE_CHECKING:
    from blocks.datablock import DataBlock
    from blocks.dataloaders import DataLoaders
    from training.learner import Learner

# The runner's own words: they stand beside a recipe's settings on the command line, so no recipe may use them.
RUNNER_WORDS = (
    "workers",
    "trials",
    "scheduler",
    "search",
    "register",
    "alias",
    "system_metrics",
    "report",
    "address",
    "experiment",
)


class SettingError(UserError):
    """A setting that does not exist, or a value it does not take."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    block: what the data is, or a function that says so after a look at the source. source: where the data is, or a function
    that puts it there and returns where. learner: data -> Learner.
    max_bad_rows: how many unreadable rows may be left out. name, settings: filled by `@recipe`.
    """

    block: "DataBlock | Callable[[Path], DataBlock]"
    source: str | Path | Callable[[], Path]
    learner: Callable[["DataLoaders"], "Learner"]
    lr: float
    schedule: Schedule
    batch_size: int = 64
    seed: int = 0
    max_bad_rows: int = 0
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    found_as: str = ""

    @property
    def epochs(self) -> int:
        """Epochs over all phases."""
        return total_epochs(self.schedule)

    @property
    def data_settings(self) -> dict[str, Any]:
        """How the data is prepared and fed: the keyword arguments of `block.dataloaders` and `cluster.dataloaders`."""
        return {"batch_size": self.batch_size, "seed": self.seed, "max_bad_rows": self.max_bad_rows}

    def located(self) -> Path:
        """Where the data is, once it is there."""
        return Path(self.source() if callable(self.source) else self.source)

    def data(self) -> tuple["DataBlock", Path]:
        """What the data is, and where, once it is there."""
        where = self.located()
        return self.block(where) if callable(self.block) else self.block, where


RecipeFunction = Callable[..., Recipe]


def recipe(function: RecipeFunction) -> RecipeFunction:
    """Make `function` a recipe function: its keyword-only, annotated arguments with defaults are its settings.

    TypeError when an argument is not such, or is one of the runner's own words.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    for name, p in parameters.items():
        if name in RUNNER_WORDS:
            raise TypeError(
                f"recipe {function.__name__}: {name!r} is a word of the runner ({', '.join(RUNNER_WORDS)}); rename it"
            )
        if p.kind is not p.KEYWORD_ONLY or p.annotation is p.empty or p.default is p.empty:
            raise TypeError(f"recipe {function.__name__}: write {name!r} after *, with a type and a default")

    @functools.wraps(function)
    def make(**settings: Any) -> Recipe:
        typed = {name: p.default for name, p in parameters.items()}
        typed |= {name: checked(make, name, value) for name, value in settings.items()}
        try:
            made = function(**typed)
        except ValueError as error:  # a value of the right type that a part of the recipe does not take
            raise SettingError(f"{function.__name__}: {error}") from error
        found_as = f"{function.__module__}:{function.__name__}"
        return replace(made, name=function.__name__, settings=typed, found_as=found_as)

    return make


def checked(make: RecipeFunction, name: str, value: Any) -> Any:
    """`value` as the type of the setting `name`. SettingError when there is no such setting or it takes no such value."""
    import pydantic

    parameter = _parameter(make, name)
    try:
        return pydantic.TypeAdapter(parameter.annotation).validate_python(value)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise SettingError(
            f"{name}={value!r} is not a value for this setting of {make.__name__}: {reason} "
            f"(its default is {as_words(parameter.default)})"
        ) from None


def read_setting(
    make: RecipeFunction,
    name: str,
    text: str,
    names: Mapping[str, Callable[..., Any]] = SCHEDULES,
    also: Iterable[str] = (),
) -> Any:
    """The value of `name=text` as a person writes it, still unchecked: text for a setting of text, else an expression.

    names: the functions an expression may call. also: other words that are allowed beside the settings, to suggest.
    """
    parameter = _parameter(make, name, also)
    try:
        value = read_expression(text, names)
    except NotAnExpression:
        return text
    except ValueError as error:
        raise SettingError(f"{name}={text}: {error}") from None
    if is_call(text):
        return value
    # A setting that takes text takes it as it stands: weights=2024 is a file's name where weights are one.
    import pydantic

    for candidate, strict in ((text, True), (value, False), (text, False)):
        with contextlib.suppress(pydantic.ValidationError):
            pydantic.TypeAdapter(parameter.annotation).validate_python(candidate, strict=strict)
            return candidate
    return value


def _parameter(make: RecipeFunction, name: str, also: Iterable[str] = ()) -> inspect.Parameter:
    parameters = inspect.signature(make, eval_str=True).parameters
    if name not in parameters:
        raise SettingError(f"{make.__name__} has no setting {name!r}{did_you_mean(name, [*parameters, *also])}")
    return parameters[name]


def described(make: RecipeFunction) -> str:
    """A recipe's name, what it is, and its settings with their defaults, as text."""
    lines = (inspect.getdoc(make) or "").splitlines()
    settings = [f"{name}={as_words(p.default)}" for name, p in inspect.signature(make).parameters.items()]
    return "\n".join([make.__name__, *(f"    {line}".rstrip() for line in lines), f"    {' '.join(settings)}"])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as the end of a sentence, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
