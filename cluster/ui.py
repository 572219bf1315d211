"""MLflow's pages on the records of this folder."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from blocks.errors import UserError
from cluster.places import places, shown
from cluster.store import open_client

HOST = "127.0.0.1"
START_SECONDS = 120.0


def serve_ui(port: int, say: Callable[[str], None] = print) -> None:
    """Serve MLflow's pages on loopback until interrupted. UserError when the port is in use or the store unusable."""
    tracking = places().tracking
    if tracking.startswith(("http://", "https://")):
        say(f"the records are on a server that has pages of its own: {shown(tracking)}")
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
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            if _becomes_healthy(server, port):
                say(f"MLflow: http://{HOST}:{port}  (records: {shown(tracking)}; Ctrl-C ends it)")
                server.wait()
        finally:
            _end(server)
        log.seek(0)
        raise UserError(f"MLflow's server did not start, or has ended by itself:\n{log.read()[-2000:]}")


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
