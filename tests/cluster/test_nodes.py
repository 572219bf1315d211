"""Several nodes, each with a disk of its own: shards find their way, and training outlives what is taken from it.

The functions that a test runs on the cluster stand at the top; they give and take JSON.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from blocks import DataBlock, DataLoaders, RandomSplitter, RegressionBlock
from blocks.prepared import Prepared
from cluster.shards import Nodes as OtherNodes

from .nodes import Nodes, need_own_disks

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
    from dataclasses import replace

    import ray

    prepared = data().prepared
    assert prepared is not None
    assert isinstance(prepared.others, OtherNodes)
    counted = replace(prepared, others=Counted(prepared.others.plan))

    @ray.remote(num_cpus=0, resources={"node0": 1})
    def read(prepared: Prepared, folder: str) -> int:
        os.chdir(folder)
        return sum(t.num_rows for t in prepared.tables())

    return [*ray.get([read.remote(counted, os.getcwd()) for _ in range(2)]), prepared.reused, same_as_here(prepared)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    need_own_disks()
    return tmp_path


def on_disk(nodes: Nodes, number: int) -> set[str]:
    return {path.name for path in nodes.disk(number).glob("prepared/*/*.arrow")}


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    """A head that only drives, and two nodes with a CPU each."""
    with Nodes(folder, cpus=[0, 1, 1]) as nodes:
        yield nodes


def test_shards_stay_where_they_were_made_and_are_fetched_once_and_made_again_when_lost(nodes: Nodes) -> None:
    made = nodes.run(prepares)
    assert not made["reused"]
    assert made["again"] == []
    assert on_disk(nodes, 0) == set()
    each = {number: on_disk(nodes, number) for number in (1, 2)}
    assert len(each[1] | each[2]) == SHARDS == len(each[1]) + len(each[2])

    lost = max(each, key=lambda number: len(each[number]))
    nodes.kill(lost)
    found = nodes.run(prepares)
    assert found["reused"]
    assert found["fingerprint"] == made["fingerprint"]
    assert [f"{len(each[lost])} of {SHARDS} shards" in said for said in found["again"]] == [True]
    assert len(on_disk(nodes, 3 - lost)) == SHARDS

    for path in nodes.disk(0).glob("prepared/*/*"):  # the driver's disk is new, and its node knows nothing
        path.unlink()
    assert nodes.run(two_on_the_head_read_all) == [ROWS, ROWS, True, True]
    assert sorted(map(int, (nodes.folder / "brought").read_text().split())) == list(range(SHARDS))
    assert len(on_disk(nodes, 0)) == SHARDS
