"""The words scheduler=... and search=...: which classes of ray.tune they stand for, and what goes with what.

scheduler   none       every trial finishes
            asha       stops what falls behind at rungs of epochs (Li et al., arXiv:1810.05934)
            median     stops what stays below the median of the others' means (Golovin et al., Vizier, 2017)
            hyperband  rounds in which the better third goes on (Li et al., arXiv:1603.06560)
            pbt        the worst take over weights and settings of the best, and mutate lr and wd (arXiv:1711.09846)
search      random     each draw on its own, `grid` spaces in turn
            grid       every combination of choices, once
            optuna     draws that learn from earlier ones, by TPE (Bergstra et al., 2011)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blocks.errors import UserError
from cluster.space import Choice, Draws, Grid, LogUniform, Space, Uniform, draws_of, inner_parts, ranges, space_words
from training.recipe import SettingError, did_you_mean

SCHEDULERS = ("none", "asha", "median", "hyperband", "pbt")
SEARCHES = ("random", "grid", "optuna")
IN_FLIGHT = ("lr", "wd")  # what a trial takes over without a new model, optimizer or data
PAUSING = ("hyperband", "pbt")  # these stop and go on with trials, from their last state
EPOCHS = "epochs"  # how many a trial has trained; reported with each


def check_words(scheduler: str, search: str, spaces: Mapping[str, Any], trials: int | None, workers: int = 1) -> None:
    """SettingError or UserError, with what to write instead, when the words do not go together."""
    for word, given, known in (("scheduler", scheduler, SCHEDULERS), ("search", search, SEARCHES)):
        if given not in known:
            raise SettingError(f"there is no {word} {given!r}{did_you_mean(given, known)}")
    if trials is not None and trials < 1:
        raise UserError(f"trials={trials}: a sweep has at least one")
    if workers < 1:
        raise UserError(f"workers={workers}: a trial trains in one process of its own, workers=1, or on several workers")
    if workers > 1 and scheduler in PAUSING:
        raise UserError(f"scheduler={scheduler} pauses trials and goes on with them, which needs workers=1, not {workers}")
    if scheduler == "pbt":
        if search != "random":
            raise UserError(f"scheduler=pbt makes its own draws from a random start: leave search={search} out")
        if not any(isinstance(spaces.get(name), Space) for name in IN_FLIGHT):
            raise UserError("scheduler=pbt mutates lr and wd while the trials train: give at least one of them a space")
        for name in set(IN_FLIGHT) & set(spaces):
            if has_inner(spaces[name]):
                raise UserError(
                    f"scheduler=pbt mutates {name}: a range or a choice of numbers, not {space_words(spaces[name])}"
                )
        if trials is not None and trials < 2:
            raise UserError("scheduler=pbt lets trials learn from each other: trials=2 or more")
    for name, space in spaces.items():
        if search == "grid" and ranges(space):
            raise UserError(f"search=grid tries every combination, and {name}={space_words(space)} has no end: use choice(...)")
        if search == "optuna" and has_grid(space):
            raise UserError(f"search=optuna draws as it learns: write choice(...) for {name}={space_words(space)}")
    if search == "grid" and trials is not None:
        raise UserError("search=grid tries every combination once: leave trials out")


def has_inner(space: Any) -> bool:
    """Whether spaces lie within a space."""
    return any(isinstance(part, Space) for part in inner_parts(space))


def has_grid(space: Any) -> bool:
    """Whether a space is or holds a `grid`."""
    return isinstance(space, Grid) or any(map(has_grid, inner_parts(space)))


# --- draws ---------------------------------------------------------------------------------------------------------------


def drawn_at_once(spaces: Mapping[str, Any], search: str, trials: int, seed: int) -> list[Draws]:
    """All draws of a random search, or every combination of a grid. The same seed draws the same."""
    import numpy as np

    generator = np.random.default_rng(seed)

    def choose(path: str, space: Choice) -> Sequence[int]:
        if search == "grid" or isinstance(space, Grid):
            return range(len(space.options))
        return [int(tune_domain(space).sample(random_state=generator))]

    def number(path: str, space: LogUniform | Uniform) -> float:
        return float(tune_domain(space).sample(random_state=generator))

    return [draws for _ in range(1 if search == "grid" else trials) for draws in draws_of(spaces, choose, number)]


def tune_domain(space: Choice | LogUniform | Uniform) -> Any:
    """Ray Tune's domain of the number that is drawn for one space."""
    from ray import tune

    match space:
        case Choice(options):
            return tune.choice(list(range(len(options))))
        case LogUniform(low, high):
            return tune.loguniform(low, high)
        case Uniform(low, high):
            return tune.uniform(low, high)


