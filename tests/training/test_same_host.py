"""Sums through shared memory: the same bits on each rank, tensors longer than a slot, and a rank that dies."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from training import distributed, same_host
from training.distributed import add_over_ranks

LENGTHS = (1, 7, 1000, same_host.SLOT + 3)


def join(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)


def of_rank(rank: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank * 1000 + length % 997))


def sum_on(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    before = set(os.listdir("/dev/shm"))
    sums = same_host.shared_sums()
    assert sums is not None
    found = []
    for _ in range(3):  # slots are written again
        for length in LENGTHS:
            x = of_rank(rank, length)
            sums.add(x)
            found.append(x)
    torch.save(found, Path(folder, f"{rank}.pt"))
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("fastray-")}
    distributed.leave()


@pytest.mark.skipif(not same_host.ORDERED, reason="sums go through gloo on this processor")
@pytest.mark.parametrize("world", [2, 3])
def test_sums_have_the_same_bits_on_each_rank(world: int, tmp_path: Path) -> None:
    mp.spawn(sum_on, args=(world, str(tmp_path)), nprocs=world)
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for x, length in zip(first, LENGTHS * 3, strict=True):
        expected = sum(of_rank(rank, length) for rank in range(world))
        assert torch.equal(x, expected)


def lose_a_peer(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    sums = same_host.shared_sums()
    assert sums is not None
    if rank == 1:
        os._exit(0)
    with pytest.raises(same_host.PeerLost, match="rank 1"):
        sums.add(torch.ones(3))


@pytest.mark.skipif(not same_host.ORDERED, reason="sums go through gloo on this processor")
def test_a_rank_whose_process_has_ended_is_noticed(tmp_path: Path) -> None:
    mp.spawn(lose_a_peer, args=(2, str(tmp_path)), nprocs=2)


def without_shared_memory(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    same_host.ORDERED = rank == 0  # one rank cannot: then none does
    assert same_host.shared_sums() is None
    x = torch.full((5,), float(rank + 1))
    add_over_ranks(x)
    assert torch.equal(x, torch.full((5,), 3.0))
    distributed.leave()


def test_one_rank_without_shared_memory_sends_all_through_gloo(tmp_path: Path) -> None:
    mp.spawn(without_shared_memory, args=(2, str(tmp_path)), nprocs=2)
