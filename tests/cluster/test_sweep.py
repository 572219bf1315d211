"""What a sweep checks and prepares before its first trial, what it remembers, and how its result is shown."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocks.errors import UserError
from cluster import around_lr_find, call, choice, grid, loguniform, sweep, uniform
from cluster.live import LiveTable
from cluster.runtime import SETTINGS, start_ray
from cluster.schedulers import Before, check_words, drawn_at_once, mutations, searched, tune_scheduler
from cluster.space import settled
from cluster.sweep import _around_lr_find, _check, _most_epochs, _prepared_once
from cluster.swept import Swept, Trial
from cluster.train import new_learner
from cluster.trial import TrialOf
from cluster.tuning import TRIALS, Memory, Search, make_watch
from pipelines import digits
from training.recipe import SettingError
from training.schedule import fine_tune, flat, one_cycle

from .toy import toy

# Ray's, where the machine is so busy that Optuna takes a second to draw.
pytestmark = pytest.mark.filterwarnings("ignore:Define-by-run function passed")


def trial(score: float, ended: str = "finished", **more: Any) -> Trial:
    return Trial(number=3, drawn={"lr": score}, fixed={"path": "a b"}, score=score, epochs=1, ended=ended, **more)


def test_what_failed_or_has_no_score_comes_last() -> None:
    trials = [trial(0.5), trial(math.nan), trial(0.99, "failed"), trial(0.9, "stopped"), trial(0.7)]
    assert [t.score for t in sorted(trials, key=lambda t: t.rank("max"))[:3]] == [0.9, 0.7, 0.5]
    assert [t.score for t in sorted(trials, key=lambda t: t.rank("min"))[:3]] == [0.5, 0.7, 0.9]


def test_the_next_command_has_the_fixed_settings_too() -> None:
    assert trial(0.5).words() == {"path": "a b", "lr": "0.5"}


# --- words -----------------------------------------------------------------------------------------------------------------


def test_a_range_for_a_whole_number_is_refused_before_anything_starts() -> None:
    with pytest.raises(SettingError, match="batch_size"):
        sweep(digits, {"batch_size": uniform(16, 64)}, trials=1)


def test_a_value_deep_in_a_space_is_checked_as_well() -> None:
    with pytest.raises(SettingError, match="arch"):
        sweep(digits, {"arch": choice("resnet18", choice("resnet34", 1.5))}, trials=1)


def test_unknown_settings_and_no_trials() -> None:
    with pytest.raises(SettingError, match="no setting 'lrr'"):
        sweep(digits, {"lrr": choice(1)}, trials=1)
    with pytest.raises(UserError, match="trials=0"):
        sweep(digits, {}, trials=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scheduler": "ashe"}, "no scheduler 'ashe': did you mean 'asha'"),
        ({"search": "optune"}, "no search 'optune': did you mean 'optuna'"),
        ({"scheduler": "pbt", "search": "optuna"}, "leave search=optuna out"),
        ({"scheduler": "pbt", "search": "grid"}, "leave search=grid out"),
        ({"scheduler": "pbt", "space": {"schedule": choice(flat(1), flat(2))}}, "give at least one of them a space"),
        ({"scheduler": "pbt", "space": {"lr": choice(choice(1.0), 2.0)}}, "a range or a choice of numbers"),
        ({"scheduler": "pbt", "trials": 1}, "trials=2 or more"),
        ({"workers": 0}, "one process of its own"),
        ({"workers": 2, "scheduler": "hyperband"}, "needs workers=1"),
        ({"search": "grid"}, r"lr=loguniform\(0.001, 0.1\) has no end"),
        ({"search": "grid", "space": {"lr": choice(1.0, 2.0)}, "trials": 4}, "leave trials out"),
        ({"search": "optuna", "space": {"lr": grid(1.0, 2.0)}}, "write choice"),
        ({"search": "optuna", "space": {"schedule": choice(call(flat, grid(1, 2)))}}, "write choice"),
    ],
)
def test_words_that_do_not_go_together_are_one_clear_error(words: dict[str, Any], message: str) -> None:
    space = words.pop("space", {"lr": loguniform(1e-3, 0.1)})
    with pytest.raises(UserError, match=message):
        sweep(toy, space, **words)


def test_words_that_go_together_pass() -> None:
    for scheduler in ("none", "asha", "median", "hyperband"):
        for search in ("random", "optuna"):
            check_words(scheduler, search, {"lr": loguniform(1e-3, 0.1)}, 4)
    check_words("pbt", "random", {"lr": loguniform(1e-3, 0.1), "wd": choice(0.0, 0.1), "schedule": choice(flat(1))}, None)
    check_words("asha", "grid", {"lr": choice(1e-3, 0.1), "schedule": grid(flat(1), flat(2))}, None)


def test_the_longest_trial_is_known_whichever_setting_says_it() -> None:
    from dataclasses import replace

    from training import Recipe, recipe

    @recipe
    def long(*, epochs: int = 3, wd: float = 0.1) -> Recipe:
        """Its epochs are a setting of their own."""
        return replace(toy(), schedule=flat(epochs))

    assert _most_epochs(long, _check(long, {"epochs": choice(2, 6, 4)})) == 6
    assert _most_epochs(long, _check(long, {"wd": 0.2})) == 3
    assert _most_epochs(toy, _check(toy, {"schedule": choice(flat(2), one_cycle(5))})) == 5


# --- draws -----------------------------------------------------------------------------------------------------------------

SPACE = {"lr": loguniform(1e-3, 0.1), "schedule": choice(call(flat, choice(3, 4)), one_cycle(3), call(fine_tune, 1))}


def test_a_seed_draws_the_same_again() -> None:
    assert drawn_at_once(SPACE, "random", 20, seed=1) == drawn_at_once(SPACE, "random", 20, seed=1)
    assert drawn_at_once(SPACE, "random", 20, seed=1) != drawn_at_once(SPACE, "random", 20, seed=2)


def test_a_random_search_takes_each_value_of_a_grid_in_turn() -> None:
    draws = drawn_at_once({"size": grid(8, 10), "lr": loguniform(1e-3, 0.1)}, "random", 3, seed=1)
    assert [d["size"] for d in draws] == [0, 1] * 3
    assert len({d["lr"] for d in draws}) == 6


def test_a_grid_search_takes_every_combination_once() -> None:
    space = {"lr": choice(0.1, 0.2), "schedule": choice(call(flat, choice(3, 4)), one_cycle(3))}
    made = [settled(space, d) for d in drawn_at_once(space, "grid", 8, seed=1)]
    assert made == [{"lr": lr, "schedule": s} for lr in (0.1, 0.2) for s in (flat(3), flat(4), one_cycle(3))]


def optuna_draws(before: Before, trials: int, seed: int = 3) -> list[dict[str, Any]]:
    algorithm, _, samples = searched(SPACE, "optuna", trials, seed, "score", "max", before)
    draws = []
    for n in range(samples):
        drawn = algorithm.suggest(f"t{n}")["trial"]
        draws.append(drawn)
        algorithm.on_trial_complete(f"t{n}", {"score": -abs(math.log(drawn["draws"]["lr"] / 0.01))})
    return draws


def test_optuna_draws_within_the_branch_it_takes_and_the_same_again() -> None:
    draws = optuna_draws(Before(), 20)
    assert [d["number"] for d in draws] == list(range(20))
    for d in draws:
        assert ("schedule.0.0" in d["draws"]) == (d["draws"]["schedule"] == 0)
        settled(SPACE, d["draws"])
    assert draws == optuna_draws(Before(), 20)
    assert draws != optuna_draws(Before(), 20, seed=4)


def test_optuna_learns_from_what_was_drawn() -> None:
    late = [abs(math.log10(d["draws"]["lr"] / 0.01)) for d in optuna_draws(Before(), 60)[40:]]
    assert sum(late) / len(late) < 0.3  # 0.5 by chance


def test_optuna_goes_on_with_what_it_knew_and_what_was_begun() -> None:
    first = optuna_draws(Before(), 12)
    scored = [(d["draws"], 1.0 - n / 20) for n, d in enumerate(first[:10])]
    begun = {d["number"]: d["draws"] for d in first[10:]}
    rest = optuna_draws(Before(scored, begun, over=frozenset(range(10)) - {4}), 15)  # 4 was to begin after 10 and 11
    assert [d["number"] for d in rest] == [10, 11, 4, 12, 13, 14]
    assert [d["draws"] for d in rest[:2]] == [d["draws"] for d in first[10:]]
    known = [json.dumps(d["draws"]) for d in first]
    assert not {json.dumps(d["draws"]) for d in rest[2:]} & set(known)


def test_a_random_search_goes_on_with_what_was_begun_and_what_was_not() -> None:
    everything = drawn_at_once(SPACE, "random", 6, seed=1)
    # 1 and 4 had not begun: trials do not begin in the order of their numbers.
    before = Before([(everything[n], 0.5) for n in (0, 2)], {3: everything[3]}, over=frozenset({0, 2}))
    _, space, samples = searched(SPACE, "random", 6, 1, "score", "max", before)
    assert samples == 1
    assert searched(SPACE, "random", 6, 1, "score", "max", before, at_once=2)[0].max_concurrent == 2
    assert space["trial"]["grid_search"] == [{"number": n, "draws": everything[n]} for n in (1, 3, 4, 5)]


def test_population_based_training_stays_within_the_spaces_and_mutates_nothing_else() -> None:
    space = {"lr": loguniform(1e-3, 0.1), "wd": choice(0.0, 0.1), "schedule": choice(flat(1), flat(2))}
    assert set(mutations(space)) == {"lr", "wd"}
    explore = tune_scheduler("pbt", space, 5)._custom_explore_fn
    config = {"trial": {"number": 1, "draws": {"lr": 0.12, "wd": 1, "schedule": 0}}}
    assert explore(config)["trial"]["draws"] == {"lr": 0.1, "wd": 1, "schedule": 0}


# --- memory ----------------------------------------------------------------------------------------------------------------


def search_in(folder: Path, **more: Any) -> Search:
    shared = TrialOf(toy, SPACE | {"batch_size": 30}, resumes=False, workers=1, folder=folder, cache="")
    given = {"scheduler": "asha", "search": "random", "trials": 4, "metric": "valid/accuracy", "mode": "max"}
    return Search(shared, **given, epochs=4, seed=7, folder=folder, run="toy", **more)  # type: ignore[arg-type]


def test_what_ended_is_known_again_and_what_was_begun_is_drawn_again(tmp_path: Path) -> None:
    draws = drawn_at_once(SPACE, "random", 4, seed=7)
    memory = Memory(search_in(tmp_path))
    for number in range(3):
        memory.begin(number, draws[number])
    memory.epoch(0, draws[0], {"epoch": 0, "valid/accuracy": 0.25})
    memory.epoch(0, draws[0], {"epoch": 1, "valid/accuracy": 0.5})
    state = tmp_path / "state"
    state.mkdir()
    ended = memory.end(0, "finished", state)
    failed = memory.end(1, "failed", error=KeyError("lost"))
    again = Memory(search_in(tmp_path))
    assert again.trials[0] == ended
    assert again.trials[1].error == failed.error == "KeyError: 'lost'"
    assert again.trials[1].error_file is not None
    assert "lost" in again.trials[1].error_file.read_text()
    assert again.before() == Before([(draws[0], 0.5)], {2: draws[2]}, over=frozenset({0, 1}))
    assert ended.fixed == {"batch_size": 30}


def test_an_epoch_has_the_settings_it_was_trained_with(tmp_path: Path) -> None:
    """Where the scheduler has it take over another trial's at the same moment, those are for the epochs to come."""
    mine, others = drawn_at_once(SPACE, "random", 2, seed=7)
    search = search_in(tmp_path)
    memory, said = Memory(search), list[str]()
    watch = make_watch(search, memory, LiveTable("valid/accuracy", "max", said.append))
    ray_trial = SimpleNamespace(trial_id="t", config={"trial": {"number": 0, "draws": mine}})
    watch.on_trial_start(1, [ray_trial], ray_trial)
    ray_trial.config = {"trial": {"number": 1, "draws": others}}
    result = {"epoch": 0, "valid/accuracy": 0.5, "config": {"trial": {"number": 0, "draws": mine}}}
    watch.on_trial_result(1, [ray_trial], ray_trial, result)
    assert memory.draws == {0: mine}
    assert memory.trials[0].drawn == settled(SPACE, mine)


