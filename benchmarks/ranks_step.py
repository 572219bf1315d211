"""What a step of a Learner on two ranks costs, beside the same step written out with torch's DistributedDataParallel.

    .venv/bin/python benchmarks/ranks_step.py
    ... --steps 3 --rounds 1                    # only to see that it runs

Two processes of one thread on one machine, gloo; each is given its half of the same batches, ready in memory. In rounds
A, B, A, B, ...; seconds a step on the clock, since a rank that waits costs no CPU, the minimum of the rounds. Like is compared
with like: `sync_bn=False` with DistributedDataParallel as it is, whose BatchNorm takes each process's own statistics;
`sync_bn=True` with the same whose layers sum their statistics over both, written out with an all-reduce each way,
because torch's SyncBatchNorm refuses CPUs.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# By name: the model, the shape of a row, the rows of a rank's half of a batch, and how many times the steps of the first.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "ResNet-18, 64 px, batch 32": (resnet, (3, 64, 64), 16, 1),
    "3 layers, batch 64": (perceptron, (20,), 32, 20),
}


class Sum(torch.autograd.Function):
    """The sum over both processes, and that of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)


class Summed(nn.Module):
    """A BatchNorm layer's training step with the sums of both processes, and nothing else."""

    def __init__(self, own: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        sums = torch.cat([x.sum(dims), x.square().sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total, squares, count = Sum.apply(sums).split([x.shape[1], x.shape[1], 1])
        mean = total / count
        var = squares / count - mean.square()
        own = self.own
        with torch.no_grad():
            assert own.running_mean is not None
            assert own.running_var is not None
            own.running_mean.lerp_(mean, 0.1)
            own.running_var.lerp_(var * count / (count - 1), 0.1)
        shape = (1, -1, *(1 for _ in dims[1:]))
        scale = own.weight * (var + own.eps).rsqrt()
        return x * scale.view(shape) + (own.bias - mean * scale).view(shape)


def with_sums(model: nn.Module) -> nn.Module:
    """`model` with such layers in the place of BatchNorm's."""
    for name, part in model.named_children():
        setattr(model, name, Summed(part) if isinstance(part, nn.modules.batchnorm._BatchNorm) else with_sums(part))
    return model


def bare(make: Callable[[], nn.Module], batches: Batches, sync_bn: bool) -> float:
    """Seconds a step with DistributedDataParallel."""
    model, loss = DistributedDataParallel(with_sums(make()) if sync_bn else make()), nn.CrossEntropyLoss()
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
    for name, (make, shape, rows, times) in MODELS.items():
        torch.manual_seed(rank)
        batches = [(torch.randn(rows, *shape), torch.randint(10, (rows,))) for _ in range(steps * times)]
        found: dict[tuple[str, bool], list[float]] = {}
        for _ in range(rounds):
            for sync_bn in (False, True):
                found.setdefault(("bare", sync_bn), []).append(bare(make, batches, sync_bn))
                found.setdefault(("ours", sync_bn), []).append(ours(make, batches, sync_bn))
        if rank == 0:
            for sync_bn in (False, True):
                peer, mine = (1e3 * min(found[who, sync_bn]) for who in ("bare", "ours"))
                print(
                    f"{name}, sync_bn={sync_bn}: DistributedDataParallel {peer:.2f} ms a step, Learner {mine:.2f} ms "
                    f"({mine / peer:.2f}, wanted <= 1.1)",
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
