"""Sweeps: Ray Tune draws settings of a recipe function, each trial trains in a process of its own on data prepared once."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from cluster.ahead import features_ahead
from cluster.places import places
from cluster.recording import ONLY_WHAT_ALWAYS_IS, Recording
from cluster.runs import Run, finish_run, new_run_folder, write_run
from cluster.runtime import check_resources, start_ray
from cluster.schedulers import PAUSING, check_words, drawn_at_once
from cluster.space import AroundLrFind, around_suggestion, candidates, ranges, space_words
from cluster.spool import ORDER, SPOOL, name_in
from cluster.swept import Swept, space_text
from cluster.tracking import Tracker, start_run
from cluster.train import ending, new_learner, none_left_open, prepared_data, record_data, record_model, tags_of
from cluster.trial import TrialOf
from cluster.tuning import Search, run_trials
from cluster.workers import Workers
from training.learner import Learner
from training.recipe import RecipeFunction, checked

TRIALS = 8
Say = Callable[[str], None]


def sweep(
    make: RecipeFunction,
    space: Mapping[str, Any],
    *,
    trials: int | None = None,
    scheduler: str = "asha",
    search: str = "random",
    workers: int = 1,
    recording: Recording = ONLY_WHAT_ALWAYS_IS,
    say: Say = print,
) -> Swept:
    """Train draws of `space` over the settings of the recipe function `make`; values in it are fixed settings.

    trials: how many, 8 by default; a grid search has one for each combination. scheduler: "none", "asha", "median",
    "hyperband" or "pbt"; search: "random", "grid" or "optuna" (`cluster.schedulers` says what they do). workers: of each
    trial; one trains in the trial's process, several are Ray Train's. Data is prepared once, before the first trial. The
    recipe's seed draws the same again; Optuna and population-based training also depend on which trial ends first.
    UserError when a space is not one of the recipe's settings' values, or words do not go together.
    """
    check_words(scheduler, search, space, trials, workers)
    values = _check(make, space)
    folder = Path(new_run_folder(places().storage, f"{make.__name__}-sweep"))
    return _swept(make, dict(space), values, trials or TRIALS, scheduler, search, workers, recording, folder, say)


def resume_sweep(
    folder: Path,
    make: RecipeFunction,
    space: Mapping[str, Any],
    *,
    trials: int,
    scheduler: str,
    search: str,
    workers: int,
    recording: Recording = ONLY_WHAT_ALWAYS_IS,
    say: Say = print,
) -> Swept:
    """Go on with the sweep in `folder`, which was broken off: trials that are over are not run again, the others anew.

    The rest: what the sweep was begun with, as its `run.json` says.
    """
    values = _check(make, space)
    return _swept(make, dict(space), values, trials, scheduler, search, workers, recording, folder.absolute(), say)


def _swept(
    make: RecipeFunction,
    spaces: dict[str, Any],
    values: dict[str, list[Any]],
    trials: int,
    scheduler: str,
    search: str,
    workers: int,
    recording: Recording,
    folder: Path,
    say: Say,
) -> Swept:
    began = time.perf_counter()
    first = make(**{name: some[0] for name, some in values.items()})
    epochs = _most_epochs(make, values)
    spool = folder / SPOOL
    run = name_in(spool) or folder.name  # a copy of the folder may have another name
    busy = run if recording.system_metrics else ""
    with Tracker(spool, places().tracking, first.name, system_metrics_of=busy) as tracker, none_left_open(spool):
        start_ray()
        check_resources(
            workers, Workers.asked(workers).gpu, asked=f"a trial of {workers} worker{'s' * (workers != 1)}", say=say
        )
        dls = _prepared_once(make, spaces, values, say)
        choices = {name: some for name, some in values.items() if not ranges(spaces[name])}
        features_ahead(make, {name: some[0] for name, some in values.items()}, choices)
        learn = new_learner(first, dls)
        metric, mode = _target(learn)
        spaces = _around_lr_find(spaces, learn, say)
        number = trials if search == "optuna" else len(drawn_at_once(spaces, search, trials, first.seed))
        tracker.opened(say)
        recording.check()
        runner = {"trials": trials, "scheduler": scheduler, "search": search, "workers": workers}
        write_run(folder, Run("sweep", first.found_as, space_text(spaces), runner | asdict(recording)))
        params = {"recipe": first.name, **first.settings, **space_text(spaces), **runner}
        start_run(spool, run, run, params, tags=tags_of(dls) | {"fastray.sweep": run, ORDER: f"{metric} {mode}"})
        with ending(spool, run):
            record_data(spool, run, folder, dls)
            say(f"sweep: {number} trials, {metric} decides, search {search}, scheduler {scheduler}")
            trial = TrialOf(make, spaces, resumes=scheduler in PAUSING, workers=workers, folder=folder, cache=places().cache)
            found = run_trials(Search(trial, scheduler, search, trials, metric, mode, epochs, first.seed, folder, run), say)
            swept = Swept(
                metric=metric,
                mode=mode,
                trials=tuple(sorted(found, key=lambda t: t.rank(mode))),
                make=make,
                space=spaces,
                folder=folder,
                seconds=0.0,
            )
            export = _export_best(swept, run, recording, say)
        finish_run(folder)
    return replace(
        swept,
        run_id=tracker.run_id(run),
        model_uri=tracker.model_uri(run),
        registered=tracker.registered(run),
        export=export,
        seconds=time.perf_counter() - began,
        trouble=tracker.trouble,
    )


def _export_best(swept: Swept, run: str, recording: Recording, say: Say) -> Path | None:
    # A model that cannot be exported costs nobody a whole sweep.
    try:
        return record_model(swept.folder / SPOOL, run, swept.folder, swept.best_learner(), recording)
    except ValueError as error:
        say(f"model: the best trial's is not exported: {error}")
        return None


# --- before the first trial ------------------------------------------------------------------------------------------------


def _check(make: RecipeFunction, space: Mapping[str, Any]) -> dict[str, list[Any]]:
    # Every value a choice can take and some of every range, checked against the recipe before anything starts.
    found = {name: [checked(make, name, value) for value in candidates(given)] for name, given in space.items()}
    for name, values in found.items():
        for value in values:
            make(**{name: value})
    return found


def _most_epochs(make: RecipeFunction, values: Mapping[str, list[Any]]) -> int:
    # Of the longest trial: the schedule is not the one setting that may say it.
    base = {name: some[0] for name, some in values.items()}
    each = [base, *({**base, name: value} for name, some in values.items() for value in some)]
    return max(make(**settings).epochs for settings in each)


def _around_lr_find(spaces: dict[str, Any], learn: Learner, say: Say) -> dict[str, Any]:
    # Where lr_find says the rates are: run once, on the first trial's Learner.
    if not any(isinstance(s, AroundLrFind) for space in spaces.values() for s in ranges(space)):
        return spaces
    suggestion = learn.lr_find().suggestions["valley"]
    found = {name: around_suggestion(space, suggestion) for name, space in spaces.items()}
    changed = " ".join(f"{name}={space_words(s)}" for name, s in found.items() if s != spaces[name])
    say(f"lr_find: suggests {suggestion:.4g}, so {changed}")
    return found


def _prepared_once(make: RecipeFunction, space: Mapping[str, Any], candidates: dict[str, list[Any]], say: Say) -> DataLoaders:
    # Each different plan is prepared before the first trial: inside one it would wait for CPUs that the trials hold.
    base = {name: values[0] for name, values in candidates.items()}
    changing = {name: values for name, values in candidates.items() if len({_plan(make, base, name, v) for v in values}) > 1}
    for name in changing:
        if ranges(space[name]):
            raise UserError(
                f"{name} changes how the data is prepared, so it is a choice(...) or grid(...) of values, "
                f"not {space_words(space[name])}"
            )
    found: dict[str, DataLoaders] = {}
    for values in itertools.product(*changing.values()):
        recipe = make(**base | dict(zip(changing, values, strict=True)))
        block, source = recipe.data()
        plan = block.plan(source)
        if plan.unkept:
            raise UserError(f"the trials of a sweep share prepared data, which cannot be recognised here: {plan.unkept}")
        if plan.fingerprint not in found:
            found[plan.fingerprint] = prepared_data(recipe, on_ray=True, say=say)
    if len(found) > 1:
        say(f"data: {len(found)} prepared data sets for the settings to choose from")
    return next(iter(found.values()))


def _plan(make: RecipeFunction, base: Mapping[str, Any], name: str, value: Any) -> str:
    block, source = make(**{**base, name: value}).data()
    return block.plan(source).fingerprint


def _target(learn: Learner) -> tuple[str, str]:
    # What decides which trial is better: the first metric, or else the validation loss.
    if not learn.metrics:
        return "valid/loss", "min"
    return f"valid/{learn.metrics[0].name}", "max" if learn.metrics[0].higher_is_better else "min"
