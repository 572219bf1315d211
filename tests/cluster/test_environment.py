"""A run says from which commit and with which versions it was made, and on request how busy the machine was."""

import subprocess
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.environment import environment
from cluster.spool import SPOOL, append, append_epoch, read
from cluster.system_metrics import SystemMetrics
from cluster.tracking import Tracker, start_run


def git(*words: str) -> str:
    command = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_working_folder(own_places: Path) -> None:
    """And whether files that git knows differ from it; others do not count."""
    assert "mlflow.source.git.commit" not in environment()
    git("init", "-b", "trunk")
    (own_places / "train.py").write_text("lr = 0.1\n")
    git("add", ".")
    git("commit", "-m", "first")
    (own_places / "notes.txt").write_text("unknown to git")
    found = environment()
    assert found["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert found["mlflow.source.git.branch"] == "trunk"
    assert found["fastray.git.dirty"] == "false"
    (own_places / "train.py").write_text("lr = 0.2\n")
    assert environment()["fastray.git.dirty"] == "true"


def test_versions_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person wrote is kept but for the password in an address."""
    monkeypatch.setattr("sys.argv", ["/bin/fastray", "train", "folder", "path=s3://bucket/a b", "ftp://me:secret@host/x"])
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    found = environment()
    assert found["mlflow.source.name"] == "fastray train folder 'path=s3://bucket/a b' 'ftp://***@host/x'"
    assert found["mlflow.source.type"] == "LOCAL"
    for name in ("python", "fastray", "torch", "ray", "mlflow"):
        assert f"{name} " in found["fastray.versions"]


def test_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert environment()["fastray.submission"] == "raysubmit_1"
    assert environment()["mlflow.source.type"] == "JOB"


@pytest.mark.parametrize("asked", [True, False])
def test_how_busy_the_machine_is(asked: bool, store: str, own_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request only, under the names that MLflow's page of system metrics looks for."""
    monkeypatch.setattr("cluster.system_metrics.SECONDS", 0.05)
    spool, waited = own_places / SPOOL, threading.Event()
    with Tracker(spool, store, "tests", system_metrics_of="r" if asked else "") as tracker:
        start_run(spool, "r", "r", {})
        append_epoch(spool, "r", {"epoch": 0, "train/loss": 1.0})
        tracker.opened()
        while asked and spool.read_text().count('"kind": "system"') < 3:
            waited.wait(0.05)
        append(spool, "end", "r", status="FINISHED")
    assert tracker.trouble is None
    client = MlflowClient(store)
    history = client.get_metric_history(tracker.run_id("r"), "system/cpu_utilization_percentage")
    assert [m.step for m in history][:3] == ([0, 1, 2] if asked else [])
    assert client.get_run(tracker.run_id("r")).data.metrics["train/loss"] == 1.0


def test_each_sample_is_of_its_own_time(own_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the mean since the beginning."""
    busy = iter((10.0, 90.0))
    monkeypatch.setattr("cluster.system_metrics.SECONDS", 0.0)
    monkeypatch.setattr("psutil.cpu_percent", lambda: next(busy))
    append(own_places / SPOOL, "start", "r")
    samples = SystemMetrics(own_places / SPOOL, "r")
    samples.sample()
    samples.sample()
    values = [record["values"] for record, _ in read(own_places / SPOOL) if record["kind"] == "system"]
    assert [v["system/cpu_utilization_percentage"] for v in values] == [10.0, 90.0]


def test_a_machine_that_cannot_be_asked_costs_no_other_record(
    store: str, own_places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil knows of no network where there is none."""
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)
    spool, waited = own_places / SPOOL, threading.Event()
    with Tracker(spool, store, "tests", system_metrics_of="r") as tracker:
        start_run(spool, "r", "r", {})
        while tracker.trouble is None:
            waited.wait(0.05)
        append_epoch(spool, "r", {"epoch": 0, "train/loss": 1.0})
        append(spool, "end", "r", status="FINISHED")
    assert tracker.trouble.startswith("system metrics: ")
    run = MlflowClient(store).get_run(tracker.run_id("r"))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})
