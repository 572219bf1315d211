"""The trials of a sweep through Ray Tune, from the driver's side: how they go is shown, recorded and remembered.

`trials.jsonl` in the sweep's folder remembers them: a line where a trial begins, with its draws, and one where it ends, with
all that is known of it. So a sweep that was broken off goes on with what is left. (Tuner.restore would unpickle files.)
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.held import left_free
from cluster.live import LiveTable, Say
from cluster.schedulers import Before, searched, tune_scheduler
from cluster.space import Draws, Space, settled
from cluster.spool import SPOOL, append, append_epoch
from cluster.swept import Trial
from cluster.tracking import start_run
from cluster.trial import TrialError, TrialOf, error_line, newest_state, run_trial
from cluster.workers import Workers
from training.schedule import total_epochs
from training.state import generators, seed_all, set_generators

TRIALS = "trials.jsonl"
KEPT_STATES = 3
RECORDED = ("train/", "valid/", "hp/", "time/")


@dataclass(frozen=True)
class Search:
    """What is searched, and how. run: the sweep's in the spool. epochs: of the longest trial. metric, mode: what decides."""

    trial: TrialOf
    scheduler: str
    search: str
    trials: int
    metric: str
    mode: str
    epochs: int
    seed: int
    folder: Path
    run: str

    @property
    def drawn_names(self) -> list[str]:
        """The settings that are drawn."""
        return [name for name, space in self.trial.spaces.items() if isinstance(space, Space)]


def run_trials(search: Search, say: Say) -> list[Trial]:
    """Train what is not trained yet, and return all trials. The first trial's error, as itself, when all failed."""
    from ray import tune

    memory = Memory(search)
    algorithm, space, samples = searched(
        search.trial.spaces,
        search.search,
        search.trials,
        search.seed,
        search.metric,
        search.mode,
        memory.before(),
        _at_once(search.trial.workers),
    )
    if not samples or space.get("trial") == {"grid_search": []}:
        return list(memory.trials.values())
    with ExitStack() as stack:
        table = stack.enter_context(LiveTable(search.metric, search.mode, say))
        stack.enter_context(_seeded(search.seed))
        stack.enter_context(left_free(nested=search.trial.workers > 1, say=say))
        watch = make_watch(search, memory, table)
        tuner = tune.Tuner(
            tune.with_resources(partial(run_trial, trial=search.trial), _resources(search)),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                metric=search.metric,
                mode=search.mode,
                search_alg=algorithm,
                scheduler=tune_scheduler(search.scheduler, search.trial.spaces, search.epochs),
                reuse_actors=search.trial.workers == 1,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(search.folder),
                verbose=0,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if search.trial.resumes else 1),
            ),
        )
        for name in ("ray.tune", "ray.train"):  # a trial's error is told in the table
            logging.getLogger(name).setLevel(logging.CRITICAL)
        tuner.fit()
    memory.keep_best(KEPT_STATES)
    if memory.first_error is not None and all(t.ended == "failed" for t in memory.trials.values()):
        raise memory.first_error
    return list(memory.trials.values())


def _name(trial: Any) -> str:
    return f"{trial.config['trial']['number']:04d}"


