"""The process group of torch that a run's workers join, for a controller that knows no torch.

Ray Train's own does the same, but is defined beside torch, which the controller would import while nothing else can go on: more
than a second of each start. The workers call Ray Train's functions.
"""

import contextlib
import os
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

LEAVE_SECONDS = 3.0  # after an error on one rank the others wait for it, in a collective; they are about to be ended


class TorchGroup(BackendConfig):
    """nccl where workers have GPUs, else gloo."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Joins

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context


class _Joins(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        world = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, _join, backend, rank, world, address, port) for rank in range(world)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_SECONDS)


def _join(backend: str, rank: int, world: int, address: str, port: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world, "env://")


def _leave(destroy: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy)
