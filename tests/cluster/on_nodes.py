"""What the tests of several nodes run on them, as drivers and on workers; it gives and takes JSON.

A file of its own, which both import by its name alone: `nodes.Nodes` has its folder on their path.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from torch import nn

from blocks import DataBlock, DataLoaders, RandomSplitter, RegressionBlock
from blocks.prepared import Prepared
from cluster import Workers
from cluster.shards import Nodes as OtherNodes
from training import Callback, Learner, distributed

ROWS, SHARDS = 1200, 8


def features(row: Any) -> list[float]:
    return [row["a"], row["b"], row["c"]]


def target(row: Any) -> float:
    return row["a"] - 2 * row["b"] + 0.5 * row["c"]


def table() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).normal(size=(ROWS, 3)), columns=["a", "b", "c"])


def block() -> DataBlock:
    """Numbers for a linear model; 8 shards of 150 rows."""
    return DataBlock(
        (RegressionBlock(3), RegressionBlock()), get_x=features, get_y=target, splitter=RandomSplitter(0.2, seed=1)
    )


def data(batch_size: int = 32) -> DataLoaders:
    from cluster import dataloaders

    return dataloaders(block(), table(), batch_size=batch_size)


def same_as_here(prepared: Prepared) -> bool:
    """Whether the shards hold what this process would have put into them; those that are elsewhere are fetched."""
    os.environ["FASTRAY_CACHE"] += "/here"
    here = block().dataloaders(table()).prepared
    assert here is not None
    return [t.to_pydict() for t in prepared.tables()] == [t.to_pydict() for t in here.tables()]


def prepares() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepared = data().prepared
    assert prepared is not None
    again = [str(w.message) for w in said if "made again" in str(w.message)]
    return {"reused": prepared.reused, "again": again, "fingerprint": prepared.fingerprint}


class Counted(OtherNodes):
    """The other nodes, with a line in a file for each shard that is asked of them."""

    def bring(self, prepared: Prepared, number: int) -> None:
        with open("brought", "a") as file:
            file.write(f"{number}\n")
        super().bring(prepared, number)


def two_on_the_head_read_all() -> list[Any]:
    """Two processes of the head, which has no shard, go through the data at the same time."""
    prepared = data().prepared
    assert prepared is not None
    assert isinstance(prepared.others, OtherNodes)
    counted = replace(prepared, others=Counted(prepared.others.plan))

    @ray.remote(num_cpus=0, resources={"node0": 1})
    def read(prepared: Prepared, folder: str) -> int:
        os.chdir(folder)
        return sum(t.num_rows for t in prepared.tables())

    return [*ray.get([read.remote(counted, os.getcwd()) for _ in range(2)]), prepared.reused, same_as_here(prepared)]


class Diary(Callback):
    """A line for each batch of each rank, with the ids of its rows. Slow until there is a file `hurry`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def after_step(self, learn: Learner) -> None:
        ids = [] if learn.batch.borrowed else learn.batch.ids
        node = ray.get_runtime_context().get_node_id()
        line = {"node": node, "world": distributed.world(), "epoch": learn.epoch, "batch": learn.iter, "ids": ids}
        with open(self.folder / f"diary{distributed.rank()}", "a") as file:
            file.write(json.dumps(line) + "\n")
        until = time.monotonic() + 1
        while time.monotonic() < until and not (self.folder / "hurry").exists():
            time.sleep(0.05)


def learner(dls: DataLoaders, *callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return Learner(dls, model, opt_func=lambda p: torch.optim.SGD(p, lr=0.05), lr=0.05, callbacks=callbacks)


def outcome(learn: Learner) -> dict[str, Any]:
    return {
        "weights": [p.tolist() for p in learn.model.parameters()],
        "history": [{k: v for k, v in e.items() if not k.startswith("time/")} for e in learn.recorder.history],
    }


def trains(epochs: int, workers: dict[str, Any]) -> dict[str, Any]:
    if isinstance(workers["number"], list):
        workers["number"] = tuple(workers["number"])
    learn = learner(data(), Diary(Path.cwd()))
    learn.fit(epochs, on=Workers(**workers))
    return outcome(learn)


def drains(node: str, seconds: int) -> None:
    """Tell Ray that a node will be taken away, as a cloud's agent does."""
    asked = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    address = ["--address", os.environ["RAY_ADDRESS"], "--deadline-remaining-seconds", str(seconds)]
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *asked, *address], check=True, capture_output=True
    )
