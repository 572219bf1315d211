"""Shuffled batches of stored pictures: the feed, torch's DataLoader over the same tensors in memory, Ray Data's own iterator.

    .venv-bench/bin/python benchmarks/feed.py             # beside fastai, too (`make bench-env`)
    .venv/bin/python benchmarks/feed.py --rows 1000 --rounds 1

3x128x128 uint8, batch 64, full shuffle (Ray's: a local shuffle buffer of 1,000 rows), every byte of every batch read. One torch
thread; rounds A, B, C, A, B, C, ...; the shortest wall time of each. Then the fixed cost of an epoch: 10 batches of 8 numbers,
without the time of taking the rows.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from blocks import DataBlock, DataLoaders, TensorImage, TensorNumber, Transform, TransformBlock

BATCH = 64


@dataclass
class Pixels(Transform, registered=False):
    """Row `seed` as a picture of noise."""

    size: int

    def encodes(self, seed: int) -> TensorImage:
        noise = np.random.default_rng(seed).integers(0, 256, (3, self.size, self.size), dtype=np.uint8)
        return torch.from_numpy(noise).as_subclass(TensorImage)


@dataclass
class Number(Transform, registered=False):
    """Row `seed` as a number."""

    def encodes(self, seed: int) -> TensorNumber:
        return torch.tensor(float(seed)).as_subclass(TensorNumber)


def stored(rows: int, size: int, batch_size: int) -> DataLoaders:
    """So many training pictures as memory-mapped shards, and a few for validation."""
    block = DataBlock(
        blocks=(TransformBlock(type_tfms=(Pixels(size),)), TransformBlock(type_tfms=(Number(),))),
        get_items=lambda source: range(rows + 8),
        splitter=lambda items: (range(rows), range(rows, rows + 8)),
    )
    return block.dataloaders("noise", batch_size=batch_size)


class Indexed(Dataset[tuple[torch.Tensor, ...]]):
    """Tensors that give a whole batch at once."""

    def __init__(self, *tensors: torch.Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t[rows] for t in self.tensors)


def torch_loaders(x: torch.Tensor, y: torch.Tensor) -> dict[str, Iterable[Any]]:
    """The ways of torch's DataLoader to give shuffled batches of tensors in memory."""
    rows, batches = TensorDataset(x, y), Indexed(x, y)
    sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=False)
    return {
        "DataLoader, row by row": DataLoader(rows, BATCH, shuffle=True),
        "DataLoader, batch by batch": DataLoader(batches, batch_size=None, sampler=sampler),
    }


def ray_loader(x: np.ndarray, y: np.ndarray) -> Callable[[], Iterator[Any]]:
    """Ray Data's iterator over the same rows in its object store."""
    import logging

    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_numpy([np.ascontiguousarray(part) for part in np.array_split(x, 16)]).materialize()

    def epoch() -> Iterator[Any]:
        for batch in data.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=1000):
            yield batch["data"].clone(), None  # its tensors are the object store's own memory

    return epoch


def fastai_loader(rows: int) -> Any:
    """fastai's loader of numbers, 8 a batch, without processes; None where fastai is not installed."""
    try:
        from fastai.data.all import Datasets
    except ImportError:
        return None
    return Datasets(list(range(rows)), [[lambda i: torch.tensor(float(i))]]).dataloaders(bs=8, num_workers=0).train


def read(batches: Iterable[Any]) -> int:
    """Every byte of the pictures."""
    return sum(int(batch[0].reshape(-1).view(torch.int64).sum()) for batch in batches)


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest of so many runs of each, by turns, in seconds."""
    best: dict[str, float] = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def pictures(rows: int, rounds: int, with_ray: bool) -> None:
    """Images a second of each way, and the ratios that are wanted."""
    dls = stored(rows, 128, BATCH)
    feed: Any = dls.train
    x, y = feed.column(0).as_subclass(torch.Tensor), feed.column(1).as_subclass(torch.Tensor)
    epochs = iter(range(10_000))

    def ours(source: Any) -> int:
        source.set_epoch(next(epochs))
        return read(source)

    loaders = torch_loaders(x, y)
    ways: dict[str, Callable[[], Any]] = {"the feed, memory-mapped shards": lambda: ours(feed)}
    lanes: Any = dls.new(lanes=True).train
    ways["the feed in lanes"] = lambda: ours(lanes)
    ways |= {name: (lambda loader=loader: read(loader)) for name, loader in loaders.items()}  # type: ignore[misc]
    ways["slices in order, the floor"] = lambda: read((x[i : i + BATCH], None) for i in range(0, rows, BATCH))
    if with_ray:
        ray_epoch = ray_loader(x.numpy(), y.numpy())
        ways["iter_torch_batches, local shuffle"] = lambda: read(ray_epoch())
    best = interleaved(ways, rounds)
    # By itself, because its processes are in the way of the others.
    loaders["DataLoader, 2 processes"] = DataLoader(
        TensorDataset(x, y), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    best |= interleaved({"DataLoader, 2 processes": lambda: read(loaders["DataLoader, 2 processes"])}, rounds)
    for name, seconds in best.items():
        print(f"  {name:<36} {rows / seconds:>9,.0f} images/s")
    mine = best["the feed, memory-mapped shards"]
    torchs = min(best[name] for name in loaders)
    print(f"  feed / best DataLoader: {torchs / mine:.2f} (wanted >= 1)")
    if with_ray:
        print(f"  feed / iter_torch_batches: {best['iter_torch_batches, local shuffle'] / mine:.2f} (wanted >= 4)")


def fixed_cost(rounds: int) -> None:
    """An epoch of 10 tiny batches less the time that taking the rows takes."""
    feed: Any = stored(80, 1, 8).train
    x = feed.column(0).as_subclass(torch.Tensor)
    orders = torch.randperm(80).view(10, 8)
    ways = {
        "feed": lambda: sum(1 for _ in feed),
        "DataLoader": lambda: sum(1 for _ in DataLoader(TensorDataset(x), 8, shuffle=True)),
        "index_select": lambda: [x.index_select(0, rows) for rows in orders],
    }
    fastai = fastai_loader(80)
    if fastai is not None:
        ways["fastai"] = lambda: sum(1 for _ in fastai)
    best = interleaved(ways, rounds)
    best |= interleaved({name: way for name, way in ways.items() if name != "fastai"}, rounds * 20)
    for name in ways:
        if name != "index_select":
            print(f"  {name:<36} {(best[name] - best['index_select']) * 1e3:.2f} ms (wanted of the feed <= 5)")


def main() -> None:
    """Run all of it in a cache of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-ray", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTRAY_CACHE"] = str(Path(folder))
        print(f"{asked.rows} pictures of 3x128x128, batch {BATCH}, {os.cpu_count()} processors, torch {torch.__version__}")
        pictures(asked.rows, asked.rounds, not asked.without_ray)
        print("an epoch of 10 batches of 8 numbers, beyond taking the rows")
        fixed_cost(asked.rounds)


if __name__ == "__main__":
    main()