def _resources(search: Search) -> dict[str, float]:
    import ray

    if search.trial.workers > 1:
        return {"memory": 1}  # the least that Ray takes: what trains is Train's
    return {"cpu": 1, "gpu": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {"cpu": 1}


def _at_once(workers: int) -> int:
    # Tune does not know what the workers of a trial take: more trials than fit would wait for each other for ever.
    import ray

    if workers == 1:
        return 0
    there = ray.cluster_resources()
    kinds = ("CPU", "GPU") if Workers.asked(workers).gpu else ("CPU",)
    return max(1, min(int(there.get(kind, 0)) // workers for kind in kinds))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Schedulers draw from the global generators: PBT's mutations.
    before = generators()
    seed_all(seed % 2**32)
    try:
        yield
    finally:
        set_generators(before)


class Memory:
    """The trials of a sweep as they are known, here and in its folder."""

    def __init__(self, search: Search):
        self.search, self.file = search, search.folder / TRIALS
        self.trials: dict[int, Trial] = {}
        self.draws: dict[int, Draws] = {}
        self.first_error: BaseException | None = None
        if self.file.exists():
            text = self.file.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # the process ended while it wrote
                self.file.write_text(whole)
            for line in whole.splitlines():
                self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        number, draws = line["trial"], line["draws"]
        self.draws[number] = draws
        self.trials[number] = self._new(number, draws)
        if "ended" in line:
            known: dict[str, Any] = {key: line[key] for key in ("epochs", "ended", "error", "history")}
            known |= {key: line[key] and self.search.folder / line[key] for key in ("error_file", "state")}
            self.trials[number] = replace(self.trials[number], **known, score=self._score(line["history"]))

    def _new(self, number: int, draws: Draws) -> Trial:
        values = settled(self.search.trial.spaces, draws)
        drawn = set(self.search.drawn_names)
        return Trial(
            number, {n: v for n, v in values.items() if n in drawn}, {n: v for n, v in values.items() if n not in drawn}
        )

    def _score(self, history: Any) -> float:
        return history[-1].get(self.search.metric, math.nan) if history else math.nan

    def before(self) -> Before:
        """What is known before the first new trial."""
        over = {n: t for n, t in self.trials.items() if t.ended != "waiting"}
        scored = [(self.draws[n], t.score) for n, t in over.items() if not math.isnan(t.score)]
        begun = {n: self.draws[n] for n in self.trials if n not in over}
        return Before(scored, begun, frozenset(over))

    def begin(self, number: int, draws: Draws) -> None:
        """Remember that a trial begins."""
        self.draws[number] = draws
        self.trials[number] = replace(self._new(number, draws), ended="running")
        self._write({"trial": number, "draws": draws})

    def epoch(self, number: int, draws: Draws, values: dict[str, float]) -> Trial:
        """Remember an epoch; one that was there before, in a trial that went on from another one's state, is replaced."""
        before = self.trials[number]
        history = [v for v in before.history if v["epoch"] < values["epoch"]] + [values]
        self.draws[number] = draws
        self.trials[number] = replace(
            self._new(number, draws),
            ended="running",
            history=history,
            epochs=int(values["epoch"]) + 1,
            score=self._score(history),
        )
        return self.trials[number]

    def end(self, number: int, ended: str, state: Path | None = None, error: BaseException | None = None) -> Trial:
        """Remember how a trial ended."""
        line, error_file = "", None
        if error is not None:
            line, text = (error.line, error.text) if isinstance(error, TrialError) else (error_line(error), str(error))
            error_file = self.search.folder / "errors" / f"{number:04d}.txt"
            error_file.parent.mkdir(exist_ok=True)
            error_file.write_text(text)
            self.first_error = self.first_error or as_itself(error)
        trial = replace(self.trials[number], ended=ended, state=state, error=line, error_file=error_file)
        self.trials[number] = trial
        self._write(
            {
                "trial": number,
                "draws": self.draws[number],
                "ended": ended,
                "epochs": trial.epochs,
                "error": line,
                "error_file": error_file and str(error_file.relative_to(self.search.folder)),
                "state": state and str(state.relative_to(self.search.folder)),
                "history": trial.history,
            }
        )
        if not self.search.trial.resumes:  # else another trial may still go on from there
            self.keep_best(KEPT_STATES)
        return trial

    def keep_best(self, number: int) -> None:
        """Remove the states of all trials that are over but the best."""
        over = sorted((t for t in self.trials.values() if t.state is not None), key=lambda t: t.rank(self.search.mode))
        kept = {trial.state for trial in over[:number]}
        for trial in over[number:]:
            assert trial.state is not None
            if trial.state not in kept:  # as where it has taken over the last state of a better one
                shutil.rmtree(trial.state, ignore_errors=True)
            self.trials[trial.number] = replace(trial, state=None)

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def as_itself(error: BaseException) -> BaseException:
    """The exception that a trial's own code raised."""
    from ray import cloudpickle

    return cloudpickle.loads(error.content) if isinstance(error, TrialError) else error


def make_watch(search: Search, memory: Memory, table: LiveTable) -> Any:
    """Ray Tune's callback that runs on the driver: each trial is shown, remembered, and a child run of the sweep's."""
    from ray import tune

    spool, parent = search.folder / SPOOL, search.run
    numbers: dict[str, int] = {}  # by Ray's id: where a trial takes over another one's settings, its config has that one's

    class Watch(tune.Callback):
        def __reduce__(self) -> Any:
            return tune.Callback, ()  # Ray pickles what it is given into the folder, for a restore that nobody does

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.number(trial)

        def number(self, trial: Any) -> int:
            """Ours of Ray's trial, which begins where it is first heard of."""
            if trial.trial_id not in numbers:
                number, draws = trial.config["trial"]["number"], _draws(trial)
                numbers[trial.trial_id] = number
                memory.begin(number, draws)
                settings = search.trial.recipe(draws).settings
                start_run(spool, _run(number), f"{parent}-{number:04d}", dict(settings), parent=parent)
            return numbers[trial.trial_id]

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            # Of what it trained with: a scheduler may have changed the trial's own for the epochs to come.
            number, draws = self.number(trial), dict(result["config"]["trial"]["draws"])
            values = {k: v for k, v in result.items() if k == "epoch" or k.startswith(RECORDED)}
            append_epoch(spool, _run(number), values)
            now = memory.epoch(number, draws, values)
            epochs = total_epochs(search.trial.recipe(draws).schedule)
            line = f"trial {now.name}  epoch {values['epoch'] + 1}/{epochs}  {search.metric} {now.score:.4f}  {now.describe()}"
            table.update(list(memory.trials.values()), line)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = self.number(trial)
            whole = memory.trials[number].epochs == total_epochs(search.trial.recipe(memory.draws[number]).schedule)
            if search.trial.workers > 1:
                state = newest_state(search.trial.training_folder(number))
            else:
                state = Path(trial.checkpoint.path) if trial.checkpoint else None
            ended = memory.end(number, "finished" if whole else "stopped", state).ended
            append(spool, "tag", _run(number), key="fastray.ended", value=ended)  # MLflow has one word for both
            append(spool, "end", _run(number), status="FINISHED")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = self.number(trial)
            now = memory.end(number, "failed", error=_error_of(trial))
            append(spool, "tag", _run(number), key="fastray.error", value=now.error)
            append(spool, "end", _run(number), status="FAILED")
            table.update(list(memory.trials.values()), f"trial {now.name}  failed  {now.describe()}  {now.error}")

    def _run(number: int) -> str:
        return f"{parent}-{number:04d}"

    return Watch()


def _draws(trial: Any) -> Draws:
    return dict(trial.config["trial"]["draws"])


def _error_of(trial: Any) -> BaseException:
    """What ended a trial: its own error where there is one, else what Ray says of its process."""
    from ray import cloudpickle

    file = trial.pickled_error_file  # which Ray has written a moment ago; it gives the exception itself to nobody
    error: BaseException | None = cloudpickle.loads(Path(file).read_bytes()) if file else None
    inner = error
    while inner is not None:
        if isinstance(inner, TrialError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error or RuntimeError("it ended without a reason")
