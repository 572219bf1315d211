"""MLflow, all of it. One thread of the driver follows the spool and sends what it says through `MlflowClient`, by explicit ids.

Kinds of records in the spool, in the order a run writes them:

    start     name, params, tags, parent      a run begins (parent: the spool's name of a sweep's run)
    metrics   step, values                    one epoch
    text      file, text                      a small text artifact
    artifact  path, folder                    a file to upload
    model     path, example                   an export to log as a model, with one encoded item as input example
    end       status                          FINISHED, FAILED or KILLED
"""

import contextlib
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blocks.errors import UserError
from cluster.places import shown, sqlite_file
from cluster.spool import append, follow
from training.schedule import as_words

PARAMS_A_CALL, METRICS_A_CALL = 100, 1000  # MLflow's limits
LONGEST_PARAM = 6000
END_TRIES, END_SECONDS = 3, 20.0


class StoreError(UserError):
    """MLflow's store cannot be used."""


class Store:
    """MLflow's store behind `MlflowClient`: one experiment, and what a spool's records make of it."""

    def __init__(self, tracking: str, experiment: str):
        self.client = open_client(tracking)
        self.experiment = self._experiment(tracking, experiment)
        self.runs: dict[str, str] = {}
        self.models: dict[str, str] = {}

    def _experiment(self, tracking: str, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Beside the sqlite file; a server decides for itself.
        file = sqlite_file(tracking)
        location = None if file is None else (file.parent / "mlruns" / name).as_uri()
        return str(self.client.create_experiment(name, artifact_location=location))

    def send(self, record: dict[str, Any]) -> None:
        """Carry out one record of the spool; epochs go together, by `send_metrics`."""
        match record["kind"]:
            case "start":
                self._start(record)
            case "text":
                self.client.log_text(self.runs[record["run"]], record["text"], record["file"])
            case "artifact":
                self.client.log_artifact(self.runs[record["run"]], record["path"], record["folder"])
            case "model":
                self._model(record)
            case "end":
                self.client.set_terminated(self.runs[record["run"]], record["status"], end_time=record["time"])

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        tags = dict(record["tags"])
        if record["parent"]:
            tags["mlflow.parentRunId"] = self.runs[record["parent"]]
        run = self.client.create_run(self.experiment, start_time=record["time"], tags=tags, run_name=record["name"])
        self.runs[record["run"]] = run.info.run_id
        params = [Param(key, value[:LONGEST_PARAM]) for key, value in record["params"].items()]
        for start in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(run.info.run_id, params=params[start : start + PARAMS_A_CALL])

    def send_metrics(self, run: str, records: Iterable[dict[str, Any]]) -> None:
        """Several epochs of one run in one request."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
            if key != "epoch"
        ]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.runs[run], metrics=metrics[start : start + METRICS_A_CALL])

    def _model(self, record: dict[str, Any]) -> None:
        import mlflow.pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        run = self.runs[record["run"]]
        # Step by step, because `log_model` acts on the process's one tracking address and active run.
        logged = self.client.create_logged_model(self.experiment, name="learner", source_run_id=run)
        with tempfile.TemporaryDirectory() as scratch:
            model = Model(
                artifact_path=logged.artifact_location, run_id=run, model_id=logged.model_id, model_uuid=logged.model_id
            )
            folder = Path(scratch, "model")
            mlflow.pyfunc.save_model(
                path=str(folder),
                mlflow_model=model,
                loader_module="cluster.scoring",
                data_path=record["path"],
                signature=_signature(),
                input_example=_example(Path(record["example"]).read_bytes()),
                pip_requirements=["fastray"],
            )
            self.client.log_model_artifacts(logged.model_id, str(folder))
        self.client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
        self.client.finalize_logged_model(logged.model_id, "READY")
        self.models[record["run"]] = f"models:/{logged.model_id}"


def open_client(tracking: str) -> Any:
    """An `MlflowClient` of a store; a sqlite file is created if it is not there. StoreError when it cannot be written."""
    _settle_mlflow()
    file = sqlite_file(tracking)
    if file is not None:
        _check_writable(file)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it would tell of each table it creates
    try:
        return MlflowClient(tracking_uri=tracking)
    except MlflowException as error:
        raise _unusable(tracking, _first_line(error)) from error


def _settle_mlflow() -> None:
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a dead server fails at once, not after minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)


def _check_writable(file: Path) -> None:
    # MLflow itself tries a sqlite file that cannot be opened for 100 seconds.
    uri = f"sqlite:///{file}"
    if set("%?") & set(str(file)):
        raise _unusable(uri, "MLflow takes no % and no ? in its path")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=5, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE fastray_can_write (x)")
            connection.execute("ROLLBACK")
    except (sqlite3.Error, OSError) as error:
        raise _unusable(uri, _first_line(error)) from error


def _unusable(tracking: str, reason: str) -> StoreError:
    message = (
        f"MLflow's store {tracking} cannot be written: {reason}. Start from a folder you can write in, or set "
        "MLFLOW_TRACKING_URI to another store or server"
    )
    return StoreError(shown(message, of=tracking))


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]),
        outputs=Schema([ColSpec("string", "label"), ColSpec("double", "probability")]),
    )


def _example(encoded: bytes) -> Any:
    import pandas as pd

    return pd.DataFrame({"image": [encoded]})


class Tracker:
    """The thread that follows a spool into MLflow. `with Tracker(...)` sends everything before it ends.

    A store that cannot be opened is a StoreError of `opened()`; one that fails later costs the training nothing, and
    `trouble` says what is still unsent.
    """

    def __init__(self, spool: Path, tracking: str, experiment: str):
        self.spool, self.tracking, self.experiment = spool, tracking, experiment
        self.store: Store | None = None
        self.trouble: str | None = None
        self._unusable: StoreError | None = None
        self._finished = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastray-mlflow", daemon=True)
        self._thread.start()

    def opened(self) -> None:
        """Wait until the store is open. StoreError, with the reason, when it cannot be."""
        self._opened.wait()
        if self._unusable is not None:
            raise self._unusable

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._finished.set()
        try:
            self._thread.join()
        except KeyboardInterrupt:  # how the run ended is still to be sent
            self._thread.join(timeout=END_SECONDS)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a run of the spool, once it was sent."""
        return None if self.store is None else self.store.runs.get(run)

    def model_uri(self, run: str) -> str | None:
        """The address of a run's model, once it was sent."""
        return None if self.store is None else self.store.models.get(run)

    def _work(self) -> None:
        # Whatever goes wrong in this thread is told by `opened` or `trouble`: raised here, nobody would hear of it.
        try:
            store = self.store = Store(self.tracking, self.experiment)
        except StoreError as error:
            self._unusable = error
            return
        except Exception as error:  # noqa: BLE001
            self._unusable = _unusable(self.tracking, _first_line(error))
            return
        finally:
            self._opened.set()
        unsent: list[dict[str, Any]] = []
        for records in follow(self.spool, self._finished):
            for (kind, run), group in groupby(records, key=lambda r: (r["kind"], r["run"])):
                together = list(group)
                if kind == "metrics":
                    self._try(partial(store.send_metrics, run, together))
                else:
                    unsent += [r for r in together if not self._try(partial(store.send, r)) and kind == "end"]
        for record in unsent:  # no run is left RUNNING for one request that failed
            for _ in range(END_TRIES):
                if self._try(partial(store.send, record)):
                    break
                time.sleep(1)

    def _try(self, request: Callable[[], None]) -> bool:
        try:
            request()
        except Exception as error:  # noqa: BLE001
            self.trouble = self.trouble or _first_line(error)
            return False
        return True


def start_run(
    spool: Path, run: str, name: str, params: dict[str, Any], tags: dict[str, str] | None = None, parent: str = ""
) -> None:
    """Have a run recorded from now on; everything in `params` is written as text."""
    texts = {key: as_words(value) for key, value in params.items()}
    append(spool, "start", run, name=name, params=texts, tags=tags or {}, parent=parent)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
