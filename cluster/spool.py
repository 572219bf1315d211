"""The spool: a file of JSON lines that says what happened in a run, in order.

Whoever trains only appends; the driver follows the file, prints and sends to MLflow. So a slow or dead server costs the
training nothing, and what was not sent is still there. Imports nothing heavy: Train's controller writes to it as well.

Kinds of records, in the order a run writes them:

    start     name, params, tags, parent      a run begins, or goes on (parent: the spool's name of a sweep's run)
    data      name, source, digest, rows      the data set it trains on
    metrics   step, values                    one epoch
    system    step, values                    how busy the machine is, see `cluster.system_metrics`
    said      line                            what a worker printed; the driver prints it, and nobody records it
    tag       key, value                      something to find it by, or where a checkpoint is; a later value replaces it
    text      file, text                      a small text artifact
    artifact  path, folder                    a file to upload
    model     path, example, inputs, outputs, register, alias    an export to log as a model, see `cluster.registry`
    end       status                          FINISHED, FAILED or KILLED

Paths are relative to the spool's folder, so that a run folder can be moved.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1
SPOOL = "spool.jsonl"  # in a run's folder
ORDER = "fastray.order"  # the tag of a sweep that says by what its trials are sorted: "valid/accuracy max"


def append(spool: Path | str, kind: str, run: str, /, **values: Any) -> None:
    """Add one record: one write of one line, so that lines of several processes never mix."""
    line = json.dumps({"kind": kind, "run": run, "time": int(time.time() * 1000), **values})
    descriptor = os.open(spool, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def append_epoch(path: Path | str, run: str, values: dict[str, Any]) -> None:
    """Add one epoch's values: the one form of it, whoever writes."""
    append(path, "metrics", run, step=int(values["epoch"]), values=values)


def read(path: Path | str, position: int = 0) -> list[tuple[dict[str, Any], int]]:
    """The whole records from byte `position` on, each with the position after it. A line half written is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        if line.endswith(b"\n"):
            position += len(line)
            records.append((json.loads(line), position))
    return records


def name_in(path: Path | str) -> str | None:
    """The run that began first in a spool; None where none did."""
    return next((record["run"] for record, _ in read(path) if record["kind"] == "start"), None)


def follow(path: Path | str, finished: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """The records of a growing file, in batches as they come; ends when `finished` is set and all were given."""
    position = 0
    while True:
        last_look = finished.is_set()
        found = read(path, position)
        if found:
            position = found[-1][1]
            yield [record for record, _ in found]
        if last_look:
            return
        finished.wait(POLL_SECONDS)
