"""Sweeps: Ray Tune draws settings of a recipe function, each trial trains in a process of its own on data prepared once."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch

from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from cluster.ahead import features_ahead
from cluster.places import places
from cluster.runs import new_run_folder
from cluster.runtime import check_resources, start_ray
from cluster.space import Choice, Grid, LogUniform, Space, Uniform, space_words
from cluster.spool import SPOOL, append, append_epoch
from cluster.tracking import Tracker, start_run
from cluster.train import ending, new_learner, prepared_data, record_data, tags_of
from training.callback import Callback
from training.callbacks import Progress
from training.learner import Learner
from training.recipe import RecipeFunction, SettingError, checked, did_you_mean
from training.schedule import as_words, total_epochs

SCHEDULERS = ("none", "asha")
GOLDEN = 0.6180339887
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One trial: the settings it drew and those that were fixed, its last score, its epochs, and how it ended.

    ended: "finished", "stopped" by the scheduler, or "failed", with the reason in `error`.
    """

    drawn: dict[str, Any]
    fixed: dict[str, Any]
    score: float
    epochs: int
    ended: str
    error: str = ""

    def rank(self, mode: str) -> tuple[bool, float]:
        """Sorts the best first; what failed, or has no number for a score, last."""
        usable = self.ended != "failed" and not math.isnan(self.score)
        return not usable, (-self.score if mode == "max" else self.score) if usable else 0.0

    def words(self) -> dict[str, str]:
        """The settings as the command line takes them."""
        return {key: as_words(value) for key, value in {**self.fixed, **self.drawn}.items()}

    def describe(self) -> str:
        """The drawn settings for reading: numbers in four digits."""
        return described(self.drawn)


@dataclass(frozen=True)
class Swept:
    """What a sweep left: its trials, best first, and MLflow's id of the parent run."""

    metric: str
    trials: tuple[Trial, ...]
    run_id: str | None
    folder: Path
    seconds: float
    trouble: str | None

    def table(self) -> str:
        """The trials as text, best first."""
        lines = [f"{self.metric:>14}  epochs  ended       settings"]
        lines += [f"{t.score:14.4f}  {t.epochs:6d}  {t.ended:<10}  {t.describe()}  {t.error}".rstrip() for t in self.trials]
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
    candidates = _check(make, space)
    first = make(**{name: values[0] for name, values in candidates.items()})
    most_epochs = max(make(**{"schedule": s}).epochs for s in candidates.get("schedule", [first.schedule]))
    folder = Path(new_run_folder(places().storage, f"{first.name}-sweep"))
    spool, run = folder / SPOOL, folder.name
    with Tracker(spool, places().tracking, experiment=first.name) as tracker:
        start_ray()
        check_resources(1, asked="a trial", say=say)
        dls = _prepared_once(make, space, candidates, say)
        choices = {name: values for name, values in candidates.items() if isinstance(space[name], Choice)}
        features_ahead(make, {name: values[0] for name, values in candidates.items()}, choices)
        metric, mode = _target(new_learner(first, dls))
        tracker.opened()
        folder.mkdir(parents=True)
        texts = {key: space_words(value) for key, value in {**first.settings, **space}.items()}
        tags = tags_of(dls) | {"fastray.sweep": run}
        start_run(spool, run, run, {"recipe": first.name, **texts, "trials": trials, "scheduler": scheduler}, tags=tags)
        with ending(spool, run):
            record_data(spool, run, folder, dls)
            say(f"sweep: {trials} trials, {metric} decides, scheduler {scheduler}")
            found = _run_trials(make, space, trials, scheduler, metric, mode, folder, say, most_epochs, first.seed)
    return Swept(
        metric=metric,
        trials=tuple(sorted(found, key=lambda t: t.rank(mode))),
        run_id=tracker.run_id(run),
        folder=folder,
        seconds=time.perf_counter() - began,
        trouble=tracker.trouble,
    )


def described(drawn: Mapping[str, Any]) -> str:
    """Drawn settings for reading: numbers in four digits."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={as_words(v)}" for k, v in drawn.items())


# --- the space ---------------------------------------------------------------------------------------------------------


def _check(make: RecipeFunction, space: Mapping[str, Any]) -> dict[str, list[Any]]:
    # Every value a choice can take and some of every range, checked against the recipe before anything starts.
    candidates = {name: [checked(make, name, value) for value in _some(given)] for name, given in space.items()}
    for name, values in candidates.items():
        for value in values:
            make(**{name: value})
    return candidates


def _some(given: Any) -> Sequence[Any]:
    match given:
        case Choice(options):
            return options
        case LogUniform(low, high) | Uniform(low, high):
            return (low, high, low + (high - low) * GOLDEN)  # not a whole number, where one is wanted
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


def _prepared_once(make: RecipeFunction, space: Mapping[str, Any], candidates: dict[str, list[Any]], say: Say) -> DataLoaders:
    # Each different plan is prepared before the first trial: inside one it would wait for CPUs that the trials hold.
    base = {name: values[0] for name, values in candidates.items()}
    changing = {name: values for name, values in candidates.items() if len({_plan(make, base, name, v) for v in values}) > 1}
    for name in changing:
        if not isinstance(space[name], Choice):
            raise UserError(
                f"{name} changes how the data is prepared, so it is a choice(...) or grid(...), not {space_words(space[name])}"
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
    block, source = recipe.data()
    dls = block.dataloaders(source, **recipe.data_settings)
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
    seed: int,
) -> list[Trial]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator

    drawn_names = [name for name, given in space.items() if isinstance(given, Space)]
    spool, parent = folder / SPOOL, folder.name

    running: set[str] = set()
    configs: dict[str, dict[str, Any]] = {}  # a result has none when its process died before it could say

    class ToSpool(tune.Callback):
        """Runs on the driver: each trial is a child run of the sweep's."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.add(trial.trial_id)
            configs[trial.trial_id] = dict(trial.config)
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
            score = values.get(metric, math.nan)
            say(f"trial {trial.trial_id}  epoch {values['epoch'] + 1}/{epochs}  {metric} {score:.4f}  {drawn}")

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
            search_alg=BasicVariantGenerator(random_state=seed),
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
    by_id = {r.metrics["trial_id"]: r for r in results if r.metrics and "trial_id" in r.metrics}
    found = [_as_trial(by_id.get(i), config, drawn_names, metric, make) for i, config in configs.items()]
    if all(t.ended == "failed" for t in found):
        raise RuntimeError(f"all {len(found)} trials failed; the first error:\n{results.errors[0]}")
    return found


def _as_trial(result: Any, config: dict[str, Any], drawn_names: Sequence[str], metric: str, make: RecipeFunction) -> Trial:
    metrics = result.metrics if result is not None else {}
    epochs = int(metrics.get("epoch", -1)) + 1
    error = "its process ended before its first report" if result is None else str(result.error or "").strip()
    whole = epochs == total_epochs(make(**config).schedule)
    return Trial(
        drawn={name: config[name] for name in drawn_names},
        fixed={name: value for name, value in config.items() if name not in drawn_names},
        score=metrics.get(metric, math.nan),
        epochs=epochs,
        ended="failed" if error else "finished" if whole else "stopped",
        error=error.splitlines()[-1] if error else "",
    )
