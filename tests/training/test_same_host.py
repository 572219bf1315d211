"""Sums through shared memory: the same bits on each rank, tensors longer than a slot, and sums that differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import distributed, same_host

from .several_ranks import WORLDS, on_ranks

pytestmark = pytest.mark.skipif(not same_host.ORDERED, reason="sums go through gloo on this processor")

CASES = [
    (length, dtype)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16)
    for length in (1, 7, 1000, same_host.SLOT // 4 + 3)
]


def of_rank(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    x = 100 * torch.randn(length, generator=torch.Generator().manual_seed(rank * 1000 + length % 997))
    return x.to(dtype)


def no_look() -> None:
    """Nobody leaves."""


@on_ranks(*WORLDS)
def sums(rank: int, world: int) -> list[Tensor]:
    shared = same_host.shared_sums(rank, world, distributed.gather)
    assert shared is not None
    found = []
    for _ in range(2):  # slots are written again
        for length, dtype in CASES:
            x = of_rank(rank, length, dtype)
            shared.add(x, no_look)
            found.append(x)
    # The file has no name any more: it lasts as long as the processes that use it.
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/fastray-" in line]
    assert mapped
    assert all(line.endswith("(deleted)") for line in mapped)
    return found


@on_ranks(2)
def sizes_that_differ(rank: int, world: int) -> list[str]:
    """In the first part they are as long as each other."""
    found = []
    for mine, theirs in ((3, 5), (same_host.SLOT, same_host.SLOT // 4)):
        shared = same_host.shared_sums(rank, world, distributed.gather)
        assert shared is not None
        x = torch.zeros(mine if rank == 0 else theirs)
        with pytest.raises(RuntimeError, match="sums of different sizes") as raised:
            shared.add(x, no_look)
        assert not x.any()
        found.append(str(raised.value))
    return found


@on_ranks(2)
def one_rank_without(rank: int, world: int) -> list[Any]:
    ordered, same_host.ORDERED = same_host.ORDERED, rank == 0  # then none does
    shared = same_host.shared_sums(rank, world, distributed.gather)
    same_host.ORDERED = ordered
    return [shared is None]


@pytest.mark.parametrize("world", WORLDS)
def test_sums_have_the_same_bits_on_each_rank(world: int, ranks_found: Any) -> None:
    first, *others = ranks_found(sums, world)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for x, (length, dtype) in zip(first, CASES * 2, strict=True):
        assert torch.equal(x, sum(of_rank(rank, length, dtype) for rank in range(world)))


def test_sums_of_different_sizes_are_refused_on_each_rank(ranks_found: Any) -> None:
    first, other = ranks_found(sizes_that_differ, 2)
    assert first == other
    assert "rank 0: 12, rank 1: 20" in first[0]


def test_one_rank_without_shared_memory_is_enough_for_all_to_do_without(ranks_found: Any) -> None:
    assert ranks_found(one_rank_without, 2) == [[True], [True]]
