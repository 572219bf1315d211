"""Several ranks, by torch.distributed alone: who am I, sums and gatherings over all ranks, and how a rank leaves.

All collectives of ours are here, so that none of them waits for a rank that will not come. One whose process has ended is
noticed by its socket or its process id. One that left the training at an error (`ends_for_all`) has written so to the store
of the process group, where a rank that has waited for a second looks. Either way the wait ends with `PeerLost`.

Ranks that come to sums of different sizes get an error from shared memory; gloo itself ends a process that gets a message of
another size, and says why.
"""

import contextlib
import inspect
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.same_host import LOOK_SECONDS, PeerLeft, PeerLost, SharedSums, shared_sums

BUCKET_BYTES = 25 * 2**20  # torch's own: worth a message, yet ready before the backward pass ends
T = TypeVar("T", bound=Tensor)


# --- who am I ------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process among those that train together; 0 when it trains alone."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- collectives ---------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """What this process knows of a process group. left: why it is of no more use."""

    shared: SharedSums | None = None
    left: str = ""


# Without keeping one alive: gloo may abort a process that ends before its group has.
_groups: weakref.WeakKeyDictionary[Any, _Group] = weakref.WeakKeyDictionary()


def _group() -> _Group:
    found = _groups.get(dist.group.WORLD)
    if found is None:
        found = _groups[dist.group.WORLD] = _Group()
        if world() > 1 and dist.get_backend() == "gloo":
            found.shared = shared_sums(rank(), world(), gather)
    if found.left:
        raise PeerLost(f"{found.left}; to train again, start all ranks again")
    return found


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, on each of them. Every rank must call it."""
    if not _together():
        return x
    nccl = dist.get_backend() == "nccl"  # it knows GPU memory only
    total = x.detach().to("cuda" if nccl else x.device, copy=True, memory_format=torch.contiguous_format)
    add_over_ranks(total)
    return total.to(x.device)


def add_over_ranks(x: Tensor) -> None:
    """Make a contiguous `x` the sum over all ranks, in place: through shared memory where all ranks are on one machine."""
    work = begin_sum(x)
    if work is not None:
        work.wait()


def begin_sum(x: Tensor) -> "Begun | None":
    """`add_over_ranks` that need not be over yet: `wait()` for what comes back, None where it is."""
    shared = _group().shared
    if shared is None or x.device.type != "cpu":
        with _peers():
            return Begun(dist.all_reduce(x, async_op=True))
    shared.add(x, _look)
    return None


def gather(value: Any) -> list[Any]:
    """Each rank's `value`, plain data of any size, in the order of the ranks, on all of them. Every rank must call it."""
    if not _together():
        return [value]
    _meet()
    found: list[Any] = [None] * world()
    with _peers():
        dist.all_gather_object(found, value)
    return found


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Make each of `tensors` what it is on rank 0. Every rank must call it, with tensors of the same shapes and dtypes."""
    if not _together():
        return
    _meet()
    with torch.no_grad(), _peers():
        for alike in buckets_of(list(tensors)):
            flat = torch.cat([t.detach().reshape(-1) for t in alike])
            dist.broadcast(flat, src=0)
            for t, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                t.data.copy_(part.view(t.shape))


def average_buffers(model: nn.Module) -> None:
    """Make the model's buffers equal on all ranks: running statistics their mean, counters rank 0's."""
    if not _together():
        return
    floats = [b for b in model.buffers() if b.is_floating_point()]
    if floats:
        mean = sum_over_ranks(torch.cat([b.flatten() for b in floats])) / world()
        for buffer, part in zip(floats, mean.split([b.numel() for b in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))
    counters = [b for b in model.buffers() if not b.is_floating_point()]
    if counters:
        copy_from_first(counters)


def buckets_of(tensors: Sequence[T]) -> list[list[T]]:
    """`tensors` in their order, in pieces of one dtype and device and of at most `BUCKET_BYTES`, or one tensor."""
    pieces: list[list[T]] = []
    for t in tensors:
        last = pieces[-1] if pieces else []
        alike = bool(last) and (last[0].dtype, last[0].device) == (t.dtype, t.device)
        if alike and sum(other.nbytes for other in last) + t.nbytes <= BUCKET_BYTES:
            last.append(t)
        else:
            pieces.append([t])
    return pieces


def _meet() -> None:
    # Before a collective of torch's that waits as long as it takes: here, nobody waits for a rank that will not come.
    sum_over_ranks(torch.zeros(1))


# --- waiting -------------------------------------------------------------------------------------------------------------


@dataclass
class Begun:
    """A sum that has begun."""

    work: Any

    def wait(self) -> None:
        """Return when it is over. PeerLost when it never will be."""
        if dist.get_backend() != "gloo":  # nccl's wait is the GPU's, and has a watchdog
            with _peers():
                self.work.wait()
            return
        while not self._over():
            _look()

    def _over(self) -> bool:
        try:
            self.work.wait(timedelta(seconds=LOOK_SECONDS))
        except RuntimeError:
            if not self.work.is_completed():
                return False
            with _peers():
                self.work.wait()  # raises what ended it, if it was not over just now
        return True


# How gloo says that a socket's other end has gone.
GONE = re.compile("connection|closed by peer|reset by peer|broken pipe|timed out|socket", re.IGNORECASE)
LEFT = "fastray/left"


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    # Around torch's collectives.
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or GONE.search(str(error)):
            why = _who_left()
            if why:
                raise PeerLeft(why) from error
            raise PeerLost(f"rank {rank()} has lost another rank: {str(error).splitlines()[0]}") from error
        raise


def _who_left() -> str:
    with contextlib.suppress(RuntimeError):  # the store is on one of the ranks, which may have gone as well
        store = _store()
        if store.check([LEFT]):
            return store.get(LEFT).decode()
    return ""


def _look() -> None:
    why = _who_left()
    if why:
        raise PeerLeft(why)


def _store() -> Any:
    return dist.group.WORLD.get_group_store()  # type: ignore[union-attr]


# --- leaving -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ends_for_all() -> Iterator[None]:
    """Around what all ranks do together, as a decorator too: at an exception that ends it here, it ends on all of them.

    The others raise PeerLeft, where they next wait for this rank. Collectives that had begun are never finished, so the
    process group is of no use any more: further ones raise PeerLost at once.
    """
    try:
        yield
    except BaseException as error:
        if world() > 1:
            _give_up(error)
        raise


def _give_up(error: BaseException) -> None:
    group = _groups.setdefault(dist.group.WORLD, _Group())
    group.left = group.left or f"rank {rank()} has left the training at {type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):  # the rank with the store has gone: then the others notice that
        _store().compare_set(LEFT, "", group.left)  # the first to leave is the cause


def leave() -> None:
    """Leave the process group when all ranks have come to this point; this process can then end. Every rank must call it."""
    _meet()
    dist.destroy_process_group()
    let_go_of_the_group()


def let_go_of_the_group() -> None:
    """Have torch's functions not hold the process group: gloo may abort a process that ends while something holds its group.

    `torch.distributed.nn.functional` has the group as a default argument when it is imported, by torchmetrics for one, after
    the group was made; when imported before, it has None, which means the same to it.
    """
    functions = inspect.getmembers(sys.modules.get("torch.distributed.nn.functional"), inspect.isfunction)
    for _, function in functions:
        defaults = function.__defaults__ or ()
        if any(isinstance(value, dist.ProcessGroup) for value in defaults):
            function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in defaults)
