"""Sweeps: Ray Tune draws settings of a recipe function, each trial trains in a process of its own on data prepared once."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch

from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from cluster.places import places
from cluster.runtime import check_resources, start_ray
from cluster.space import Choice, Grid, LogUniform, Space, Uniform, space_words
from cluster.spool import append, append_epoch
from cluster.tracking import Tracker, start_run
from cluster.train import ending, new_learner, new_run_folder, prepared_data, record_data, tags_of
from training.callback import Callback
from training.callbacks import Progress
from training.learner import Learner
from training.recipe import Recipe, RecipeFunction, SettingError, checked, did_you_mean
from training.schedule import as_words, total_epochs

SCHEDULERS = ("none", "asha")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One trial: the settings it drew, its last score, how many epochs it trained, and how it ended."""

    drawn: dict[str, Any]
    score: float
    epochs: int
    ended: str

    def words(self) -> dict[str, str]:
        """The drawn settings as the command line takes them."""
        return {key: as_words(value) for key, value in self.drawn.items()}

    def describe(self) -> str:
        """The drawn settings for reading: numbers in four digits."""
        return described(self.drawn)


@dataclass(frozen=True)
class Swept:
    """What a sweep left: its trials, best first, and MLflow's id of the parent run."""

    recipe: str
    metric: str
    trials: tuple[Trial, ...]
    run_id: str | None
    folder: Path
    seconds: float
    trouble: str | None

    def table(self) -> str:
        """The trials as text, best first."""
        lines = [f"{self.metric:>14}  epochs  ended       settings"]
        lines += [f"{t.score:14.4f}  {t.epochs:6d}  {t.ended:<10}  {t.describe()}" for t in self.trials]
        return "\n".join(lines)


def sweep(
    make: RecipeFunction,
    space: Mapping[str, Any],
    *,
    trials: int = 8,
    scheduler: str = "asha",
    say: Say = print,
) -> Swept:
    """Train `trials` draws of `space` over the settings of the recipe function `make`; values in it are fixed settings.

    scheduler: "asha" stops trials that fall behind (Li et al., arXiv:1810.05934), "none" lets all finish. Data is
    prepared once, before the first trial. UserError when a space is not one of the recipe's settings' values.
    """
    if trials < 1:
        raise UserError(f"trials={trials}: a sweep has at least one")
    if scheduler not in SCHEDULERS:
        raise SettingError(f"there is no scheduler {scheduler!r}{did_you_mean(scheduler, SCHEDULERS)}")
    began = time.perf_counter()
    recipes = _drawn_at_the_ends(make, space)
    first = recipes[0]
    folder = new_run_folder(f"{first.name}-sweep")
    spool, run = folder / "spool.jsonl", folder.name
    with Tracker(spool, places().tracking, experiment=first.name) as tracker:
        start_ray()
        check_resources(CPU=1)
        dls = _prepared_once(recipes, say)
        metric, mode = _target(new_learner(first, dls))
        tracker.opened()
        texts = {key: space_words(value) for key, value in {**first.settings, **space}.items()}
        tags = tags_of(dls) | {"fastray.sweep": run}
        start_run(spool, run, run, {"recipe": first.name, **texts, "trials": trials, "scheduler": scheduler}, tags=tags)
        with ending(spool, run):
            record_data(spool, run, folder, dls)
            say(f"sweep: {trials} trials, {metric} decides, scheduler {scheduler}")
            found = _run_trials(make, space, trials, scheduler, metric, mode, folder, say, max(r.epochs for r in recipes))
    return Swept(
        recipe=first.name,
        metric=metric,
        trials=tuple(sorted(found, key=lambda t: t.score, reverse=mode == "max")),
        run_id=tracker.run_id(run),
        folder=folder,
        seconds=time.perf_counter() - began,
        trouble=tracker.trouble,
    )


