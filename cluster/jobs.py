"""Jobs: the same command on a Ray cluster, followed to its end. Files are shipped; records land where the user looks."""

import asyncio
import ipaddress
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from blocks.errors import UserError
from cluster.places import has_secret, is_local, places, sqlite_file

# Ray's loggers that tell of each upload and each large file.
TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
TOKEN_FILE = Path("~/.ray/auth_token")
AGENT_SECONDS = 60.0


class JobError(UserError):
    """A job cannot be submitted as it is."""


def submit_job(words: Sequence[str], address: str, say: Callable[[str], None] = print) -> int:
    """Run `fastray WORDS` as a job of the cluster at `address`, print its output as it comes, return its exit code.

    The working folder is shipped, less what .gitignore and .rayignore name; fastray itself is installed on the cluster.
    Tracking, cache and storage go along as absolute addresses. JobError when the cluster does not answer, or when one of
    them is local and the cluster is not.
    """
    # `ray start` asks for a token by default; the client sends the one it finds only if told to.
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise JobError(f"{address!r} is not the address of a dashboard: write it as http://127.0.0.1:8265")
    environment = _environment(address)
    try:
        client = JobSubmissionClient(address)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        job = _submitted(
            client,
            entrypoint=_entrypoint(words, address),
            runtime_env={"working_dir": str(Path.cwd()), "excludes": _own_traces(), "env_vars": environment},
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise JobError(f"the cluster at {address} does not take the job: {error}") from error
    stop = f"ray job stop --address {address} {job}"
    say(f"job {job} at {address}; to stop it: {stop}")

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            say(lines.rstrip("\n"))

    try:
        asyncio.run(follow())
        while not client.get_job_status(job).is_terminal():  # a stream of logs may end before its job
            time.sleep(0.3)
        info = client.get_job_info(job)
    except KeyboardInterrupt:
        say(f"the job continues; to stop it: {stop}")
        raise
    except (ConnectionError, RuntimeError, OSError) as error:
        raise JobError(
            f"the cluster at {address} can be followed no more: {error}. The job continues; to stop it: {stop}"
        ) from error
    say(f"job {job} {info.status}")
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return info.driver_exit_code or 1


def _submitted(client: Any, **job: Any) -> str:
    # A cluster that has just begun answers before its nodes' agents do.
    until = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(1)


def _entrypoint(words: Sequence[str], address: str) -> str:
    command = shlex.join(["-m", "pipelines", *words])
    if not _is_this_machine(address):
        return f"python {command}"
    # A cluster of this machine may have been started from an environment whose `python` is another one.
    here = shlex.quote(sys.executable)
    return f"python=python; test -x {here} && python={here}; exec $python {command}"


def _own_traces() -> list[str]:
    # What earlier runs left in the working folder is not part of the job.
    here, now = Path.cwd(), places()
    database = sqlite_file(now.tracking)
    traces = [Path(now.storage), Path(now.cache)]
    if database is not None:
        traces += [database, database.parent / "mlruns"]
    # A file of secrets goes nowhere.
    return [".env"] + [
        f"/{trace.relative_to(here).as_posix()}" for trace in traces if trace.is_relative_to(here) and trace != here
    ]


def _environment(address: str) -> dict[str, str]:
    environment = places().environment()
    tracking = environment["MLFLOW_TRACKING_URI"]
    if has_secret(tracking):
        raise JobError("MLFLOW_TRACKING_URI carries a password or token, which Ray's dashboard would show: set it on the nodes")
    if _is_this_machine(address):
        return environment
    if is_local(tracking):
        raise JobError(
            f"MLFLOW_TRACKING_URI is on this machine ({tracking}), which the cluster at {address} cannot reach: set it to a "
            "server that both can"
        )
    # Folders of this machine mean nothing there; one that the person names is taken to be the cluster's.
    return {name: place for name, place in environment.items() if name == "MLFLOW_TRACKING_URI" or os.environ.get(name)}


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