@dataclass
class DefineByRun:
    """Optuna's search space as it wants it: a function that asks its trial for each number on the way.

    numbers: those of the trials to come.
    """

    spaces: Mapping[str, Any]
    numbers: list[int]

    def __call__(self, asked: Any) -> dict[str, Any]:
        (draws,) = draws_of(
            self.spaces,
            lambda path, space: [asked.suggest_categorical(path, list(range(len(space.options))))],
            lambda path, space: asked.suggest_float(path, space.low, space.high, log=isinstance(space, LogUniform)),
        )
        return {"trial": {"number": self.numbers.pop(0), "draws": draws}}


@dataclass(frozen=True)
class Before:
    """What an interrupted sweep knows already: scores by the draws that led to them, draws that were not carried out, and
    the numbers of the trials that are over.
    """

    scored: list[tuple[Draws, float]] = field(default_factory=list)
    begun: dict[int, Draws] = field(default_factory=dict)
    over: frozenset[int] = frozenset()


def searched(
    spaces: Mapping[str, Any], search: str, trials: int, seed: int, metric: str, mode: str, before: Before, at_once: int = 0
) -> tuple[Any, dict[str, Any], int]:
    """Ray Tune's search algorithm, its param_space and num_samples for what is still to be trained.

    at_once: so many trials at most; 0: as many as there is room for. (TuneConfig's own limit is not one for the former class.)
    """
    from ray import tune
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    if search != "optuna":
        everything = dict(enumerate(drawn_at_once(spaces, search, trials, seed))) | before.begun
        todo = [{"number": number, "draws": draws} for number, draws in everything.items() if number not in before.over]
        return BasicVariantGenerator(max_concurrent=at_once), {"trial": tune.grid_search(todo)}, 1
    # Trials do not begin in the order of their numbers.
    numbers = [*before.begun, *(n for n in range(trials) if n not in before.over and n not in before.begun)]
    optuna = _optuna(DefineByRun(spaces, list(numbers)), seed, metric, mode, before)
    return ConcurrencyLimiter(optuna, max_concurrent=at_once) if at_once else optuna, {}, len(numbers)


def _optuna(space: DefineByRun, seed: int, metric: str, mode: str, before: Before) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize" if mode == "max" else "minimize")
    for draws, score in before.scored:
        study.add_trial(
            optuna.trial.create_trial(params=draws, distributions=_distributions(space.spaces, draws), value=score)
        )  # fmt: skip
    return OptunaSearch(
        space,
        metric=metric,
        mode=mode,
        study_name="sweep",
        storage=storage,
        # Another seed after a break: the same one would draw what was drawn already.
        sampler=optuna.samplers.TPESampler(seed=seed + len(before.over) + len(before.begun)),
        points_to_evaluate=list(before.begun.values()),
    )


def _distributions(spaces: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
    # Optuna's own description of what lay on the way of these draws.
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, Any] = {}

    def choose(path: str, space: Choice) -> Iterator[int]:
        found[path] = CategoricalDistribution(range(len(space.options)))
        yield int(draws[path])

    def number(path: str, space: LogUniform | Uniform) -> float:
        found[path] = FloatDistribution(space.low, space.high, log=isinstance(space, LogUniform))
        return draws[path]

    list(draws_of(spaces, choose, number))
    return found


# --- schedulers ------------------------------------------------------------------------------------------------------------


def tune_scheduler(scheduler: str, spaces: Mapping[str, Any], epochs: int) -> Any:
    """Ray Tune's scheduler for trials of at most so many epochs."""
    from ray.tune import schedulers

    match scheduler:
        case "none":
            return schedulers.FIFOScheduler()
        case "asha":
            return schedulers.ASHAScheduler(time_attr=EPOCHS, max_t=epochs, stop_last_trials=False)
        case "median":
            # An infinite slice: it would else pause trials to let others catch up, and they would begin anew.
            return schedulers.MedianStoppingRule(time_attr=EPOCHS, grace_period=1, min_time_slice=math.inf)
        case "hyperband":
            return schedulers.HyperBandScheduler(time_attr=EPOCHS, max_t=epochs)
        case "pbt":
            return schedulers.PopulationBasedTraining(
                time_attr=EPOCHS,
                perturbation_interval=max(1, epochs // 10),
                hyperparam_mutations={"trial": {"draws": mutations(spaces)}},
                custom_explore_fn=partial(_within_ranges, spaces),
                log_config=False,
                synch=True,  # else a population whose processes start one after the other never meets
            )
    raise AssertionError(scheduler)


def mutations(spaces: Mapping[str, Any]) -> dict[str, Any]:
    """What population-based training may change in flight, as it wants it: domains, and lists of options in their order."""
    spaces = {name: spaces[name] for name in IN_FLIGHT if isinstance(spaces.get(name), Space)}
    return {n: list(range(len(s.options))) if isinstance(s, Choice) else tune_domain(s) for n, s in spaces.items()}


def _within_ranges(spaces: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    # A number that is multiplied by 1.2 time and again would leave its range.
    draws = config["trial"]["draws"]
    for name in IN_FLIGHT:
        space = spaces.get(name)
        if isinstance(space, LogUniform | Uniform):
            draws[name] = min(max(draws[name], space.low), space.high)
    return config
