"""Records in stores that are servers: MLflow's over HTTP, with a password, dying and coming back; and PostgreSQL."""

import json
import shutil
import socket
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from blocks import DataBlock
from cluster.flush import flush_records
from cluster.models import load_model
from cluster.places import places
from cluster.recording import Recording
from cluster.spool import SPOOL, append, append_epoch
from cluster.store import StoreError, away
from cluster.tracking import Tracker, start_run
from cluster.train import record_data, record_model, tags_of
from training import Learner, torchvision_classifier

from .servers import free_port, mlflow_server, postgresql

PASSWORD = "only-for-tests-8"


def record_a_run(folder: Path, learn: Learner) -> Tracker:
    """All kinds of records that a training makes."""
    folder.mkdir(parents=True)
    spool = folder / SPOOL
    with Tracker(spool, places().tracking, "tests") as tracker:
        tracker.opened()
        start_run(spool, "r", "the run", {"lr": 0.1}, tags=tags_of(learn.dls))
        record_data(spool, "r", folder, learn.dls)
        for epoch in range(2):
            append_epoch(spool, "r", {"epoch": epoch, **{f"train/m{i}": float(i) for i in range(500)}})
        record_model(spool, "r", folder, learn, Recording(register="digits", alias="champion"))
        append(spool, "end", "r", status="FINISHED")
    return tracker


def check_run(tracker: Tracker, learn: Learner, item: Path) -> None:
    """It is all there, and the model gives the same answer."""
    assert tracker.trouble is None
    client = MlflowClient(places().tracking)
    run = client.get_run(tracker.run_id("r"))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/m499")] == [0, 1]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "pictures")} == {
        "pictures/batch.png",
        "pictures/predictions.png",
    }
    assert "stage by stage" in run.data.tags["mlflow.note.content"]
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["fastray.fingerprint"]
    for uri in (tracker.model_uri("r"), tracker.registered("r"), "models:/digits@champion"):
        assert uri is not None
        assert load_model(uri).predict([item])[0].label == learn.predict(item).decoded


@pytest.fixture
def learn(few_digits: Path, digits_block: DataBlock) -> Learner:
    return Learner(digits_block.dataloaders(few_digits), torchvision_classifier(arch="shufflenet_v2_x0_5", n_out=3))


def test_postgresql(own_places: Path, learn: Learner, few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgresql(own_places) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        tracker = record_a_run(own_places / "runs" / "r", learn)
        check_run(tracker, learn, next((few_digits / "1").iterdir()))
        with pytest.raises(StoreError, match="elsewhere") as refused:  # at once, as a wrong password is
            away(address.replace("/postgres", "/elsewhere"))
        assert "secret" not in str(refused.value)
    with Tracker(own_places / "runs" / "r" / SPOOL, address, "tests") as again:  # the database is gone
        append_epoch(own_places / "runs" / "r" / SPOOL, "r", {"epoch": 2, "train/m0": 1.0})
    assert again.trouble is not None
    assert "does not answer" in again.trouble
    assert "secret" not in again.trouble
    assert "secret" not in "".join(f.read_text() for f in (own_places / "runs" / "r").glob("*.json*"))


def test_a_database_that_takes_calls_and_never_answers_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    monkeypatch.setattr("cluster.store.ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = away(f"postgresql://fastray:secret@127.0.0.1:{silent.getsockname()[1]}/postgres")
    assert found is not None
    assert found.startswith("postgresql://***@127.0.0.1")
    assert "does not answer" in found


def test_a_server_with_a_password(
    own_places: Path,
    learn: Learner,
    few_digits: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the environment alone: nothing printed, kept or recorded has it. Without it, that is said before training."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    shutil.copy(empty_store, own_places / "server.db")
    with mlflow_server(own_places / "server", f"sqlite:///{own_places / 'server.db'}", free_port(), auth=True) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        (own_places / "other").mkdir()
        with (
            Tracker(own_places / "other" / SPOOL, address, "tests") as tracker,
            pytest.raises(StoreError, match="authenticated"),
        ):
            tracker.opened()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        tracker = record_a_run(own_places / "runs" / "r", learn)
        check_run(tracker, learn, next((few_digits / "1").iterdir()))
        run: Run = MlflowClient(address).get_run(tracker.run_id("r"))
        assert PASSWORD not in json.dumps(run.to_dictionary())
    printed = capfd.readouterr()
    assert PASSWORD not in printed.out + printed.err
    assert PASSWORD not in "".join(f.read_text() for f in (own_places / "runs" / "r").glob("*.json*"))


def test_a_server_that_dies_and_comes_back(own_places: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stays one, each step stands once; what came after its death is flushed."""
    store, port = f"sqlite:///{own_places / 'server.db'}", free_port()
    shutil.copy(empty_store, own_places / "server.db")
    folder = own_places / "runs" / "r"
    folder.mkdir(parents=True)
    spool = folder / SPOOL
    with mlflow_server(own_places / "server", store, port) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with Tracker(spool, address, "tests") as tracker:
            tracker.opened()
            start_run(spool, "r", "the run", {})
            append_epoch(spool, "r", {"epoch": 0, "train/loss": 3.0})
            wait_until_sent(tracker, spool)
    with Tracker(spool, address, "tests") as tracker:
        append_epoch(spool, "r", {"epoch": 1, "train/loss": 2.0})
        append(spool, "end", "r", status="FINISHED")
    assert tracker.trouble is not None
    assert "does not answer" in tracker.trouble
    with mlflow_server(own_places / "server", store, port) as address:
        (flushed,) = flush_records()
        assert flushed.trouble is None
        client = MlflowClient(address)
        (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
        assert run.info.status == "FINISHED"
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(0, 3.0), (1, 2.0)]


def wait_until_sent(tracker: Tracker, spool: Path) -> None:
    waited = threading.Event()
    while tracker._sender.sent.position < spool.stat().st_size:
        waited.wait(0.05)
