"""Real Ray nodes for tests: `ray start` in namespaces, so that each has a disk of its own and, where asked, a network.

    with Nodes(tmp_path, cpus=[1, 1]) as nodes:
        nodes.run(function, argument)    # as the driver, on the first node; returns what the function returns, by JSON
        nodes.kill(1)
        nodes.start(1)

Functions are run and pickled by their names, which drivers and workers import from a file of this folder.

`NetworkedNodes` have a network each, which can be cut. Ray's own `cluster_utils.Cluster` is not used: its nodes share the
test's environment, disk and network, and go only as processes do.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

ROOT = str(Path(__file__).parents[2])
RESULT = "result: "
PATIENCE = 180.0  # seconds for a node to be there, of which a quiet machine needs a few


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def permitted(*command: str) -> bool:
    """Whether a command that needs rights, or a tool, works here."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def need_own_disks() -> None:
    """Skip the test where this process may not give a node a disk of its own."""
    if not permitted("unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"):
        pytest.skip("needs the right to make mount namespaces (unshare --mount), which this machine does not give")


class Nodes:
    """A cluster of `len(cpus)` nodes; the first is the head, on which drivers run.

    All see one file system but for the cache folder, in whose place each finds a folder of its own: `disk(number)`.
    """

    mounts = ""  # shell commands, before the cache folder's

    def __init__(self, folder: Path, cpus: Sequence[int], environment: dict[str, str] | None = None):
        self.folder, self.cpus = folder, list(cpus)
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.port = free_port()
        self.temporary = tempfile.mkdtemp(prefix="fr")  # short: sockets have names in it
        (folder / "token").write_text(secrets.token_hex(16))
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([ROOT, f"{ROOT}/tests/cluster", *filter(None, [os.environ.get("PYTHONPATH")])]),
            "FASTRAY_CACHE": str(self.cache),
            "RAY_ADDRESS": self.address(0),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            **(environment or {}),
        }
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    # What differs where each node has a network of its own.

    def address(self, number: int) -> str:
        import ray

        return f"{ray.util.get_node_ip_address()}:{self.port}"

    def into(self, number: int) -> list[str]:
        """The beginning of the command that starts a node in its namespaces."""
        return ["unshare", "--mount"]

    def __enter__(self) -> Self:
        try:
            self.start(0)
            self.start(*range(1, len(self.cpus)))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def disk(self, number: int) -> Path:
        """What node `number` has in the place of the cache folder."""
        disk = self.folder / f"disk{number}"
        disk.mkdir(exist_ok=True)
        return disk

    def start(self, *numbers: int) -> None:
        """Start nodes, and wait until they have joined."""
        for number in numbers:
            self._start(number)
        for number in numbers:
            self.wait(partial(self._has_started, number), f"node {number} has started")

    def _has_started(self, number: int) -> bool:
        if self.processes[number].poll() is not None:  # `ray start` has half a minute, which a busy machine may not keep
            self._start(number)
        return "Ray runtime started" in self.output(number).read_text()

    def output(self, number: int) -> Path:
        """The file with what node `number` has printed."""
        return self.folder / f"node{number}.log"

    def _start(self, number: int) -> None:
        ip = self.address(number).partition(":")[0]
        role = [f"--address={self.address(0)}"]
        if number == 0:
            role = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.temporary}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={ip}"]
        ray += [f"--num-cpus={self.cpus[number]}", f'--resources={{"node{number}": 100}}', "--object-store-memory=100000000"]
        ray += ["--min-worker-port=0", "--max-worker-port=0"]  # any port: the nodes may share a network
        ray += ["--disable-usage-stats", "--block"]
        mounted = f'{self.mounts} mount --bind "{self.disk(number)}" "{self.cache}" && exec "$@"'
        with open(self.output(number), "wb") as log:
            self.processes[number] = subprocess.Popen(
                [*self.into(number), "sh", "-c", mounted, "sh", *ray],
                stdout=log,
                stderr=log,
                env={k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"},
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], what: str, driver: "subprocess.Popen[str] | None" = None) -> None:
        """Wait until `condition`, and fail with all output if it does not come, or `driver` ends."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and (driver is None or driver.poll() is None):
            if condition():
                return
            time.sleep(0.2)
        said = [log.read_text() for log in sorted(self.folder.glob("*.log"))]
        if driver is not None:
            driver.kill()
            said += driver.communicate()
        raise AssertionError(f"in vain waited until {what}:\n" + "\n".join(said))

    def driver(self, function: Callable[..., Any], *args: Any) -> "subprocess.Popen[str]":
        """Begin to run a function of `on_nodes` as a driver on the head."""
        code = (
            "import importlib, json, sys; name, function, args = json.loads(sys.argv[1]); "
            f"print('\\n{RESULT}' + json.dumps(getattr(importlib.import_module(name), function)(*args)))"
        )
        given = json.dumps([function.__module__.rpartition(".")[2], function.__name__, args])
        inside = ["nsenter", f"--target={self.processes[0].pid}", "--mount", "--net", f"--wd={self.folder}"]
        return subprocess.Popen(
            [*inside, sys.executable, "-W", "ignore", "-c", code, given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def result(self, driver: "subprocess.Popen[str]", seconds: float = 240) -> Any:
        """What the function of a driver returns."""
        try:
            out, errors = driver.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            driver.kill()
            out, errors = driver.communicate()
            raise AssertionError(f"the driver did not end:\n{out}\n{errors}") from None
        assert driver.returncode == 0, f"{out}\n{errors}"
        (found,) = (line for line in out.splitlines() if line.startswith(RESULT))  # Ray may print after it
        return json.loads(found.removeprefix(RESULT))

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function of `on_nodes` as a driver on the head; its arguments and its result travel as JSON."""
        return self.result(self.driver(function, *args))

    def kill(self, number: int) -> None:
        """End a node as a power cut would: all its processes, at once."""
        process = self.processes.pop(number)
        theirs = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in theirs:
            one.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(theirs, timeout=10)

    def stop(self) -> None:
        """End all nodes, the head last."""
        for number in sorted(self.processes, reverse=True):
            self.kill(number)
        shutil.rmtree(self.temporary, ignore_errors=True)


