"""What a step of a Learner on two ranks costs, beside the same step written out with torch's DistributedDataParallel.

    .venv/bin/python benchmarks/ranks_step.py
    ... --steps 3 --rounds 1                    # only to see that it runs

Two processes of one thread on one machine, gloo; each is given its half of the same batches, ready in memory. In rounds
A, B, A, B, ...; seconds a step on the clock, since a rank that waits costs no CPU, the minimum of the rounds. BatchNorm takes
each process's own statistics in both, as DistributedDataParallel's does (`sync_bn=False`); our own over both is a third column.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataLoaders  # noqa: E402
from training import Learner  # noqa: E402
from training.distributed import leave  # noqa: E402

WORLD = 2
Batches = list[tuple[Tensor, Tensor]]
SGD = torch.optim.SGD


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.BatchNorm1d(200), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))


# By name: the model, the shape of a row, and the rows of a rank's half of a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "ResNet-18, 64 px, batch 32": (resnet, (3, 64, 64), 16),
    "3 layers, batch 64": (perceptron, (20,), 32),
}


def bare(make: Callable[[], nn.Module], batches: Batches) -> float:
    """Seconds a step with DistributedDataParallel."""
    model, loss = DistributedDataParallel(make()), nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.01)
    times = []
    for x, y in batches:
        times.append(time.perf_counter())
        loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return per_step(times)


def ours(make: Callable[[], nn.Module], batches: Batches, sync_bn: bool) -> float:
    """Seconds a step with a Learner."""
    times = []

    class Clocked(list[tuple[Tensor, Tensor]]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for batch in list.__iter__(self):
                times.append(time.perf_counter())
                yield batch

    learn = Learner(DataLoaders(Clocked(batches), batches[:1]), make(), nn.CrossEntropyLoss(), SGD, lr=0.01)
    learn.sync_bn = sync_bn
    with learn.no_logging():
        learn.fit(1)
    return per_step(times)


def per_step(times: list[float]) -> float:
    # Without the first steps, in which DistributedDataParallel makes its buckets anew.
    rest = times[min(2, len(times) - 2) :]
    return (rest[-1] - rest[0]) / (len(rest) - 1)


def be_a_rank(rank: int, folder: str, steps: int, rounds: int) -> None:
    """Measure; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    for name, (make, shape, rows) in MODELS.items():
        torch.manual_seed(rank)
        batches = [(torch.randn(rows, *shape), torch.randint(10, (rows,))) for _ in range(steps)]
        found: list[list[float]] = [[], [], []]
        for _ in range(rounds):
            found[0].append(bare(make, batches))
            found[1].append(ours(make, batches, sync_bn=False))
            found[2].append(ours(make, batches, sync_bn=True))
        peer, mine, synced = (min(times) for times in found)
        if rank == 0:
            print(
                f"{name}: DistributedDataParallel {1e3 * peer:.2f} ms a step, Learner {1e3 * mine:.2f} ms ({mine / peer:.2f}), "
                f"with BatchNorm over both {1e3 * synced:.2f} ms ({synced / peer:.2f})",
                flush=True,
            )
    leave()


def main() -> None:
    """Start both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(be_a_rank, args=(folder, words.steps, words.rounds), nprocs=WORLD)


if __name__ == "__main__":
    main()
