"""MLflow's pages on the records of this folder, and the address of a run's page among them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlencode

from blocks.errors import UserError
from cluster.places import places, shown
from cluster.sent import SENT, Sent
from cluster.spool import ORDER, SPOOL, read
from cluster.store import open_client

HOST, PORT = "127.0.0.1", 5000
START_SECONDS = 120.0


def page_of(folder: Path, server: str) -> str:
    """The address of a run's page on a server: a sweep's shows its trials, best first. `server` itself where none is known.

    Made for MLflow's pages on model training; without it they open those on language models, and a sweep is one closed line.
    """
    sent, start = Sent.read(folder), next((r for r, _ in read(folder / SPOOL) if r["kind"] == "start"), None)
    if sent is None or start is None or not sent.experiment_id:
        return server
    experiment = f"{server}/#/experiments/{sent.experiment_id}"
    sweep = start["tags"].get("fastray.sweep")
    if sweep is None:
        known = sent.runs.get(start["run"])
        return f"{experiment}/runs/{known.id}" if known and known.id else server
    shown_runs = {"workflowType": "machine_learning", "searchFilter": f"tags.`fastray.sweep` = '{sweep}'"}
    metric, mode = start["tags"][ORDER].rsplit(" ", 1)
    shown_runs |= {"orderByKey": f"metrics.`{metric}`", "orderByAsc": str(mode == "min").lower()}
    return f"{experiment}/runs?{urlencode(shown_runs, quote_via=quote, safe='')}"


def server_of(tracking: str, port: int = PORT) -> str:
    """Where the pages on a store are, without name and password: its server, or the one that `fastray ui` starts."""
    return shown(tracking).replace("***@", "") if tracking.startswith(("http://", "https://")) else f"http://{HOST}:{port}"


def newest_run(storage: Path) -> Path | None:
    """The folder of the run that was recorded last."""
    return max((f.parent for f in storage.glob(f"*/{SENT}")), key=lambda f: (f / SENT).stat().st_mtime, default=None)


def serve_ui(port: int = PORT, run: str | None = None, say: Callable[[str], None] = print) -> None:
    """Serve MLflow's pages on loopback until interrupted, and open that of `run`, by default of the last one.

    run: a run's folder or its name. UserError when the port is in use, the store unusable, or nothing recorded in `run`.
    """
    tracking, storage = places().tracking, Path(places().storage)
    folder = newest_run(storage) if run is None else Path(run) if Path(run).is_dir() else storage / run
    if run is not None and (folder is None or not (folder / SENT).is_file()):
        raise UserError(f"no records are kept in {folder}: give a run's folder, or its name in {storage}")
    server = server_of(tracking, port)
    page = server if folder is None else page_of(folder, server)
    if tracking.startswith(("http://", "https://")):
        say(f"MLflow: {page}")
        _open(page)
        return
    _check_free(port)
    open_client(tracking)  # an unusable store is said in one line here, not in a server's traceback
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": tracking,  # not on the command line, which everybody can see
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own, so that its workers end with it, however this process is told to end.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            if _becomes_healthy(process, port):
                say(f"MLflow: {page}  (records: {shown(tracking)}; Ctrl-C ends it)")
                _open(page)
                process.wait()
        finally:
            _end(process)
        log.seek(0)
        raise UserError(f"MLflow's server did not start, or has ended by itself:\n{log.read()[-2000:]}")


def _open(page: str) -> None:
    # Only where there are windows: a browser of text would take the terminal.
    if sys.stdout.isatty() and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(page)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} is in use ({error.strerror}): give another one with --port") from error


def _becomes_healthy(server: "subprocess.Popen[bytes]", port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def _end(server: "subprocess.Popen[bytes]") -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, how)
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue
