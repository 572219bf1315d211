"""Several nodes, each with a disk of its own: shards find their way, and training outlives what is taken from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.workers import START_FAILURES

from .nodes import NetworkedNodes, Nodes, need_networks, need_own_disks
from .on_nodes import ROWS, SHARDS, block, drains, learner, outcome, prepares, table, trains, two_on_the_head_read_all


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


def diary(nodes: Nodes) -> list[dict[str, Any]]:
    """The batches that were trained, in the order of each rank's, whole lines only."""
    lines = [line for path in sorted(nodes.folder.glob("diary*")) for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def worlds(nodes: Nodes) -> list[int]:
    """How many workers there were, one after the other, by rank 0."""
    path = nodes.folder / "diary0"
    lines = path.read_text().splitlines() if path.exists() else []
    seen = [json.loads(line)["world"] for line in lines[:-1]]
    return [world for i, world in enumerate(seen) if i == 0 or world != seen[i - 1]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_before_a_node_is_taken_away_checkpoints_are_written(nodes: Nodes) -> None:
    """Without the notice the run would begin again: it has no other checkpoint in its first epoch, and no failure to spare."""
    training = nodes.driver(trains, 2, {"number": 1, "max_failures": 0})
    nodes.wait(lambda: len(diary(nodes)) >= 3, "a worker trains", training)
    first = diary(nodes)[0]["node"]
    nodes.run(drains, first, 20)
    nodes.wait(lambda: diary(nodes)[-1]["node"] != first, "the worker has moved", training)
    (nodes.folder / "hurry").touch()
    found = nodes.result(training)
    assert len(found["history"]) == 2
    lines = diary(nodes)
    before = sum(line["node"] == first for line in lines)
    repeated = len(lines) - len({(line["epoch"], line["batch"]) for line in lines})
    assert repeated <= 10 < before, "at most 5 seconds and a batch of a second or two, of the 20 and more there were"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_run_goes_on_with_the_nodes_there_are(nodes: Nodes) -> None:
    """A node is killed, and with it the only copy of some shards; later one joins. The result is that of one process."""
    training = nodes.driver(trains, 4, {"number": [1, 2], "checkpoint_steps": 5})
    nodes.wait(lambda: worlds(nodes) == [2], "two workers train", training)
    nodes.kill(2)
    for shard in sorted(nodes.disk(1).glob("prepared/*/*.arrow"))[:3]:
        shard.unlink()
    nodes.wait(lambda: worlds(nodes) == [2, 1], "one worker goes on", training)
    assert len(on_disk(nodes, 1)) == SHARDS
    nodes.start(2)
    nodes.wait(lambda: worlds(nodes) == [2, 1, 2], "two workers train again", training)
    (nodes.folder / "hurry").touch()
    found = nodes.result(training)

    here = learner(block().dataloaders(table(), batch_size=32))
    here.fit(4)
    expected = outcome(here)
    for a, b in zip(found["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [set(e) for e in found["history"]] == [set(e) for e in expected["history"]]
    for a, b in zip(found["history"], expected["history"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)

    rows: dict[tuple[int, int], set[frozenset[str]]] = {}
    for world in (1, 2):
        for key, ids in batches(nodes, world).items():
            rows.setdefault(key, set()).add(ids)
    assert {len(sets) for sets in rows.values()} == {1}, "a global batch has the same rows for any number of workers"
    for epoch in range(4):
        each = [i for (e, _), sets in rows.items() if e == epoch for i in next(iter(sets))]
        assert len(each) == len(set(each)) == len(here.dls.train.ids())
    trained = len((nodes.folder / "diary0").read_text().splitlines())
    assert trained - len(rows) <= 2 * 5, "at most one checkpoint interval is repeated at each restart"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fixed_number_of_workers_waits_until_a_lost_node_is_back(folder: Path) -> None:
    """Longer than Ray Train would try to start workers for which there is no room."""
    tries = START_FAILURES + 3
    with Nodes(folder, cpus=[0, 1, 1], environment={"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}) as nodes:
        training = nodes.driver(trains, 3, {"number": 2, "checkpoint_steps": 5})
        nodes.wait(lambda: len(diary(nodes)) > 12, "two workers train", training)
        nodes.kill(2)
        logs = Path(nodes.temporary)
        nodes.wait(lambda: f"Error count: {tries} (" in controllers(logs), f"{tries} starts have failed", training)
        nodes.start(2)
        (nodes.folder / "hurry").touch()
        found = nodes.result(training)
        assert worlds(nodes) == [2]
    assert [epoch["epoch"] for epoch in found["history"]] == [0, 1, 2]
    here = learner(block().dataloaders(table(), batch_size=32))
    here.fit(3)
    for a, b in zip(found["weights"], outcome(here)["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def controllers(temporary: Path) -> str:
    """What Ray Train's controllers have logged of the workers that they could not start."""
    logs = [path.read_text() for path in temporary.glob("session_2*/logs/train/*controller*.log")]
    return "\n".join(part for text in logs for part in text.split("[FailurePolicy]") if "Source: controller" in part)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_without_a_node_whose_network_is_cut(tmp_path: Path) -> None:
    """The node is not heard to end: its workers live, and gloo's sockets to them stay open."""
    need_networks()
    soon = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
    with NetworkedNodes(tmp_path, cpus=[0, 1, 1], environment=soon) as nodes:
        training = nodes.driver(trains, 3, {"number": [1, 2], "checkpoint_steps": 5})
        nodes.wait(lambda: worlds(nodes) == [2] and len(diary(nodes)) > 12, "two workers train", training)
        nodes.cut(2)
        nodes.wait(lambda: worlds(nodes) == [2, 1], "one worker goes on", training)
        (nodes.folder / "hurry").touch()
        found = nodes.result(training)
    assert [epoch["epoch"] for epoch in found["history"]] == [0, 1, 2]
    here = learner(block().dataloaders(table(), batch_size=32))
    here.fit(3)
    for a, b in zip(found["weights"], outcome(here)["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def batches(nodes: Nodes, world: int) -> dict[tuple[int, int], frozenset[str]]:
    """The rows of each global batch that so many workers trained, by epoch and batch; those that all of them had finished."""
    parts: dict[tuple[int, int], list[list[str]]] = {}
    for line in diary(nodes):
        if line["world"] == world:
            parts.setdefault((line["epoch"], line["batch"]), []).append(line["ids"])
    return {key: frozenset(i for ids in found for i in ids) for key, found in parts.items() if len(found) >= world}
