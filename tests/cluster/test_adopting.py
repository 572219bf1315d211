"""A run is one run in MLflow, whatever restarts: who goes on adopts it; who was killed is closed by whoever comes next."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from blocks.errors import UserError
from cluster.places import places
from cluster.sent import HEARTBEAT, SENT, Heartbeat, Sent, SentRun
from cluster.spool import SPOOL, append, append_epoch
from cluster.store import StoreError
from cluster.tracking import Tracker, start_run
from cluster.train import none_left_open

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def folder(own_places: Path) -> Path:
    """The folder of a run, in the place where runs lie."""
    made = own_places / "runs" / "a"
    made.mkdir(parents=True)
    return made


def recorded() -> list[Run]:
    client = MlflowClient(places().tracking)
    experiment = client.get_experiment_by_name("tests")
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time"]))


def steps(run: Run, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(places().tracking).get_metric_history(run.info.run_id, name)]


def killed(folder: Path, epochs: int = 3, **params: Any) -> str:
    """A process that recorded so many epochs and was gone; the id of its run."""
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        start_run(folder / SPOOL, "r", "the run", params)
        for epoch in range(epochs):
            append_epoch(folder / SPOOL, "r", {"epoch": epoch, "train/loss": 10.0 - epoch})
    found = tracker.run_id("r")
    assert found is not None
    return found


def make_stale(folder: Path) -> None:
    os.utime(folder / HEARTBEAT, (1e9, 1e9))


def test_a_resumed_run_is_the_same_one(folder: Path) -> None:
    """Steps that are repeated after the last checkpoint stand once."""
    first = killed(folder, lr=0.1)
    assert [r.info.status for r in recorded()] == ["RUNNING"]
    with Tracker(folder / SPOOL, places().tracking, "another name") as tracker:
        tracker.opened()
        assert tracker.run_id("r") == first
        start_run(folder / SPOOL, "r", "the run", {})
        append(folder / SPOOL, "tag", "r", key="fastray.restarts", value=1)
        for epoch in (1, 2, 3):
            append_epoch(folder / SPOOL, "r", {"epoch": epoch, "train/loss": -1.0})
        append(folder / SPOOL, "end", "r", status="FINISHED")
    assert tracker.trouble is None
    (run,) = recorded()
    assert run.info.run_id == first
    assert run.info.status == "FINISHED"
    assert run.data.tags["fastray.restarts"] == "1"
    assert steps(run) == [(0, 10.0), (1, 9.0), (2, 8.0), (3, -1.0)]


def test_a_run_that_was_closed_goes_on(folder: Path) -> None:
    killed(folder)
    with Tracker(folder / SPOOL, places().tracking, "tests"):
        append(folder / SPOOL, "end", "r", status="KILLED")
    assert [r.info.status for r in recorded()] == ["KILLED"]
    with Tracker(folder / SPOOL, places().tracking, "tests"):
        start_run(folder / SPOOL, "r", "the run", {})
        append_epoch(folder / SPOOL, "r", {"epoch": 3, "train/loss": 1.0})
    assert [r.info.status for r in recorded()] == ["RUNNING"]


def test_who_adopts_runs_ends_them_whatever_ends_it(folder: Path) -> None:
    """Before it has gone on with them: the data is gone, the cluster is too small, Ctrl-C."""
    killed(folder)
    start_run(folder / SPOOL, "child", "child", {}, parent="r")
    with (
        pytest.raises(KeyboardInterrupt),
        Tracker(folder / SPOOL, places().tracking, "tests"),
        none_left_open(folder / SPOOL),
    ):
        raise KeyboardInterrupt
    assert [r.info.status for r in recorded()] == ["KILLED", "KILLED"]
    assert not (folder / HEARTBEAT).exists()


def test_parameters_are_written_once(folder: Path) -> None:
    """Those of a run that goes on with others stay as they were; it raises nothing."""
    killed(folder, lr=0.1)
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        start_run(folder / SPOOL, "r", "the run", {"lr": 0.2, "wd": 0.3})
    assert tracker.trouble is None
    (run,) = recorded()
    assert run.data.params == {"lr": "0.1", "wd": "0.3"}


def test_a_run_whose_creation_was_not_answered_is_found_again(folder: Path) -> None:
    """The process died between MLflow's making the run and its noting the id."""
    first = killed(folder)
    sent = Sent.read(folder)
    assert sent is not None
    sent.position, sent.runs = 0, {"r": SentRun()}
    sent.write(folder)
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        pass
    assert tracker.run_id("r") == first
    assert len(recorded()) == 1


def test_a_run_that_is_going_on_is_not_taken(folder: Path) -> None:
    killed(folder)
    heartbeat = Heartbeat(folder)
    with pytest.raises(UserError, match="still going on, or its records are being sent, in another process"):
        Tracker(folder / SPOOL, places().tracking, "tests")
    heartbeat.end(nobody_needed=False)


def test_a_run_of_another_store_is_not_adopted(folder: Path, empty_store: Path, own_places: Path) -> None:
    killed(folder)
    shutil.copy(empty_store, own_places / "other.db")
    with (
        Tracker(folder / SPOOL, f"sqlite:///{own_places / 'other.db'}", "tests") as tracker,
        pytest.raises(StoreError, match=r"it was recorded in sqlite:////.*/mlflow.db: set MLFLOW_TRACKING_URI to that one"),
    ):
        tracker.opened()


def test_the_next_command_closes_what_was_killed(folder: Path, own_places: Path) -> None:
    """What the killed one had not sent is sent, too: its last epoch, and a child that had not even begun in MLflow."""
    killed(folder)
    make_stale(folder)
    append_epoch(folder / SPOOL, "r", {"epoch": 3, "train/loss": 7.0})
    start_run(folder / SPOOL, "child", "child", {}, parent="r")
    other = own_places / "runs" / "b"
    other.mkdir()
    with Tracker(other / SPOOL, places().tracking, "tests"):
        pass
    parent, child = recorded()
    assert [parent.info.status, child.info.status] == ["KILLED", "KILLED"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert steps(parent)[-1] == (3, 7.0)
    assert not (folder / HEARTBEAT).exists()


@pytest.mark.parametrize("why", ["it lives", "it was heard of", "it has another store"])
def test_what_may_still_go_on_is_left_alone(why: str, folder: Path, own_places: Path) -> None:
    killed(folder)
    make_stale(folder)
    heartbeat = None
    if why == "it lives":
        heartbeat = Heartbeat(folder)
        make_stale(folder)  # its thread hangs
    elif why == "it was heard of":
        os.utime(folder / HEARTBEAT)
    else:
        (folder / SENT).write_text((folder / SENT).read_text().replace("mlflow.db", "other.db"))
    other = own_places / "runs" / "b"
    other.mkdir()
    with Tracker(other / SPOOL, places().tracking, "tests"):
        pass
    assert [r.info.status for r in recorded()] == ["RUNNING"]
    if heartbeat is not None:
        heartbeat.end(nobody_needed=False)