def test_a_line_that_was_cut_short_is_no_trial(tmp_path: Path) -> None:
    memory = Memory(search_in(tmp_path))
    memory.begin(0, drawn_at_once(SPACE, "random", 1, seed=7)[0])
    with (tmp_path / TRIALS).open("a") as file:
        file.write('{"trial": 0, "ended"')
    assert Memory(search_in(tmp_path)).before().begun.keys() == {0}


def test_only_the_best_states_are_kept(tmp_path: Path) -> None:
    draws = drawn_at_once(SPACE, "random", 5, seed=7)
    memory = Memory(search_in(tmp_path))
    for number, score in enumerate((0.5, 0.9, 0.1, 0.7, 0.8)):
        state = tmp_path / f"state{number}"
        state.mkdir()
        memory.begin(number, draws[number])
        memory.epoch(number, draws[number], {"epoch": 0, "valid/accuracy": score})
        memory.end(number, "finished", state)
    assert sorted(p.name for p in tmp_path.glob("state*")) == ["state1", "state3", "state4"]
    assert [t.state is not None for t in memory.trials.values()] == [False, True, False, True, True]


def test_a_state_that_the_best_trial_left_as_well_is_kept(tmp_path: Path) -> None:
    """In population-based training one trial may end with another's last state."""
    draws = drawn_at_once(SPACE, "random", 5, seed=7)
    memory = Memory(search_in(tmp_path))
    for number, score in enumerate((0.9, 0.8, 0.7, 0.1)):
        state = tmp_path / f"state{number % 3}"
        state.mkdir(exist_ok=True)
        memory.begin(number, draws[number])
        memory.epoch(number, draws[number], {"epoch": 0, "valid/accuracy": score})
        memory.end(number, "finished", state)
    assert sorted(p.name for p in tmp_path.glob("state*")) == ["state0", "state1", "state2"]
    assert [t.state is not None for t in memory.trials.values()] == [True, True, True, False]


