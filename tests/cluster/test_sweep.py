"""What a sweep checks and prepares before its first trial, and how trials are ranked.."""

import math

import pytest

from blocks.errors import UserError
from cluster import choice, loguniform, sweep, uniform
from cluster.sweep import Trial, _check, _prepared_once
from pipelines import digits
from training.recipe import SettingError


def trial(score: float, ended: str = "finished") -> Trial:
    return Trial(drawn={"lr": score}, fixed={"path": "a b"}, score=score, epochs=1, ended=ended)


def test_what_failed_or_has_no_score_comes_last() -> None:
    trials = [trial(0.5), trial(math.nan), trial(0.99, "failed"), trial(0.9, "stopped"), trial(0.7)]
    assert [t.score for t in sorted(trials, key=lambda t: t.rank("max"))[:3]] == [0.9, 0.7, 0.5]
    assert [t.score for t in sorted(trials, key=lambda t: t.rank("min"))[:3]] == [0.5, 0.7, 0.9]


def test_the_next_command_has_the_fixed_settings_too() -> None:
    assert trial(0.5).words() == {"path": "a b", "lr": "0.5"}


def test_a_range_for_a_whole_number_is_refused_before_anything_starts() -> None:
    with pytest.raises(SettingError, match="batch_size"):
        sweep(digits, {"batch_size": uniform(16, 64)}, trials=1)


def test_a_range_of_what_changes_the_data_is_refused(ray_running: None) -> None:
    import functools

    from training import Recipe, recipe

    @recipe
    def shares(*, share: float = 0.2) -> Recipe:
        """The share that validates changes the data."""
        from dataclasses import replace

        from blocks import RandomSplitter

        made = digits()
        return replace(made, block=replace(made.block, splitter=RandomSplitter(share, seed=1)))

    space = {"share": uniform(0.1, 0.3)}
    with pytest.raises(UserError, match=r"share changes how the data is prepared, so it is a choice.* not uniform\(0.1, 0.3\)"):
        _prepared_once(shares, space, _check(shares, space), functools.partial(print))


def test_every_combination_of_what_changes_the_data_is_prepared(ray_running: None) -> None:
    said: list[str] = []
    space = {"size": choice(8, 10), "lr": loguniform(1e-3, 1e-2), "arch": choice("resnet18", "resnet34")}
    _prepared_once(digits, space, _check(digits, space), said.append)
    assert sum("files decoded" in line for line in said) == 2
    assert said[-1] == "data: 2 prepared data sets for the settings to choose from"


def test_unknown_settings_and_no_trials() -> None:
    with pytest.raises(SettingError, match="no setting 'lrr'"):
        sweep(digits, {"lrr": choice(1)}, trials=1)
    with pytest.raises(UserError, match="trials=0"):
        sweep(digits, {}, trials=0)