def need_networks() -> None:
    """Skip the test where this process may not give a node a network of its own."""
    need_own_disks()
    name = f"fr{secrets.token_hex(3)}"
    if not permitted("ip", "netns", "add", name):
        pytest.skip("needs `ip netns` (apt-get install iproute2) and the right to make network namespaces")
    made = permitted("ip", "-n", name, "link", "add", "bridge", "type", "bridge")
    subprocess.run(["ip", "netns", "delete", name], check=True)
    if not made:
        pytest.skip("needs a kernel that has bridges between network namespaces")


class NetworkedNodes(Nodes):
    """Nodes in network namespaces, whose cables (veth) go to a bridge in one more; with shared memory of their own, too."""

    mounts = "mount -t tmpfs none /dev/shm &&"  # else their workers would sum gradients there

    def __init__(self, folder: Path, cpus: Sequence[int], environment: dict[str, str] | None = None):
        self.name = f"fr{secrets.token_hex(3)}"
        # The machine's own name means the loopback in each of them.
        super().__init__(folder, cpus, {"GLOO_SOCKET_IFNAME": "cable", **(environment or {})})

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}:{self.port}"

    def into(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}-{number}", *super().into(number)]

    def __enter__(self) -> Self:
        try:
            self._ip("netns", "add", self.name)
            self._ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self.name, "link", "set", "bridge", "up")
            for number in range(len(self.cpus)):
                self._lay_cable(number)
        except BaseException:
            self.stop()
            raise
        return super().__enter__()

    def _lay_cable(self, number: int) -> None:
        own, address = f"{self.name}-{number}", self.address(number).partition(":")[0]
        self._ip("netns", "add", own)
        self._ip("-n", own, "link", "add", "cable", "type", "veth", "peer", "name", f"to{number}", "netns", self.name)
        self._ip("-n", own, "address", "add", f"{address}/24", "dev", "cable")
        for name in ("cable", "lo"):
            self._ip("-n", own, "link", "set", name, "up")
        self._ip("-n", self.name, "link", "set", f"to{number}", "master", "bridge", "up")

    def cut(self, number: int) -> None:
        """Cut a node's cable: its processes live, and nobody hears of them."""
        self._ip("-n", self.name, "link", "set", f"to{number}", "down")

    def stop(self) -> None:
        super().stop()
        for name in [*(f"{self.name}-{number}" for number in range(len(self.cpus))), self.name]:
            permitted("ip", "netns", "delete", name)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)
