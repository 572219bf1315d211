"""Recipes: what a recipe function may look like, its settings as values and as text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blocks import CategoryBlock, DataBlock, ImageBlock, get_image_files
from training import Learner, Recipe, Schedule, fine_tune, flat, one_cycle, recipe
from training.recipe import RUNNER_WORDS, SettingError, described, read_setting

BLOCK = DataBlock(blocks=(ImageBlock(), CategoryBlock()), get_items=get_image_files)


def not_called(*_: Any) -> Any:
    raise AssertionError("calling a recipe function must not get data or build a model")


@recipe
def digits(
    *, arch: str = "resnet18", lr: float = 3e-3, size: int = 16, flip: bool = False, schedule: Schedule = one_cycle(5)
) -> Recipe:
    """Handwritten digits.

    Ten classes.
    """
    return Recipe(block=BLOCK, source=not_called, learner=not_called, lr=lr, schedule=schedule, batch_size=2 * size)


# --- defining ----------------------------------------------------------------------------------------------------------


def positional(lr: float = 1.0) -> Recipe:
    raise NotImplementedError


def unannotated(*, lr=1.0) -> Recipe:  # type: ignore[no-untyped-def]
    raise NotImplementedError


def without_default(*, lr: float) -> Recipe:
    raise NotImplementedError


def any_name(**lr: float) -> Recipe:
    raise NotImplementedError


def any_number(*lr: float) -> Recipe:
    raise NotImplementedError


@pytest.mark.parametrize("function", [positional, unannotated, without_default, any_name, any_number])
def test_an_argument_that_can_be_no_setting_is_refused(function: Callable[..., Recipe]) -> None:
    with pytest.raises(TypeError, match=rf"recipe {function.__name__}: write 'lr' after \*, with a type and a default"):
        recipe(function)


def uses_workers(*, workers: int = 1) -> Recipe:
    raise NotImplementedError


def uses_alias(*, lr: float = 1.0, alias: str = "best") -> Recipe:
    raise NotImplementedError


@pytest.mark.parametrize(("function", "word"), [(uses_workers, "workers"), (uses_alias, "alias")])
def test_a_word_of_the_runner_is_refused(function: Callable[..., Recipe], word: str) -> None:
    assert word in RUNNER_WORDS
    with pytest.raises(TypeError, match=f"'{word}' is a word of the runner .*; rename it"):
        recipe(function)


def test_a_recipe_without_settings() -> None:
    @recipe
    def fixed() -> Recipe:
        return Recipe(block=BLOCK, source="here", learner=not_called, lr=1.0, schedule=flat(1))

    assert fixed().settings == {}


# --- calling -----------------------------------------------------------------------------------------------------------


def test_the_settings_are_all_there_and_typed() -> None:
    made = digits(lr="1e-3", size="8", flip="true")
    assert made.name == "digits"
    assert made.settings == {"arch": "resnet18", "lr": 1e-3, "size": 8, "flip": True, "schedule": one_cycle(5)}
    assert [type(made.settings[name]) for name in ("lr", "size", "flip")] == [float, int, bool]
    assert (made.lr, made.batch_size, made.schedule, made.epochs) == (1e-3, 16, one_cycle(5), 5)


def test_a_schedule_is_a_setting() -> None:
    made = digits(schedule=fine_tune(2))
    assert made.schedule == made.settings["schedule"] == fine_tune(2)
    assert made.epochs == 3


def test_a_recipe_is_a_value() -> None:
    assert digits(lr=1) == digits(lr=1.0)
    assert digits(lr=1) != digits(lr=2)


def test_calling_gets_no_data_and_builds_no_model() -> None:
    """`located` is what asks the source."""
    made = digits()
    with pytest.raises(AssertionError, match="must not get data"):
        made.located()


def test_located_is_a_path_given_or_asked_for(tmp_path: Path) -> None:
    def made(source: Any) -> Recipe:
        return Recipe(block=BLOCK, source=source, learner=not_called, lr=1.0, schedule=flat(1))

    assert made(str(tmp_path)).located() == made(lambda: tmp_path).located() == tmp_path


@pytest.mark.parametrize(("wrong", "meant"), [("ach", "arch"), ("schedul", "schedule"), ("lrr", "lr")])
def test_a_setting_that_does_not_exist_suggests_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(SettingError, match=f"digits has no setting '{wrong}': did you mean '{meant}'"):
        digits(**{wrong: 1})


def test_a_setting_far_from_all_is_told_which_there_are() -> None:
    with pytest.raises(SettingError, match="no setting 'xyz'; there are arch, lr, size, flip, schedule"):
        digits(xyz=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", "fast"), ("size", 1.5), ("size", "8.5"), ("arch", 18), ("flip", "perhaps"), ("schedule", 5), ("schedule", (1, 2))],
)
def test_a_value_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingError) as refused:
        digits(**{name: value})
    assert f"{name}={value!r} is not a value for this setting of digits" in str(refused.value)
    assert "its default is" in str(refused.value)


def test_a_value_that_a_part_of_the_recipe_refuses_is_a_setting_error() -> None:
    @recipe
    def short(*, epochs: int = 1) -> Recipe:
        return Recipe(block=BLOCK, source="here", learner=not_called, lr=1.0, schedule=flat(epochs))

    with pytest.raises(SettingError, match="short: a phase has at least one epoch, a whole number, not 0"):
        short(epochs=0)


def test_a_recipe_function_still_says_what_it_is() -> None:
    assert described(digits).splitlines() == [
        "digits",
        "    Handwritten digits.",
        "",
        "    Ten classes.",
        "    arch=resnet18 lr=0.003 size=16 flip=False schedule=one_cycle(5)",
    ]


def test_settings_annotated_by_text_are_the_same() -> None:
    """As under `from __future__ import annotations`."""

    @recipe
    def postponed(*, arch: "str" = "a", lr: "float" = 1.0, where: "Callable[..., Learner] | None" = None) -> "Recipe":
        return Recipe(block=BLOCK, source="here", learner=not_called, lr=lr, schedule=flat(1))

    assert postponed(lr="2").lr == 2
    assert postponed(where=None).settings["where"] is None
    assert read_setting(postponed, "arch", "18") == "18"


# --- settings as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("lr", "2", 2),
        ("size", "8", 8),
        ("flip", "True", True),
        ("schedule", "fine_tune(4, freeze_epochs=2)", fine_tune(4, freeze_epochs=2)),
        ("arch", "resnet34", "resnet34"),
        ("arch", "18", "18"),
        ("arch", "1e-3", "1e-3"),
        ("arch", "None", "None"),
        ("arch", "True", "True"),
        ("arch", "a b/c.pt", "a b/c.pt"),
        ("arch", "", ""),
        ("lr", "fast", "fast"),
    ],
)
def test_a_setting_as_written(name: str, text: str, value: Any) -> None:
    found = read_setting(digits, name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["...", "(1, 2)", "[1]", "b'x'", "1j"])
def test_a_setting_of_text_keeps_the_text_whatever_it_looks_like(text: str) -> None:
    assert read_setting(digits, "arch", text) == text


def test_a_setting_of_text_or_nothing_or_of_a_path_may_look_like_a_number() -> None:
    @recipe
    def named(*, weights: str | None = None, folder: Path = Path("a")) -> Recipe:
        return Recipe(block=BLOCK, source=folder, learner=not_called, lr=1.0, schedule=flat(1))

    made = named(weights=read_setting(named, "weights", "2024"), folder=read_setting(named, "folder", "2024"))
    assert made.settings == {"weights": "2024", "folder": Path("2024")}


def test_text_of_a_listed_call_is_called_also_for_a_setting_of_text() -> None:
    """So that a sweep can give a setting of text a choice."""
    assert read_setting(digits, "arch", "choice('a', 'b')", {"choice": lambda *options: list(options)}) == ["a", "b"]


@pytest.mark.parametrize("text", ["one_cicle(3)", "one_cycle(0)", "one_cycle(3, pct=1)", "one_cycle(3, div=0)", "{[1]: 2}"])
def test_an_expression_that_fails_is_said_with_the_setting(text: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_setting(digits, "schedule", text)
    assert str(refused.value).startswith(f"schedule={text}: ")


def test_a_word_that_is_no_setting_suggests_settings_and_the_words_beside_them() -> None:
    with pytest.raises(SettingError, match="did you mean 'size'"):
        read_setting(digits, "sise", "1", also=["workers"])
    with pytest.raises(SettingError, match="did you mean 'workers'"):
        read_setting(digits, "worker", "1", also=["workers"])
