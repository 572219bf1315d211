"""What the trials of a sweep begin with, computed before the first of them: the features of phases that cache them."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blocks.fingerprint import NotFingerprintable, fingerprint
from cluster.data import map_on_ray
from cluster.train import new_learner
from training.features import compute_ahead
from training.recipe import Recipe, RecipeFunction


def features_ahead(make: RecipeFunction, base: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> None:
    """Compute, in Ray Data's tasks, the features that trials of `make` begin with, once for all that want the same.

    base: settings of one trial. choices: all values that a setting may take. UserError, with the reason, where a phase that
    caches features would not be exact: before any trial.
    """
    done: set[str | None] = {None}
    schedules = [{"schedule": schedule} for schedule in choices.get("schedule", ())] or [{}]
    for schedule in schedules:
        for settings in _different(make, {**base, **schedule}, choices):
            recipe = make(**settings)
            if _key(recipe) not in done:
                done.add(_key(recipe))
                block, source = recipe.data()
                with contextlib.redirect_stdout(io.StringIO()):  # what a Learner says of itself, its trial says
                    learn = new_learner(recipe, block.dataloaders(source, **recipe.data_settings))
                compute_ahead(learn, recipe.schedule, map_on_ray)


def _different(make: RecipeFunction, base: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    # All combinations of the choices that make a difference, with the schedule that `base` has.
    def differs(name: str, values: Sequence[Any]) -> bool:
        return name != "schedule" and len({_key(make(**{**base, name: value})) for value in values}) > 1

    changing = {name: values for name, values in choices.items() if differs(name, values)}
    for values in itertools.product(*changing.values()):
        yield {**base, **dict(zip(changing, values, strict=True))}


def _key(recipe: Recipe) -> str | None:
    # Recipes of one key begin with the same features; None: with none.
    phase = recipe.schedule[0]
    if not phase.cache_features:
        return None
    block, source = recipe.data()
    plan = block.plan(source).fingerprint
    try:
        return fingerprint(plan, recipe.learner, recipe.seed, phase.freeze_to, phase.train_bn)
    except NotFingerprintable:  # each for itself
        return f"{plan} {recipe!r}"
