"""Ray itself: started quietly where there is none, joined where $RAY_ADDRESS names one, ended when we started it."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blocks.errors import UserError

# Train's controller looks at its workers this often; by default each report waits up to two seconds for it.
POLL_SECONDS = "0.2"


_STARTING = threading.Lock()


class ResourceError(UserError):
    """More was asked for than the cluster has."""


def start_ray() -> None:
    """Have Ray: the cluster of $RAY_ADDRESS, which a submitted job finds set, else one of this process's own."""
    import ray

    with _STARTING:
        if not ray.is_initialized():
            _init()


def _init() -> None:
    import ray

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # Without it Ray warns at each start that it will one day leave CUDA_VISIBLE_DEVICES alone on tasks without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)


@contextlib.contextmanager
def ray_starting(wanted: bool = True) -> Iterator[None]:
    """Start Ray in the background, if it is wanted: its seconds of waiting pass while files are listed and torch loads."""
    with ThreadPoolExecutor(1, thread_name_prefix="fastray-ray") as thread:
        starting = thread.submit(start_ray) if wanted else None
        yield
    if starting is not None:
        starting.result()


def stop_ray() -> None:
    """End the Ray that `start_ray` started, or leave the cluster it joined."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


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