# --- the result ------------------------------------------------------------------------------------------------------------


def swept() -> Swept:
    curve = [{"epoch": e, "valid/accuracy": 0.1 * e, "hp/lr": 1e-3} for e in range(3)]
    trials = (
        Trial(0, {"lr": 0.01, "schedule": one_cycle(3)}, {}, 0.2, 3, "finished", history=curve),
        Trial(2, {"lr": 0.1, "schedule": flat(3)}, {}, 0.1, 2, "stopped", history=curve[:2]),
        Trial(1, {"lr": 1.0, "schedule": flat(3)}, {}, math.nan, 0, "failed", error="KeyError: '<x>' (a.py:3)"),
    )
    return Swept("valid/accuracy", "max", trials, toy, SPACE, Path("/nowhere"), 1.0)


def test_tables() -> None:
    lines = swept().table().splitlines()
    assert lines[0].split() == ["trial", "valid/accuracy", "epochs", "ended", "settings"]
    assert lines[1].split() == ["0000", "0.2000", "3", "finished", "lr=0.01", "schedule=one_cycle(3)"]
    assert lines[3].endswith("KeyError: '<x>' (a.py:3)")
    page = swept()._repr_html_()
    assert page.count("<tr>") == 4
    assert "<th>lr</th>" in page
    assert "&lt;x&gt;" in page
    frame = swept().dataframe()
    assert frame["trial"].tolist() == ["0000", "0002", "0001"]
    assert frame["valid/accuracy"].tolist()[:2] == [0.2, 0.1]
    assert frame["schedule"].tolist() == ["one_cycle(3)", "flat(3)", "flat(3)"]
    assert frame["hp/lr"].tolist()[0] == 1e-3


