"""What a spool says is what a real MLflow store holds afterwards; a store that cannot be written is said before training."""

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster.places import places
from cluster.spool import append, append_epoch, follow
from cluster.store import StoreError
from cluster.tracking import Tracker, start_run
from cluster.train import ending


def epoch(number: int, **values: float) -> dict[str, Any]:
    return {"epoch": number, **values}


def test_a_run_is_recorded(own_places: Path) -> None:
    spool = own_places / "spool.jsonl"
    (own_places / "a.png").write_bytes(b"picture")
    with Tracker(spool, places().tracking, "tests") as tracker:
        tracker.opened()
        start_run(
            spool, "r", "the run", {"lr": 0.1, "arch": "resnet18", "long": "x" * 7000}, tags={"fastray.fingerprint": "ab"}
        )
        append(spool, "text", "r", file="plan.txt", text="read, split")
        append(spool, "artifact", "r", path=str(own_places / "a.png"), folder="pictures")
        append(spool, "data", "r", name="digits", source="s3://me:secret@bucket/digits", digest="0123456789abcdef", rows=12)
        append_epoch(spool, "r", epoch(0, **{"train/loss": 2.0}))
        append_epoch(spool, "r", epoch(1, **{"train/loss": 1.0, "valid/recall@5 (top)": 0.5}))
        append(spool, "tag", "r", key="fastray.checkpoint", value="/runs/r/checkpoint_000001")
        append(spool, "end", "r", status="FINISHED")
    assert tracker.trouble is None
    assert not (own_places / "heartbeat").exists()
    client = MlflowClient(places().tracking)
    run = client.get_run(tracker.run_id("r"))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "the run"
    assert run.data.params["lr"] == "0.1"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["fastray.fingerprint"] == "ab"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(0, 2.0), (1, 1.0)]
    assert run.data.metrics.keys() == {"train/loss", "valid/recall_5 _top_"}  # MLflow takes no other characters
    assert run.data.tags["fastray.checkpoint"] == "/runs/r/checkpoint_000001"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "0123456789abcdef")
    assert data.dataset.source == '{"uri": "s3://***@bucket/digits"}'
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["pictures", "plan.txt"]
    assert (own_places / "mlflow.db").is_file()
    assert list((own_places / "mlruns" / "tests").iterdir())


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED"), (SystemExit, "FAILED")]
)
def test_every_end_is_recorded(error: type[BaseException] | None, status: str, own_places: Path) -> None:
    spool = own_places / "spool.jsonl"
    finished = threading.Event()
    finished.set()

    def run() -> None:
        with ending(spool, "r"):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    (records,) = list(follow(spool, finished))
    assert [(r["kind"], r["status"]) for r in records] == [("end", status)]


def test_a_spool_is_followed_line_by_line(own_places: Path) -> None:
    """A line that is only half written is left for the next look."""
    spool, finished = own_places / "spool.jsonl", threading.Event()
    append(spool, "a", "r", n=1)
    with spool.open("a") as file:
        file.write('{"kind": "b", "run')
    followed = follow(spool, finished)
    assert [r["kind"] for r in next(followed)] == ["a"]
    with spool.open("a") as file:
        file.write('": "r"}\n')
    assert [r["kind"] for r in next(followed)] == ["b"]
    finished.set()
    assert list(followed) == []


UNUSABLE = [
    "below a file",
    "no folder can be made there",
    "not a database",
    "a folder",
    "a percent sign",
    "an unknown kind",
]


def unusable_stores(folder: Path) -> dict[str, str]:
    (folder / "a_file").write_text("x")
    (folder / "garbage.db").write_text("this is no database, " * 100)
    return {
        "below a file": f"sqlite:///{folder / 'a_file' / 'mlflow.db'}",
        "no folder can be made there": "sqlite:////proc/fastray/mlflow.db",
        "not a database": f"sqlite:///{folder / 'garbage.db'}",
        "a folder": f"sqlite:///{folder}",
        "a percent sign": f"sqlite:///{folder / 'a%20b' / 'mlflow.db'}",
        "an unknown kind": "gopher://somewhere",
    }


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_store_that_cannot_be_written(kind: str, own_places: Path) -> None:
    uri = unusable_stores(own_places)[kind]
    with Tracker(own_places / "spool.jsonl", uri, "tests") as tracker, pytest.raises(StoreError) as caught:
        tracker.opened()
    assert uri in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_passwords_are_not_shown(own_places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "http://me:secret@127.0.0.1:9"
    with Tracker(own_places / "spool.jsonl", uri, "tests") as tracker:
        tracker.opened()
    assert "http://***@127.0.0.1:9 does not answer" in capsys.readouterr().out
    assert "secret" not in str(tracker.trouble)


def test_passwords_in_what_a_store_answers_are_not_shown(own_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's errors tell the whole address."""
    uri = "http://me:secret@server:9"

    class Refuses:
        def send(self, records: Any) -> None:
            raise RuntimeError(f"API request to {uri}/api failed")

    monkeypatch.setattr("cluster.sender.away", lambda tracking: None)
    monkeypatch.setattr("cluster.sender.REFUSALS", ())
    monkeypatch.setattr("cluster.sender.Store", lambda *_: Refuses())
    with Tracker(own_places / "spool.jsonl", uri, "tests") as tracker:
        append(own_places / "spool.jsonl", "end", "r", status="FINISHED")
    assert tracker.trouble == "API request to http://***@server:9/api failed"


def test_one_failed_request_loses_no_other_record(store: str, own_places: Path) -> None:
    """A missing file is told; what comes after it is recorded, the end above all."""
    spool = own_places / "spool.jsonl"
    with Tracker(spool, places().tracking, "tests") as tracker:
        start_run(spool, "r", "the run", {})
        append(spool, "artifact", "r", path=str(own_places / "gone.png"), folder="pictures")
        append_epoch(spool, "r", epoch(0, **{"train/loss": 2.0}))
        append(spool, "end", "r", status="FINISHED")
    assert tracker.trouble is not None
    assert "gone.png" in tracker.trouble
    run = MlflowClient(places().tracking).get_run(tracker.run_id("r"))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 2.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///mine.db", "sqlite:///{home}/mine.db"),
        ("http://server:5000", "http://server:5000"),
        ("./mlruns", "{home}/mlruns"),
    ],
)
def test_the_store_has_an_absolute_address(
    given: str, expected: str, own_places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert places().tracking == expected.format(home=own_places)


def test_a_store_that_hangs_is_not_waited_for_for_ever(own_places: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not take is told, and stays in the spool."""
    spool, answers = own_places / "spool.jsonl", threading.Event()
    monkeypatch.setattr("cluster.store.Store.send", lambda *_: answers.wait())
    tracker = Tracker(spool, store, "tests")
    tracker.opened(pytest.fail)
    monkeypatch.setattr("cluster.tracking.HANG_SECONDS", 0.5)
    start_run(spool, "r", "the run", {})
    tracker.close()
    assert tracker.trouble is not None
    assert "does not answer" in tracker.trouble
    answers.set()
    tracker._thread.join()
