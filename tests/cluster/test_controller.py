"""What the controller writes into the spool, without a cluster: Train's calls are made by the test."""

from pathlib import Path

from cluster.controller import ToSpool
from cluster.runs import restarts_of


def test_a_break_that_is_told_more_than_once_is_one_restart(tmp_path: Path) -> None:
    """While a node is about to go, Train tells of those it has lost at each look."""
    spool = tmp_path / "spool.jsonl"
    report = ToSpool(str(spool), "run", restarts=0, told=0)
    for restarts in (1, 2):
        for _ in range(3):
            report.after_exception(None, {0: RuntimeError("its node has gone")})
        for _ in range(2):
            report.after_report(None, [{"said": [], "epochs": []}], None)
        assert restarts_of(spool) == restarts
