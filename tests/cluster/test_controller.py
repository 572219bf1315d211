"""What the controller writes into the spool, without a cluster: Train's calls are made by the test."""

from pathlib import Path
from types import SimpleNamespace

from cluster.controller import CountsRestarts
from cluster.runs import restarts_of
from cluster.spool import read


def test_each_start_after_the_first_is_a_restart(tmp_path: Path) -> None:
    """Whatever it is for: a loss, a node taken away with notice, another number of workers."""
    spool = tmp_path / "spool.jsonl"
    counts = CountsRestarts(str(spool), "run", restarts=0)
    for restarts, workers in enumerate((2, 1, 2)):
        counts.after_worker_group_training_start(SimpleNamespace(get_workers=lambda n=workers: [None] * n))
        assert restarts_of(spool) == restarts
    said = [record["line"] for record, _ in read(spool) if record["kind"] == "said"]
    assert said == [f"train: goes on from the newest checkpoint with {n} worker{'s' * (n > 1)}" for n in (1, 2)]


def test_who_resumes_a_run_restarts_it_once(tmp_path: Path) -> None:
    spool = tmp_path / "spool.jsonl"
    counts = CountsRestarts(str(spool), "run", restarts=3)
    counts.after_worker_group_training_start(None)
    assert restarts_of(spool) == 3
    assert [record["kind"] for record, _ in read(spool)] == ["tag"]
