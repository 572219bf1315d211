"""Ray itself: started quietly where there is none, joined where $RAY_ADDRESS names one, ended when we started it."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import psutil

from blocks.errors import UserError
from cluster.preemption import WATCHER

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # else each report waits up to two seconds for the controller
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # what was free a moment ago and is not is asked for again
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same on the workers as here
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own output would stand between ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # with it an interrupted sweep looks like one that ended
}

BUSY_SECONDS = 60.0  # then others are not about to give back what they hold
RELEASE_SECONDS = 3.0  # what a run of one's own held is free again by then
POLL_SECONDS = 0.2

OWN = "FASTRAY_OWN_RAY"  # the environment variable that the processes of a Ray of one's own have

_start: "Future[None] | None" = None


class ResourceError(UserError):
    """More was asked for than the cluster has."""


def start_ray() -> None:
    """Have Ray: the cluster of $RAY_ADDRESS, which a submitted job finds set, else one of this process's own."""
    start_ray_meanwhile()
    if _start is not None:
        _start.result()
    if threading.current_thread() is threading.main_thread():
        # Ray's core has put its own answer to SIGTERM, a stack and an abort, in the place of the process's.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def start_ray_meanwhile() -> None:
    """Begin to start Ray in the background; `start_ray` waits for it. Its seconds of waiting pass while torch loads.

    Always in a thread of its own that lasts: a Ray of one's own ends with the thread that started it, one that is
    interrupted on the way leaves processes behind, and in the main thread it would replace the handler of SIGTERM.
    """
    global _start
    import ray

    for name, value in SETTINGS.items():  # in a Ray that a script has started itself, too: Tune asks in this process
        os.environ.setdefault(name, value)
    if ray.is_initialized() or (_start is not None and not _start.done()):
        return
    started: Future[None] = Future()

    def work() -> None:
        try:
            _init()
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            started.set_exception(error)
        else:
            started.set_result(None)
            threading.Event().wait()

    _start = started
    threading.Thread(target=work, name="fastray-ray", daemon=True).start()


def _init() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault(WATCHER, "1" if address else "0")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ[OWN] = "1"  # all processes of this Ray find it set
    try:
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    finally:
        del os.environ[OWN]


def is_own() -> bool:
    """Whether Ray is one that `start_ray` starts or has started, which ends with its driver; not a cluster that was joined.

    One that a script has begun by `ray.init` itself may have several nodes.
    """
    if os.environ.get("RAY_ADDRESS"):
        return False
    if _start is not None or OWN in os.environ:
        return True
    import ray

    return not ray.is_initialized()


def stop_ray() -> None:
    """End the Ray that `start_ray` started, or leave the cluster it joined."""
    global _start
    import ray

    if _start is not None:
        _start.exception()  # wait until it is there: half started, it could not be ended
        _start = None
    if not ray.is_initialized():
        return
    # Ray ends its raylet so fast that the raylet's own helpers are left behind, for minutes.
    raylets = [p for p in psutil.Process().children() if p.name() == "raylet"]
    theirs = [p for raylet in raylets for p in raylet.children(recursive=True)]
    ray.shutdown()
    _, left = psutil.wait_procs(theirs, timeout=0.5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def check_resources(workers: int, gpu: bool = False, *, asked: str, say: Callable[[str], None] = print) -> None:
    """Have room for so many workers of one CPU (and one GPU) each; alone, Ray would wait for ever.

    asked: what needs them, in words. ResourceError at once when the cluster is too small; when others hold what it has, after
    `BUSY_SECONDS`, and `say` says that it waits.
    """
    import ray

    kinds = ("CPU", "GPU") if gpu else ("CPU",)
    there, need = ray.cluster_resources(), _amounts(dict.fromkeys(kinds, workers), kinds)
    fit = room(gpu)
    if workers > fit:
        raise ResourceError(
            f"no room for {asked}: it takes {need}, the cluster has {_amounts(there, kinds)}. {_instead(fit, gpu)}"
        )
    began, said = time.monotonic(), False
    while any(workers > (free := ray.available_resources()).get(kind, 0) for kind in kinds):
        waited = time.monotonic() - began
        told = f"it takes {need}, others hold all but {_amounts(free, kinds)} of the cluster's {_amounts(there, kinds)}"
        if waited > BUSY_SECONDS:
            instead = _instead(min(int(free.get(kind, 0)) for kind in kinds), gpu)
            raise ResourceError(f"no room for {asked} within {waited:.0f} s: {told}. {instead}, or wait until they are done")
        if waited > RELEASE_SECONDS and not said:
            say(f"wait: {told}; at most {BUSY_SECONDS:g} s for {asked}")
            said = True
        time.sleep(POLL_SECONDS)


def room(gpu: bool) -> int:
    """How many workers of one CPU (and one GPU) each the nodes of the cluster have room for, if nobody else were there."""
    import ray

    kinds = ("CPU", "GPU") if gpu else ("CPU",)
    return sum(min(int(node["Resources"].get(kind, 0)) for kind in kinds) for node in ray.nodes() if node["Alive"])


def _amounts(of: Mapping[str, float], kinds: Sequence[str]) -> str:
    return " and ".join(f"{of.get(kind, 0):g} {kind}{'s' * (of.get(kind, 0) != 1)}" for kind in kinds)


def _instead(fit: int, gpu: bool) -> str:
    if fit:
        return f"Give {fit} or fewer, or start more nodes"
    return "Leave gpu=True out, or start nodes with GPUs" if gpu else "Give 0 to train in this process, or start more nodes"
