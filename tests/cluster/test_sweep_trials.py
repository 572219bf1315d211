"""Sweeps as they run, on one Ray: what trials share, how they end, what is free afterwards."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster import Recording, call, choice, grid, loguniform, resume_sweep, sweep
from cluster.held import left_free
from cluster.runs import RUN_FILE, read_run
from cluster.runtime import ResourceError, start_ray, stop_ray
from cluster.space import NAMES
from cluster.swept import Swept
from training.expressions import read_expression
from training.schedule import flat, one_cycle

from . import toy as module
from .toy import toy

# Ray's, where the machine is so busy that Optuna takes a second to draw.
pytestmark = pytest.mark.filterwarnings("ignore:Define-by-run function passed")
OF_RAY_DATA = ("_StatsActor", "_AutoscalingCoordinatorActor")  # there as long as Ray is


@pytest.fixture
def space(few_digits: Path, tmp_path: Path, ray_running: None) -> Iterator[dict[str, Any]]:
    """Where the toy recipe finds its data and notes what it does. Afterwards nothing of a sweep may hold anything."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(module)  # tests cannot be imported in Ray's processes
    yield {"log": str(tmp_path / "log"), "path": str(few_digits)}
    cloudpickle.unregister_pickle_by_value(module)
    nothing_is_held()


def nothing_is_held() -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    until = time.monotonic() + 60
    while time.monotonic() < until:
        free, there = ray.available_resources(), ray.cluster_resources()
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        held = {k: v - free.get(k, 0) for k, v in there.items() if "memory" not in k and free.get(k, 0) < v}
        alive = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
        actors = [a for a in alive if a["ActorClassName"] not in OF_RAY_DATA]
        if not groups and not held and not actors:
            return
        time.sleep(0.2)
    raise AssertionError(f"still held: {held}, placement groups {groups}, actors {actors}")


def quiet(line: str) -> None:
    pass


