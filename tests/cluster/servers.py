"""Real servers on loopback for tests: MLflow's, with or without basic auth, and PostgreSQL. Each ends with its `with` block."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 180.0  # seconds, for machines that are busy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str, port: int, auth: bool = False) -> Iterator[str]:
    """MLflow's server on `store`; its address. auth: it asks for the name `admin` and the password `only-for-tests-8`."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only for tests",
    }
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    if auth:
        settings = {
            "default_permission": "READ",
            "database_uri": f"sqlite:///{folder / 'auth.db'}",
            "admin_username": "admin",
            "admin_password": "only-for-tests-8",
            "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        }
        (folder / "auth.ini").write_text("[mlflow]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
        command += ["--app-name", "basic-auth"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        _wait_for(server, f"http://127.0.0.1:{port}/health", folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own in `folder`; the address of a database. Skips the test where Debian's server is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (apt.txt)")
    programs = found[-1].parent
    as_user: dict[str, str] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        try:
            as_user = {"user": pwd.getpwnam("postgres").pw_name, "group": "postgres"}
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    data = Path(
        "/tmp", f"fastray-postgres-{secrets.token_hex(4)}"
    )  # short, because a socket lies there, and anyone may enter it
    data.mkdir()
    if as_user:
        shutil.chown(data, "postgres", "postgres")
    port = free_port()
    try:
        initialise = [str(programs / "initdb"), "-D", str(data / "db"), "-U", "fastray", "--auth=trust", "--no-sync"]
        subprocess.run(initialise, check=True, capture_output=True, cwd="/", **as_user)  # type: ignore[call-overload]
        with (folder / "postgres.log").open("w") as log:
            settings = ["-h", "127.0.0.1", "-p", str(port), "-k", str(data), "-F"]
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(data / "db"), *settings],
                stdout=log,
                stderr=log,
                cwd="/",
                **as_user,  # type: ignore[arg-type]
            )
        try:
            _wait_for_database(server, port, folder / "postgres.log")
            yield f"postgresql://fastray:secret@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            server.wait(timeout=PATIENCE)
    finally:
        shutil.rmtree(data)


def _wait_for_database(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="fastray", dbname="postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()[-3000:]}")
