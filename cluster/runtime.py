"""Ray itself: started quietly where there is none, joined where $RAY_ADDRESS names one, ended when we started it."""

import contextlib
import logging
import os
import signal
import threading
from concurrent.futures import Future
from typing import Any

import psutil

from blocks.errors import UserError

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # else each report waits up to two seconds for the controller
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody reads its notices yet; a process fewer
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same on the workers as here
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own output would stand between ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # with it an interrupted sweep looks like one that ended
}

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

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)


def is_own() -> bool:
    """Whether Ray is one of this process's own, which ends with it, and not a cluster that it joined."""
    return not os.environ.get("RAY_ADDRESS")


def stop_ray() -> None:
    """End the Ray that `start_ray` started, or leave the cluster it joined."""
    import ray

    if _start is not None:
        _start.exception()  # wait until it is there: half started, it could not be ended
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


def check_resources(**asked: float) -> None:
    """ResourceError, at once, when the cluster has fewer `CPU` or `GPU` than asked: Ray itself would wait for ever."""
    import ray

    there = ray.cluster_resources()
    for kind, amount in asked.items():
        if amount > there.get(kind, 0):
            raise ResourceError(
                f"{amount:g} {kind}s are asked for, the cluster has {there.get(kind, 0):g}: "
                f"give workers={int(there.get(kind, 0))} or fewer, or start more nodes"
            )