def test_a_group_is_freed_where_its_maker_died_and_where_it_is_made_after_the_end(ray_running: None) -> None:
    """The second is what a controller does that sees its workers go, and does not know yet that it is to go as well."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    def is_there(group: Any) -> bool:
        return bool(placement_group_table(group)["state"] != "REMOVED")

    @ray.remote(num_cpus=0)
    class Maker:
        def make(self, after: Any = None) -> None:
            while after is not None and is_there(after):
                time.sleep(0.01)
            placement_group([{"CPU": 1}, {"CPU": 1}]).wait(60)
            os._exit(0)

    with left_free(nested=True):
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(Maker.remote().make.remote())
        nothing_is_held()
        own, late = placement_group([{"CPU": 1}]), Maker.remote()
        late.make.remote(own)
    assert not is_there(own)
    nothing_is_held()


def test_trials_share_data_and_processes_and_are_the_same_wherever_they_run(space: dict[str, Any]) -> None:
    log = Path(space["log"])
    before_trials: list[str] = []

    def say(line: str) -> None:
        if line.startswith("sweep:"):
            before_trials.append(log.read_text())

    found = sweep(toy, space | {"wd": grid(0.1, 0.1, 0.1, 0.1, 0.1)}, trials=1, scheduler="none", say=say)
    assert [t.ended for t in found.trials] == ["finished"] * 5
    assert before_trials == [log.read_text()]  # what was decoded before them was decoded for all
    processes = Counter(Path(f"{log}.pids").read_text().split())
    processes.pop(str(os.getpid()), None)  # the driver asks a Learner for its metric
    assert sum(processes.values()) == 5
    assert len(processes) < 5
    histories = [[{k: v for k, v in e.items() if not k.startswith("time/")} for e in t.history] for t in found.trials]
    assert all(h == histories[0] for h in histories)
    assert found.best_learner().validate()["valid/accuracy"] == pytest.approx(found.best.score)
    assert [v["epoch"] for v in found.best_learner().recorder.history] == [0, 1, 2]


def test_a_failing_trial_and_a_dead_process_are_told_and_end_nothing_else(space: dict[str, Any]) -> None:
    said: list[str] = []
    found = sweep(toy, space | {"how": grid("well", "raise", "die")}, trials=1, scheduler="none", say=said.append)
    by_number = sorted(found.trials, key=lambda t: t.number)
    assert [t.ended for t in by_number] == ["finished", "failed", "failed"]
    assert found.best.number == 0
    _, raised, died = by_number
    assert raised.error.startswith("""KeyError: "a mistake of the user's" (""")
    assert "toy.py:" in raised.error
    assert died.error.startswith("its process died: killed, perhaps for the memory it took")
    assert raised.error_file is not None
    assert died.error_file is not None
    assert "before_batch" in raised.error_file.read_text()
    assert "ActorDiedError" in died.error_file.read_text() or "died" in died.error_file.read_text()
    assert any("trial 0001  failed" in line for line in said)


def test_where_all_trials_fail_the_first_error_is_raised_as_itself(space: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="a mistake of the user's") as caught:
        sweep(toy, space | {"how": "raise", "lr": grid(1e-3, 1e-2)}, trials=1, scheduler="none", say=quiet)
    assert any("Mischief.before_batch" in note for note in caught.value.__notes__)


def test_population_based_training_takes_over_weights_and_mutates_rates(space: dict[str, Any]) -> None:
    drawn = {"lr": loguniform(1e-5, 1e-1), "wd": choice(0.0, 0.1, 0.2), "schedule": flat(6)}
    found = sweep(toy, space | drawn, trials=4, scheduler="pbt", say=quiet)
    assert [t.ended for t in found.trials] == ["finished"] * 4
    for epochs in ([v["epoch"] for v in t.history] for t in found.trials):
        assert epochs == sorted(set(epochs))  # those that another one's state had behind it are left out
        assert epochs[-1] == 5
    changed = 0
    for trial in found.trials:
        rates = [v["hp/lr"] for v in trial.history]
        assert rates[-1] == pytest.approx(trial.drawn["lr"])
        changed += len(set(rates)) > 1
    assert changed
    # A rate of 1e-5 alone would have come nowhere: its weights are another's.
    assert min(t.score for t in found.trials) > 0.8


@pytest.mark.parametrize(
    ("scheduler", "search"),
    [
        ("asha", "random"),
        ("none", "optuna"),
        pytest.param("median", "random", marks=pytest.mark.slow),
        pytest.param("hyperband", "random", marks=pytest.mark.slow),
    ],
)
def test_each_scheduler_and_search(scheduler: str, search: str, space: dict[str, Any]) -> None:
    words = {"lr": loguniform(1e-5, 1e-1), "schedule": choice(call(flat, choice(3, 4)), one_cycle(3))}
    found = sweep(toy, space | words, trials=6, scheduler=scheduler, search=search, say=quiet)
    assert sorted(t.number for t in found.trials) == list(range(6))
    assert {t.ended for t in found.trials} <= {"finished", "stopped"}
    assert found.best.score == max(t.score for t in found.trials) > 0.8
    if scheduler != "none":
        assert "stopped" in {t.ended for t in found.trials}
    assert found.best.state is not None


def test_more_workers_than_there_are_processors_is_an_error_at_once(space: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match=r"no room for a trial of 99 workers"):
        sweep(toy, space | {"lr": choice(1e-3)}, trials=1, workers=99, say=quiet)


def test_trials_of_several_workers_leave_nothing_when_they_are_stopped_or_fail(space: dict[str, Any]) -> None:
    some_stop_and_some_fail(space)


@pytest.fixture
def other_ray(ray_running: None) -> Iterator[None]:
    """In the place of the session's Ray, one with a dashboard and a resource of its own kind."""
    import ray

    stop_ray()
    ray.init("local", num_cpus=4, resources={"special": 2}, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
        start_ray()


@pytest.mark.slow
def test_nothing_is_left_with_a_dashboard_and_other_resources(other_ray: None, space: dict[str, Any]) -> None:
    some_stop_and_some_fail(space)
    import ray

    assert ray.cluster_resources()["special"] == 2  # of which `nothing_is_held` looks whether they are free


def some_stop_and_some_fail(space: dict[str, Any]) -> None:
    drawn = {"lr": grid(3e-2, 1e-5), "how": grid("well", "raise"), "schedule": flat(3), "batch_size": 30}
    found = sweep(toy, space | drawn, trials=1, scheduler="asha", workers=2, say=quiet)
    by_settings = {(t.drawn["lr"], t.drawn["how"]): t for t in found.trials}
    assert by_settings[3e-2, "well"].ended == "finished"
    assert by_settings[1e-5, "well"].ended == "stopped", [(t.name, t.history) for t in found.trials]
    assert by_settings[3e-2, "raise"].ended == "failed"
    assert by_settings[3e-2, "raise"].error.startswith("""KeyError: "a mistake of the user's\"""")
    assert found.best is by_settings[3e-2, "well"]
    assert found.best_learner().validate()["valid/accuracy"] == pytest.approx(found.best.score)


def interrupt_when_one_is_over(folder: Path) -> Any:
    def say(line: str) -> None:
        if line.startswith("trial") and any('"ended"' in f.read_text() for f in folder.glob("runs/*/trials.jsonl")):
            raise KeyboardInterrupt  # another one has told of an epoch, so at least that one is left

    return say


def resumed(folder: Path) -> Swept:
    begun = read_run(folder)
    words = {name: read_expression(text, NAMES) if "(" in text else text for name, text in begun.words.items()}
    runner = dict(begun.runner)
    return resume_sweep(folder, toy, words, recording=Recording.taken_from(runner), **runner, say=quiet)


@pytest.mark.timeout(600)  # three sweeps one after the other
@pytest.mark.parametrize("search", ["random", pytest.param("optuna", marks=pytest.mark.slow)])
def test_an_interrupted_sweep_goes_on_with_what_is_left(search: str, space: dict[str, Any], own_places: Path) -> None:
    words = space | {"lr": loguniform(1e-5, 1e-1)}
    with pytest.raises(KeyboardInterrupt):
        sweep(toy, words, trials=5, scheduler="none", search=search, say=interrupt_when_one_is_over(own_places))
    nothing_is_held()
    (file,) = (own_places / "runs").glob(f"*/{RUN_FILE}")
    before = (file.parent / "trials.jsonl").read_text()
    over = before.count('"ended"')
    assert 1 <= over < 5
    found = resumed(file.parent.relative_to(own_places))
    assert sorted(t.number for t in found.trials) == list(range(5))
    assert all(t.ended == "finished" and t.epochs == 3 and not math.isnan(t.score) for t in found.trials)
    lines = (file.parent / "trials.jsonl").read_text()
    assert lines.startswith(before)
    assert lines.count('"ended"') == 5  # what had ended has not run again
    if search == "random":
        again = sweep(toy, words, trials=5, scheduler="none", say=quiet)
        key = {t.number: (t.drawn["lr"], t.score) for t in again.trials}
        assert {t.number: (t.drawn["lr"], t.score) for t in found.trials} == key


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_is_resumed_by_the_command(own_places: Path, few_digits: Path) -> None:
    """SIGKILL in its middle, then `fastray resume`: no trial is lost, run again or recorded twice."""
    (own_places / "toys.py").write_text(Path(module.__file__ or "").read_text())
    words = [f"path={few_digits}", "lr=loguniform(1e-5, 1e-1)", "schedule=flat(40)", "trials=6", "scheduler=none"]
    sweeping = subprocess.Popen([sys.executable, "-m", "pipelines", "sweep", "toys:toy", *words], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 240
        while not any('"ended"' in f.read_text() for f in own_places.glob("runs/*/trials.jsonl")):
            assert sweeping.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        sweeping.kill()
        sweeping.wait()
    (folder,) = own_places.glob("runs/*")
    before = (folder / "trials.jsonl").read_text()
    assert 1 <= before.count('"ended"') < 6
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "resume", folder.name], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "trials.jsonl").read_text()
    ended = [json.loads(line)["trial"] for line in lines.splitlines() if '"ended"' in line]
    assert sorted(ended) == list(range(6))
    client = MlflowClient(f"sqlite:///{own_places / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert sorted(r.info.run_name for r in runs) == [folder.name, *(f"{folder.name}-{n:04d}" for n in range(6))]
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run in runs:
        if run.info.run_name != folder.name:
            assert [m.step for m in client.get_metric_history(run.info.run_id, "valid/accuracy")] == list(range(40))