def test_figures(tmp_path: Path) -> None:
    from dataclasses import replace

    parallel, settings, curves = swept().plot_parallel(), swept().plot_settings(), swept().plot_curves()
    for number, figure in enumerate((parallel, settings, curves)):
        figure.savefig(tmp_path / f"{number}.png")
    assert len([line for line in parallel.axes[0].lines if len(line.get_xdata()) == 3]) == 2  # what failed is left out
    assert [axes.get_xlabel() for axes in settings.axes] == ["lr", "schedule"]
    assert settings.axes[0].get_xscale() == "log"
    assert curves.axes[0].lines[0].get_ydata().tolist() == [0.0, 0.1, 0.2]
    nothing = replace(swept(), trials=swept().trials[2:])
    for figure in (nothing.plot_parallel(), nothing.plot_settings(), nothing.plot_curves()):
        figure.savefig(tmp_path / "nothing.png")


def test_a_trial_without_weights_has_no_learner() -> None:
    with pytest.raises(ValueError, match="trial 0000, which finished, has left no weights"):
        swept().best_learner()


# --- Ray -------------------------------------------------------------------------------------------------------------------


def test_settings_hold_where_a_script_has_started_ray_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Tune takes Ctrl-C for itself, and the sweep looks like one that ended."""
    monkeypatch.setattr("cluster.runtime._start", None)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    start_ray()
    assert {name: os.environ.get(name) for name in SETTINGS} == SETTINGS


# --- data ------------------------------------------------------------------------------------------------------------------


def test_rates_lie_around_what_lr_find_suggests(few_digits: Path) -> None:
    made, said = toy(path=str(few_digits)), list[str]()
    block, source = made.data()
    learn = new_learner(made, block.dataloaders(source, **made.data_settings))
    found = _around_lr_find({"lr": around_lr_find(5), "wd": 0.1}, learn, said.append)["lr"]
    assert found.high / found.low == pytest.approx(25)
    assert 1e-5 < found.low < found.high < 10
    assert said[0].startswith("lr_find: suggests")
    assert _around_lr_find({"lr": 0.1}, learn, pytest.fail) == {"lr": 0.1}
    inner = _around_lr_find({"lr": choice(around_lr_find(), 0.5)}, learn, said.append)["lr"]
    assert inner.options[0].high / inner.options[0].low == pytest.approx(100)
    assert inner.options[1] == 0.5


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


def test_augmentation_and_rates_change_no_data() -> None:
    space = {"augment": choice("none", "standard"), "wd": loguniform(1e-3, 0.1), "lr": around_lr_find()}
    made = [digits(**{name: value}) for name, values in _check(digits, space).items() for value in values]
    assert len({recipe.block.plan(recipe.located()).fingerprint for recipe in made}) == 1
