"""Sums over the ranks of one machine through shared memory, where gloo would send them through a socket.

Two workers of a laptop exchange a ResNet-18's gradients at each step, and small statistics at each BatchNorm layer; through
the loopback of a socket that costs more than the arithmetic. Here each rank copies its numbers into a slot that all ranks
map, and adds the slots in the order of the ranks: the result has the same bits on each of them.

A slot is written again two sums later. A rank that has arrived at a sum has read all earlier ones, so two slots a rank, in
turn, are enough and each sum waits once.
"""

import mmap
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

SLOT = 1 << 20  # float32 numbers; a longer tensor goes in several
LINE = 8  # int64 numbers a cache line, so that ranks do not write to each other's
SPIN_SECONDS = 2e-4  # then the wait gives its core away
LOOK_SECONDS = 1.0  # how often a waiting rank looks whether the others live
# Counter and slot are written by two plain stores. x86 shows them to the other cores in that order; others need not.
ORDERED = platform.machine() in ("x86_64", "AMD64")


class PeerLost(RuntimeError):
    """Another rank's process has ended while this one waited for it."""


class SharedSums:
    """`add(x)`: the sum of float32 tensors over all ranks of one machine, in place. Every rank must call it."""

    def __init__(self, memory: mmap.mmap, rank: int, world: int, pids: list[int]):
        self.rank, self.world, self.pids = rank, world, pids
        counters = world * LINE
        self._arrived = np.frombuffer(memory, np.int64, counters).reshape(world, LINE)[:, 0]
        slots = np.frombuffer(memory, np.float32, 2 * world * SLOT, offset=counters * 8).reshape(2, world, SLOT)
        self._slots = torch.from_numpy(slots)
        self._sums = 0

    @staticmethod
    def bytes_for(world: int) -> int:
        """The size of the memory that `world` ranks share."""
        return world * LINE * 8 + 2 * world * SLOT * 4

    def add(self, x: Tensor) -> None:
        """Make `x` (float32, on the CPU, contiguous) the sum over all ranks. PeerLost when a rank's process has ended."""
        for part in x.view(-1).split(SLOT):
            slots = self._slots[self._sums % 2, :, : len(part)]
            self._sums += 1
            slots[self.rank].copy_(part)
            self._arrived[self.rank] = self._sums
            self._wait()
            torch.add(slots[0], slots[1], out=part)
            for other in range(2, self.world):
                part.add_(slots[other])

    def _wait(self) -> None:
        began = looked = time.perf_counter()
        while self._arrived.min() < self._sums:
            now = time.perf_counter()
            if now - began > SPIN_SECONDS:
                time.sleep(5e-5)
            if now - looked > LOOK_SECONDS:
                looked = now
                for rank, pid in enumerate(self.pids):
                    if self._arrived[rank] < self._sums and not _alive(pid):
                        raise PeerLost(f"the process of rank {rank} has ended while rank {self.rank} waited for it")


def shared_sums() -> SharedSums | None:
    """The shared memory of this process group, or None where its ranks do not share a machine. Every rank must call it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1 or dist.get_backend() != "gloo":
        return None
    folder = Path("/dev/shm")
    able = ORDERED and folder.is_dir()
    name = None
    if rank == 0 and able:
        descriptor, name = tempfile.mkstemp(prefix="fastray-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, SharedSums.bytes_for(world))
        except OSError:  # a container's shared memory may be small: found out now, and not when it is written
            os.unlink(name)
            name = None
        finally:
            os.close(descriptor)
    told = [name]
    dist.broadcast_object_list(told, src=0)
    memory = _mapped(told[0], SharedSums.bytes_for(world)) if able else None
    pids = [0] * world
    dist.all_gather_object(pids, os.getpid())
    usable = [False] * world
    dist.all_gather_object(usable, memory is not None and all(_alive(pid) for pid in pids))
    if name is not None:
        os.unlink(name)  # it lasts as long as the processes that mapped it
    return SharedSums(memory, rank, world, pids) if memory is not None and all(usable) else None


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mapped(name: str | None, size: int) -> mmap.mmap | None:
    if name is None:
        return None
    try:
        descriptor = os.open(name, os.O_RDWR)
    except FileNotFoundError:  # a rank of another machine
        return None
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
