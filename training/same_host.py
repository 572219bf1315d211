"""Sums over the ranks of one machine through shared memory, where gloo would send them through a socket.

Two workers of a laptop exchange a ResNet-18's gradients at each step, and small statistics at each BatchNorm layer; through
the loopback of a socket that costs more than the arithmetic. Here each rank copies its numbers into a slot that all ranks
map, and adds the slots in the order of the ranks: the result has the same bits on each of them.

A slot is written again two sums later. A rank that has arrived at a sum has read all earlier ones, so two slots a rank, in
turn, are enough and each sum waits once. Beside its numbers a rank writes how many bytes it has to sum: ranks that came to
different sums must not add them.
"""

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

SLOT = 1 << 22  # bytes; a longer tensor goes in several
LINE = 8  # int64 numbers a cache line, so that ranks do not write to each other's
SPIN_SECONDS = 2e-4  # then the wait gives its core away
PAUSES = 5e-5, 1e-3  # the first, and the longest
LOOK_SECONDS = 1.0  # how often a waiting rank looks whether the others will come
# Counter and slot are written by plain stores. x86 shows them to the other cores in that order; others need not.
ORDERED = platform.machine() in ("x86_64", "AMD64")


class PeerLost(RuntimeError):
    """Another rank will not come to where this one needs it: its process has ended, or it has left the training."""


class PeerLeft(PeerLost):
    """Another rank has left the training at an exception, which that rank raises: this one is not the reason."""


class SharedSums:
    """`add(x)`: the sum of tensors over all ranks of one machine, in place. Every rank must call it."""

    def __init__(self, memory: mmap.mmap, rank: int, world: int, pids: list[int]):
        self.rank, self.world, self.pids = rank, world, pids
        lines = np.frombuffer(memory, np.int64, world * LINE).reshape(world, LINE)
        self._arrived, self._bytes = lines[:, 0], lines[:, 1:3]
        slots = np.frombuffer(memory, np.uint8, 2 * world * SLOT, offset=lines.nbytes).reshape(2, world, SLOT)
        self._slots = torch.from_numpy(slots)
        self._sums = 0

    @staticmethod
    def bytes_for(world: int) -> int:
        """The size of the memory that `world` ranks share."""
        return world * LINE * 8 + 2 * world * SLOT

    def add(self, x: Tensor, look: Callable[[], None]) -> None:
        """Make `x` (on the CPU, contiguous, any dtype) the sum over all ranks.

        look: called each second of waiting. PeerLost when a rank's process has ended. RuntimeError when ranks came to sums
        of different sizes.
        """
        left = x.nbytes
        for part in x.view(-1).split(SLOT // x.element_size()):
            slot = self._sums % 2
            slots = self._slots[slot, :, : part.nbytes].view(part.dtype)
            self._sums += 1
            slots[self.rank].copy_(part)
            self._bytes[self.rank, slot] = left
            self._arrived[self.rank] = self._sums
            self._wait(look)
            if (self._bytes[:, slot] != left).any():
                sizes = ", ".join(f"rank {rank}: {size}" for rank, size in enumerate(self._bytes[:, slot].tolist()))
                raise RuntimeError(f"the ranks came to sums of different sizes (bytes left of {sizes})")
            torch.add(slots[0], slots[1], out=part)
            for other in range(2, self.world):
                part.add_(slots[other])
            left -= part.nbytes

    def _wait(self, look: Callable[[], None]) -> None:
        began = looked = time.perf_counter()
        while self._arrived.min() < self._sums:
            now = time.perf_counter()
            if now - began > SPIN_SECONDS:
                time.sleep(min(max(PAUSES[0], (now - began) / 20), PAUSES[1]))
            if now - looked > LOOK_SECONDS:
                looked = now
                look()
                for rank, pid in enumerate(self.pids):
                    if self._arrived[rank] < self._sums and not _alive(pid):
                        raise PeerLost(f"the process of rank {rank} has ended while rank {self.rank} waited for it")


def shared_sums(rank: int, world: int, gather: Callable[[Any], list[Any]]) -> SharedSums | None:
    """The shared memory of `world` ranks, or None where they do not share a machine. Every rank must call it.

    gather: gives each rank's value to all.
    """
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
    names, pids = zip(*gather((name, os.getpid())), strict=True)
    memory = _mapped(names[0], SharedSums.bytes_for(world)) if able else None
    usable = gather(memory is not None and all(_alive(pid) for pid in pids))
    if name is not None:
        os.unlink(name)  # it lasts as long as the processes that mapped it
    return SharedSums(memory, rank, world, list(pids)) if memory is not None and all(usable) else None


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
