"""What goes along with a job, and what is refused before it is sent. The job itself: tests/pipelines/test_ways.py."""

from pathlib import Path

import pytest

from cluster import submit_job
from cluster.jobs import JobError, _entrypoint, _environment, _own_traces


def test_places_go_along_as_absolute_addresses(own_places: Path, tmp_path: Path) -> None:
    assert _environment("http://127.0.0.1:8265") == {
        "FASTRAY_CACHE": str(tmp_path / "cache"),
        "FASTRAY_STORAGE": str(own_places / "runs"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{own_places / 'mlflow.db'}",
    }


def test_a_local_place_goes_to_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="MLFLOW_TRACKING_URI is on this machine"):
        _environment("http://192.0.2.77:8265")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.delenv("FASTRAY_CACHE")
    assert _environment("http://192.0.2.77:8265") == {"MLFLOW_TRACKING_URI": "http://mlflow.example"}
    monkeypatch.setenv("FASTRAY_STORAGE", "/nfs/runs")
    assert _environment("http://192.0.2.77:8265")["FASTRAY_STORAGE"] == "/nfs/runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.example")
    with pytest.raises(JobError, match="MLFLOW_TRACKING_URI carries a password or token") as caught:
        _environment("http://127.0.0.1:8265")
    assert "secret" not in str(caught.value)


def test_what_earlier_runs_left_is_not_shipped(own_places: Path) -> None:
    assert _own_traces() == [".env", "/runs", "/mlflow.db", "/mlruns"]


def test_the_command_of_a_job() -> None:
    assert _entrypoint(["train", "digits", "schedule=one_cycle(1)"], "http://192.0.2.77:8265") == (
        "python -m pipelines train digits 'schedule=one_cycle(1)'"
    )


def test_an_address_is_a_url() -> None:
    with pytest.raises(JobError, match=r"write it as http://127\.0\.0\.1:8265"):
        submit_job(["train", "digits"], "127.0.0.1:8265")


def test_a_cluster_that_does_not_answer() -> None:
    with pytest.raises(JobError, match=r"the cluster at http://127.0.0.1:9 does not take the job"):
        submit_job(["train", "digits"], "http://127.0.0.1:9")
