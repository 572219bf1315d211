"""Search spaces as values: their words, what is drawn of them, and settings made of draws."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.space import (
    NAMES,
    Call,
    Choice,
    Grid,
    LogUniform,
    Uniform,
    around_lr_find,
    call,
    candidates,
    choice,
    draws_of,
    grid,
    loguniform,
    ranges,
    settled,
    space_words,
    uniform,
)
from training.expressions import read_expression
from training.schedule import fine_tune, flat, one_cycle

numbers = st.floats(1e-9, 1e9)
steps = st.integers(1, 9)
schedules = st.one_of(steps.map(one_cycle), steps.map(flat), steps.map(fine_tune))
plain = st.one_of(st.integers(-99, 99), numbers, st.text(max_size=9), st.booleans(), st.none(), schedules)
bounds = st.lists(numbers, min_size=2, max_size=2, unique=True).map(sorted)
flat_spaces = st.one_of(bounds.map(lambda b: loguniform(*b)), bounds.map(lambda b: uniform(*b)))
few_steps = st.lists(steps, min_size=1, max_size=3).map(lambda s: choice(*s))
calls = st.one_of(
    few_steps.map(lambda s: call(one_cycle, s)),
    st.tuples(steps, few_steps).map(lambda s: call(fine_tune, s[0], freeze_epochs=s[1])),
)
spaces = st.recursive(
    st.one_of(flat_spaces, calls, st.just(around_lr_find(3.0))),
    lambda inner: st.one_of(
        st.lists(st.one_of(plain, inner), min_size=1, max_size=3).map(lambda o: choice(*o)),
        st.lists(plain, min_size=1, max_size=3).map(lambda o: grid(*o)),
    ),
    max_leaves=6,
)


@given(spaces)
@settings(deadline=None, max_examples=100)
def test_a_space_is_read_back_from_its_words(space: Any) -> None:
    again = read_expression(space_words(space), NAMES)
    assert again == space
    assert space_words(again) == space_words(space)
    assert hash(again) == hash(space)


@given(spaces.filter(lambda s: "around_lr_find" not in space_words(s)), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_a_draw_settles_to_a_candidate_or_within_a_range(space: Any, random: Any) -> None:
    def number(path: str, space: Any) -> float:
        return random.choice([space.low, space.high])

    for draws in draws_of({"x": space}, lambda path, c: [random.randrange(len(c.options))], number):
        assert settled({"x": space}, draws)["x"] in candidates(space)


def test_what_lies_in_an_option_is_drawn_only_where_the_option_is() -> None:
    schedule = choice(call(one_cycle, choice(2, 5)), call(fine_tune, 4, freeze_epochs=choice(1, 2)), flat(3))
    everything = list(draws_of({"schedule": schedule}, lambda path, c: range(len(c.options)), pytest.fail))
    assert everything == [
        {"schedule": 0, "schedule.0.0": 0},
        {"schedule": 0, "schedule.0.0": 1},
        {"schedule": 1, "schedule.1.freeze_epochs": 0},
        {"schedule": 1, "schedule.1.freeze_epochs": 1},
        {"schedule": 2},
    ]
    made = [settled({"schedule": schedule}, d)["schedule"] for d in everything]
    assert made == [one_cycle(2), one_cycle(5), fine_tune(4), fine_tune(4, freeze_epochs=2), flat(3)] == candidates(schedule)


def test_several_settings_make_every_combination() -> None:
    space = {"a": grid(1, 2), "b": choice(3, 4), "c": 5}
    drawn = [settled(space, d) for d in draws_of(space, lambda path, c: range(len(c.options)), pytest.fail)]
    assert drawn == [{"a": a, "b": b, "c": 5} for a, b in itertools.product((1, 2), (3, 4))]


def test_the_command_line_writes_spaces_in_a_schedules_arguments() -> None:
    words = "choice(one_cycle(choice(2, 5)), fine_tune(4, freeze_epochs=choice(1, 2)), one_cycle(3))"
    expected = choice(call(one_cycle, choice(2, 5)), call(fine_tune, 4, freeze_epochs=choice(1, 2)), one_cycle(3))
    assert read_expression(words, NAMES) == expected


def test_a_misspelled_argument_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="freeze_epoch"):
        read_expression("fine_tune(4, freeze_epoch=choice(1, 2))", NAMES)
    with pytest.raises(TypeError, match="freeze_epoch"):
        call(fine_tune, 4, freeze_epoch=choice(1, 2))


def test_ranges_are_found_wherever_they_lie() -> None:
    inner = uniform(0.1, 0.9)
    assert ranges(choice(1, call(one_cycle, 2, pct_start=inner))) == [inner]
    assert ranges(grid(1, 2)) == ranges(3) == []


def test_each_name_makes_its_own_kind() -> None:
    made = (loguniform(1, 2), uniform(1, 2), choice(1), grid(1), call(flat, choice(1)))
    assert [type(s) for s in made] == [LogUniform, Uniform, Choice, Grid, Call]


def test_rates_around_a_suggestion() -> None:
    assert around_lr_find(10).around(0.01) == loguniform(0.001, 0.1)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: loguniform(0, 1),
        lambda: loguniform(2, 1),
        lambda: loguniform(1, float("inf")),
        lambda: uniform(1, 1),
        lambda: uniform(float("nan"), 1),
        lambda: around_lr_find(1),
        choice,
        grid,
    ],
)
def test_impossible_spaces_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"loguniform|uniform|at least one value|above 1"):
        bad()
