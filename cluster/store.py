"""MLflow's store: opening it, and what each record of a spool makes of it. All by `MlflowClient` and explicit ids."""

import contextlib
import json
import logging
import os
import re
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from blocks.errors import UserError
from cluster.places import shown, sqlite_file
from cluster.registry import log_model
from cluster.sent import Sent, SentRun

PARAMS_A_CALL, METRICS_A_CALL = 100, 1000  # MLflow's limits
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
ANSWER_SECONDS = 5.0
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
# What a database says that may say something else in a while: those whose drivers know `connect_timeout`.
WAITS = {
    "postgresql": ("timeout", "starting up", "shutting down", "recovery mode", "too many", "closed the connection"),
    "mysql": ("timed out", "Too many", "shutdown", "Lost connection"),
}
BATCHED = {"metrics", "system", "tag"}  # sent together, in one request


class StoreError(UserError):
    """MLflow's store cannot be used."""


class Store:
    """MLflow's store behind `MlflowClient`: one experiment, and what the records of the spool in `folder` make of it."""

    def __init__(self, tracking: str, folder: Path, sent: Sent):
        self.client = open_client(tracking)
        self.folder, self.sent = folder, sent
        self.experiment = sent.experiment_id = self._experiment(tracking, sent.experiment)
        self._check_adopted(tracking)

    def _experiment(self, tracking: str, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Beside the sqlite file; a server decides for itself.
        file = sqlite_file(tracking)
        location = None if file is None else (file.parent / "mlruns" / name).as_uri()
        return str(self.client.create_experiment(name, artifact_location=location))

    def _check_adopted(self, tracking: str) -> None:
        from mlflow.exceptions import MlflowException

        known = next((run.id for run in self.sent.runs.values() if run.id), None)
        if known is None:
            return
        try:
            self.client.get_run(known)
        except MlflowException as error:
            raise StoreError(
                f"the run {known} is not in MLflow's store {shown(tracking)}; it was recorded in {self.sent.store}: set "
                "MLFLOW_TRACKING_URI to that one"
            ) from error
        self.sent.store = shown(tracking)

    def send(self, records: Sequence[dict[str, Any]]) -> None:
        """Carry out one record of the spool, or several of one run that are BATCHED, in one request."""
        record = records[0]
        match record["kind"]:
            case "start":
                self._start(record)
            case "metrics" | "system" | "tag":
                self._batch(record["run"], records)
            case "data":
                self._data(record)
            case "text":
                self.client.log_text(self._id(record), record["text"], record["file"])
            case "artifact":
                self.client.log_artifact(self._id(record), str(self.folder / record["path"]), record["folder"])
            case "model":
                log_model(self.client, self.experiment, self.sent.runs[record["run"]], record, self.folder)
            case "end":
                self.client.set_terminated(self._id(record), record["status"], end_time=record["time"])

    def _id(self, record: dict[str, Any]) -> str:
        return self.sent.runs[record["run"]].id

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self.sent.runs.get(record["run"])
        params = [Param(_name(key), value[:LONGEST_PARAM]) for key, value in record["params"].items()]
        if known is None:
            known = self.sent.runs[record["run"]] = SentRun()
            self.sent.write(self.folder)  # a process that dies now, or a lost answer, makes no second run
            known.id = self._created(record)
        else:
            known.id = known.id or self._found(record) or self._created(record)
            self.client.update_run(known.id, status="RUNNING")  # it goes on
            there = self.client.get_run(known.id).data.params  # which never change; what drifts is a metric
            params = [p for p in params if p.key not in there]
        for start in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(known.id, params=params[start : start + PARAMS_A_CALL])

    def _found(self, record: dict[str, Any]) -> str:
        there = self.client.search_runs([self.experiment], f"tags.`fastray.run` = '{record['run']}'", max_results=1)
        return there[0].info.run_id if there else ""

    def _created(self, record: dict[str, Any]) -> str:
        tags = {key: value[:LONGEST_TAG] for key, value in record["tags"].items()} | {"fastray.run": record["run"]}
        if record["parent"]:
            tags["mlflow.parentRunId"] = self.sent.runs[record["parent"]].id
        run = self.client.create_run(self.experiment, start_time=record["time"], tags=tags, run_name=record["name"])
        return str(run.info.run_id)

    def _batch(self, run: str, records: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, RunTag

        known = self.sent.runs[run]
        mark = known.mark
        metrics, tags = [], {}
        for record in records:
            if record["kind"] == "tag":
                tags[record["key"]] = RunTag(record["key"], str(record["value"])[:LONGEST_TAG])
                continue
            if record["kind"] == "metrics":
                if record["step"] <= mark:
                    continue  # it was sent before a restart
                mark = record["step"]
            metrics += [
                Metric(_name(key), float(value), record["time"], record["step"])
                for key, value in record["values"].items()
                if key != "epoch"
            ]
        first = metrics[:METRICS_A_CALL]
        if first or tags:
            self.client.log_batch(known.id, metrics=first, tags=list(tags.values()))
        for start in range(METRICS_A_CALL, len(metrics), METRICS_A_CALL):
            self.client.log_batch(known.id, metrics=metrics[start : start + METRICS_A_CALL])
        known.mark = mark

    def _data(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": shown(record["source"])})
        data = Dataset(
            name=record["name"],
            digest=record["digest"],
            source_type=urlsplit(record["source"]).scheme or "local",
            source=source,
            profile=json.dumps({"num_rows": record["rows"]}),
        )
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(self._id(record), [DatasetInput(data, [context])])


def _name(key: str) -> str:
    # What MLflow takes as a name; one that it refuses would take all values of its request with it.
    return re.sub(r"[^\w.\- :/]", "_", key)


# --- opening -----------------------------------------------------------------------------------------------------------


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
        raise unusable(tracking, first_line(error)) from error


def away(tracking: str) -> str | None:
    """Why a server does not answer now; None when it does, or when the store is no server.

    StoreError when it is a database that lets nobody in with these words.
    """
    parts = urlsplit(tracking)
    scheme = parts.scheme.partition("+")[0]
    if parts.hostname is None or scheme not in PORTS:
        return None
    port = parts.port or PORTS[scheme]
    try:
        if scheme in ("http", "https"):
            _ask(f"{scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}/health")
        else:
            socket.create_connection((parts.hostname, port), timeout=ANSWER_SECONDS).close()
            _log_in(tracking, scheme)
    except OSError as error:
        return f"{shown(tracking)} does not answer: {getattr(error, 'reason', error)}"
    return None


def _ask(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()
        if answer.code >= 500:
            raise OSError(f"HTTP {answer.code}") from None
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # it answers, and MLflow has settings of its own for certificates
            raise


def _log_in(tracking: str, scheme: str) -> None:
    # MLflow itself tries a database that refuses a password for 100 seconds, and one that says nothing for ever.
    if scheme not in WAITS:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    engine = create_engine(tracking, poolclass=NullPool, connect_args={"connect_timeout": int(ANSWER_SECONDS)})
    try:
        engine.connect().close()
    except OperationalError as error:
        reason = first_line(error.orig or error)
        if any(word in reason for word in WAITS[scheme]):
            raise OSError(reason) from None
        raise unusable(tracking, reason) from error


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
        raise unusable(uri, "MLflow takes no % and no ? in its path")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=5, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE fastray_can_write (x)")
            connection.execute("ROLLBACK")
    except (sqlite3.Error, OSError) as error:
        raise unusable(uri, first_line(error)) from error


def unusable(tracking: str, reason: str) -> StoreError:
    """The error for a store that will not work however often it is asked."""
    message = (
        f"MLflow's store {tracking} cannot be written: {reason}. Start from a folder you can write in, or set "
        "MLFLOW_TRACKING_URI to another store or server"
    )
    return StoreError(shown(message, of=tracking))


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
