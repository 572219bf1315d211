"""Jobs: the same command on a Ray cluster, followed to its end. Files are shipped; records land where the user looks."""

import asyncio
import ipaddress
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from blocks.errors import UserError
from cluster.places import has_password, is_local, places


class JobError(UserError):
    """A job cannot be submitted as it is."""


def submit_job(words: Sequence[str], address: str, say: Callable[[str], None] = print) -> int:
    """Run `fastray WORDS` as a job of the cluster at `address`, print its output as it comes, return its exit code.

    The working folder is shipped, less what .gitignore and .rayignore name. Tracking, cache and storage go along as
    absolute addresses. JobError when the cluster does not answer, or when one of them is local and the cluster is not.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    environment = _environment(address)
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "pipelines", *words]),
            runtime_env={"working_dir": str(Path.cwd()), "env_vars": environment},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"the cluster at {address} does not take the job: {error}") from error
    say(f"job {job} at {address}; to stop it: ray job stop --address {address} {job}")

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            say(lines.rstrip("\n"))

    asyncio.run(follow())
    info = client.get_job_info(job)
    say(f"job {job} {info.status}")
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return info.driver_exit_code or 1


def _environment(address: str) -> dict[str, str]:
    environment = places().environment()
    for name, place in environment.items():
        if has_password(place):
            raise JobError(f"{name} carries a password, which Ray's dashboard would show: set it on the cluster's nodes")
        if is_local(place) and not _is_this_machine(address):
            raise JobError(
                f"{name} is on this machine ({place}), which the cluster at {address} cannot reach: set it to a server or "
                "a storage URL that both can"
            )
    return environment


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
