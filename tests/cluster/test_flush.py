"""A store that is away costs the training nothing: what it could not take is kept, and sent when it is back."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from blocks.errors import UserError
from cluster.flush import flush_records
from cluster.places import places
from cluster.sent import HEARTBEAT, Heartbeat
from cluster.spool import SPOOL, append, append_epoch
from cluster.tracking import Tracker, start_run

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Has the store be away, or back."""
    now: list[str | None] = [None]
    monkeypatch.setattr("cluster.sender.away", lambda tracking: now[0])
    monkeypatch.setattr("cluster.tracking.AWAY_SECONDS", 0.1)

    def set_away(is_away: bool) -> None:
        now[0] = "it does not answer" if is_away else None

    return set_away


def recorded() -> list[Run]:
    client = MlflowClient(places().tracking)
    experiment = client.get_experiment_by_name("tests")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id], order_by=["start_time"]))


def train(folder: Path, ends: bool = True) -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        tracker.opened()
        start_run(folder / SPOOL, folder.name, folder.name, {"lr": 0.1})
        for epoch in range(3):
            append_epoch(folder / SPOOL, folder.name, {"epoch": epoch, "train/loss": 1.0 / (epoch + 1)})
        if ends:
            append(folder / SPOOL, "end", folder.name, status="FINISHED")
    return tracker


def test_a_store_that_was_away_all_the_time(
    away: Callable[[bool], None], own_places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is created at the flush, and ends as it ended."""
    away(True)
    tracker = train(own_places / "runs" / "a")
    assert "records: it does not answer; they are kept, and sent when it does" in capsys.readouterr().out
    assert tracker.trouble == "it does not answer"
    assert tracker.run_id("a") is None
    assert [f.trouble for f in flush_records()] == ["it does not answer"]
    away(False)
    assert recorded() == []
    (flushed,) = flush_records("a")
    assert flushed.trouble is None
    (run,) = recorded()
    assert (run.info.run_name, run.info.status, run.data.metrics["train/loss"]) == ("a", "FINISHED", pytest.approx(1 / 3))
    assert not (own_places / "runs" / "a" / HEARTBEAT).exists()
    assert flush_records() == []
    (again,) = flush_records(str(own_places / "runs" / "a"))
    assert again.trouble is None
    assert len(recorded()) == 1


def test_a_store_that_comes_back(away: Callable[[bool], None], own_places: Path) -> None:
    """During the run: nothing is left for later."""
    folder = own_places / "runs" / "a"
    folder.mkdir(parents=True)
    away(True)
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        tracker.opened(say=lambda line: None)
        start_run(folder / SPOOL, "a", "a", {})
        append_epoch(folder / SPOOL, "a", {"epoch": 0, "train/loss": 1.0})
        away(False)
        append_epoch(folder / SPOOL, "a", {"epoch": 1, "train/loss": 1.0})
        append(folder / SPOOL, "end", "a", status="FINISHED")
    assert tracker.trouble is None
    (run,) = recorded()
    assert run.info.status == "FINISHED"
    assert not (folder / HEARTBEAT).exists()


def test_a_killed_run_is_closed(own_places: Path) -> None:
    """Named or not, however short ago it was killed."""
    train(own_places / "runs" / "a", ends=False)
    assert [r.info.status for r in recorded()] == ["RUNNING"]
    assert [f.trouble for f in flush_records()] == [None]
    assert [r.info.status for r in recorded()] == ["KILLED"]


def test_a_run_that_is_going_on_is_left_alone(own_places: Path) -> None:
    train(own_places / "runs" / "a", ends=False)
    train(own_places / "runs" / "b", ends=False)
    heartbeat = Heartbeat(own_places / "runs" / "a")
    first, second = flush_records()
    assert first.trouble is not None
    assert "still going on" in first.trouble
    assert second.trouble is None
    with pytest.raises(UserError, match="still going on"):
        flush_records("a")
    assert [r.info.status for r in recorded()] == ["RUNNING", "KILLED"]
    heartbeat.end(nobody_needed=False)


def test_a_run_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no records are kept in .*/runs/nothing: give a run's folder, or its name in"):
        flush_records("nothing")
