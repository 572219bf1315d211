"""Ray itself: started quietly where there is none, joined where $RAY_ADDRESS names one, ended when we started it."""

import contextlib
import logging
import os
import signal
import threading
import warnings
from typing import Any

import psutil

from blocks.errors import UserError

# Train's controller looks at its workers this often; by default each report waits up to two seconds for it.
POLL_SECONDS = "0.2"


class ResourceError(UserError):
    """More was asked for than the cluster has."""


def start_ray() -> None:
    """Have Ray: the cluster of $RAY_ADDRESS, which a submitted job finds set, else one of this process's own.

    A Ray of one's own ends with the thread that starts it, so that should be the main one.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # Without it Ray warns at each start that it will one day leave CUDA_VISIBLE_DEVICES alone on tasks without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    on_termination = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray's own prints a stack and aborts


def stop_ray() -> None:
    """End the Ray that `start_ray` started, or leave the cluster it joined."""
    import ray

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