def described(drawn: Mapping[str, Any]) -> str:
    """Drawn settings for reading: numbers in four digits."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={as_words(v)}" for k, v in drawn.items())


# --- the space ---------------------------------------------------------------------------------------------------------


def _drawn_at_the_ends(make: RecipeFunction, space: Mapping[str, Any]) -> list[Recipe]:
    # Recipes that hold every value a choice can take and the ends of every range: each is checked against the recipe
    # before anything starts, and their plans tell which settings change the data.
    candidates = {name: [checked(make, name, value) for value in _ends(given)] for name, given in space.items()}
    base = {name: values[0] for name, values in candidates.items()}
    recipes = [make(**base)]
    recipes += [make(**base | {name: value}) for name, values in candidates.items() for value in values[1:]]
    return recipes


def _ends(given: Any) -> Sequence[Any]:
    match given:
        case Choice(options):
            return options
        case LogUniform(low, high) | Uniform(low, high):
            return (low, high)
    return (given,)


def _for_tune(given: Any) -> Any:
    from ray import tune

    if not isinstance(given, Space):
        return given
    match given:
        case Grid(options):
            return tune.grid_search(list(options))
        case Choice(options):
            return tune.choice(list(options))
        case LogUniform(low, high):
            return tune.loguniform(low, high)
        case Uniform(low, high):
            return tune.uniform(low, high)
        case _:
            assert_never(given)


def _prepared_once(recipes: Sequence[Recipe], say: Say) -> DataLoaders:
    # Each different plan is prepared before the first trial: inside one it would wait for CPUs that the trials hold.
    first = prepared_data(recipes[0], on_ray=True, say=say)
    assert first.prepared is not None
    known = {first.prepared.fingerprint}
    for recipe in recipes[1:]:
        fingerprint = recipe.block.plan(recipe.located()).fingerprint
        if fingerprint not in known:
            known.add(fingerprint)
            prepared_data(recipe, on_ray=True, say=say)
    if len(known) > 1:
        say(f"data: {len(known)} prepared data sets for the settings to choose from")
    return first


def _target(learn: Learner) -> tuple[str, str]:
    # What decides which trial is better: the first metric, or else the validation loss.
    if not learn.metrics:
        return "valid/loss", "min"
    return f"valid/{learn.metrics[0].name}", "max" if learn.metrics[0].higher_is_better else "min"


# --- the trials --------------------------------------------------------------------------------------------------------


class _TuneReport(Callback):
    """Reports each epoch of a trial to Ray Tune."""

    order = 90

    def after_epoch(self, learn: Learner) -> None:
        from ray import tune

        tune.report(dict(learn.recorder.values))


def _trial(settings: dict[str, Any], make: RecipeFunction) -> None:
    """What one trial runs, in its own process: the same as a training run in this process."""
    torch.set_num_threads(1)  # a trial has one CPU
    recipe = make(**settings)
    dls = recipe.block.dataloaders(
        recipe.located(), batch_size=recipe.batch_size, seed=recipe.seed, max_bad_rows=recipe.max_bad_rows
    )
    assert dls.prepared is not None
    assert dls.prepared.reused, "the data of a trial is prepared before it"
    learn = new_learner(recipe, dls)
    for callback in list(learn.callbacks):
        if isinstance(callback, Progress):
            learn.remove_callback(callback)
    learn.add_callback(_TuneReport())
    learn.fit(recipe.schedule, recipe.lr)


def _run_trials(
    make: RecipeFunction,
    space: Mapping[str, Any],
    trials: int,
    scheduler: str,
    metric: str,
    mode: str,
    folder: Path,
    say: Say,
    most_epochs: int,
) -> list[Trial]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator

    drawn_names = [name for name, given in space.items() if isinstance(given, Space)]
    spool, parent = folder / "spool.jsonl", folder.name

    running: set[str] = set()

    class ToSpool(tune.Callback):
        """Runs on the driver: each trial is a child run of the sweep's."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.add(trial.trial_id)
            settings = make(**trial.config).settings
            start_run(
                spool,
                trial.trial_id,
                f"{parent}-{trial.trial_id}",
                {k: as_words(v) for k, v in settings.items()},
                parent=parent,
            )

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            own = ("train/", "valid/", "hp/", "time/")
            values = {k: v for k, v in result.items() if k == "epoch" or k.startswith(own)}
            append_epoch(spool, trial.trial_id, values)
            drawn = described({name: trial.config[name] for name in drawn_names})
            epochs = total_epochs(make(**trial.config).schedule)
            say(f"trial {trial.trial_id}  epoch {values['epoch'] + 1}/{epochs}  {metric} {values[metric]:.4f}  {drawn}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)
            append(spool, "end", trial.trial_id, status="FINISHED")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)
            append(spool, "end", trial.trial_id, status="FAILED")

    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, make=make), {"cpu": 1}),
        param_space={name: _for_tune(given) for name, given in space.items()},
        tune_config=tune.TuneConfig(
            num_samples=trials,
            metric=metric,
            mode=mode,
            search_alg=BasicVariantGenerator(random_state=make().seed),
            scheduler=ASHAScheduler(max_t=most_epochs) if scheduler == "asha" else FIFOScheduler(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="trials", storage_path=str(folder), verbose=0, callbacks=[ToSpool()]),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's error is told at the end
    try:
        results = tuner.fit()
    finally:
        for trial_id in running:  # interrupted
            append(spool, "end", trial_id, status="KILLED")
    found = [_as_trial(r, drawn_names, metric, mode, make) for r in results]
    if all(t.ended == "failed" for t in found):
        raise RuntimeError(f"all {len(found)} trials failed; the first error:\n{results.errors[0]}")
    return found


def _as_trial(result: Any, drawn_names: Sequence[str], metric: str, mode: str, make: RecipeFunction) -> Trial:
    metrics = result.metrics or {}
    epochs = int(metrics.get("epoch", -1)) + 1
    whole = epochs == total_epochs(make(**result.config).schedule)
    worst = float("-inf") if mode == "max" else float("inf")
    return Trial(
        drawn={name: result.config[name] for name in drawn_names},
        score=metrics.get(metric, worst),
        epochs=epochs,
        ended="failed" if result.error else "finished" if whole else "stopped",
    )
