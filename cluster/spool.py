"""The spool: a file of JSON lines that says what happened in a run, in order.

Whoever trains only appends; the driver follows the file, prints and sends to MLflow. So a slow or dead server costs the
training nothing, and what was not sent is still there. Imports nothing heavy: Train's controller writes to it as well.
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


def append(spool: Path | str, kind: str, run: str, /, **values: Any) -> None:
    """Add one record: one write of one line, so that lines of several processes never mix."""
    line = json.dumps({"kind": kind, "run": run, "time": int(time.time() * 1000), **values})
    descriptor = os.open(spool, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def follow(path: Path | str, finished: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """The records of a growing file, in batches as they come; ends when `finished` is set and all were given."""
    position = 0
    while True:
        last_look = finished.is_set()
        if Path(path).exists():
            with open(path, "rb") as file:
                file.seek(position)
                read = file.read()
            whole = read[: read.rfind(b"\n") + 1]
            position += len(whole)
            if whole:
                yield [json.loads(line) for line in whole.splitlines()]
        if last_look:
            return
        finished.wait(POLL_SECONDS)


def append_epoch(path: Path | str, run: str, values: dict[str, Any]) -> None:
    """Add one epoch's values: the one form of it, whoever writes."""
    append(path, "metrics", run, step=int(values["epoch"]), values=values)
