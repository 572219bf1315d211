"""What ranks found, for the tests of several files."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import several_ranks
from .several_ranks import Scenario, name_of, scenarios_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ranks_found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, few_digits: Path
) -> Callable[[Scenario, int], list[Any]]:
    """(scenario, world) -> what each rank got, None of one that died. All files' scenarios run at once; warnings are errors."""
    folder = tmp_path_factory.mktemp("ranks")
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    names = sorted(m.__name__.rpartition(".")[2] for m in modules if scenarios_of(m))
    quiet_forks = "ignore:This process:DeprecationWarning"
    command = [sys.executable, "-W", "error", "-W", quiet_forks, several_ranks.__file__, str(folder), *names]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "FEW_DIGITS": str(few_digits)}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    log = folder / "said.txt"
    with log.open("wb") as said:
        # A session of its own, so that all that it forked can be ended.
        running = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        try:
            ended = running.wait(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            raise AssertionError(f"ranks wait for each other: {log.read_text()}") from None
    files = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    failed = [found["failed"] for found in files.values() if "failed" in found]

    def found(scenario: Scenario, world: int) -> list[Any]:
        name = name_of(scenario)
        title = name if scenario.alone else "all"  # type: ignore[attr-defined]
        of_ranks = [files.get(f"{title}-{rank}of{world}", {}) for rank in range(world)]
        may_die = scenario.alone  # type: ignore[attr-defined]
        whole = all(name in of_rank or (may_die and not of_rank) for of_rank in of_ranks)
        assert whole, "\n".join([*failed, log.read_text()])
        return [of_rank.get(name) for of_rank in of_ranks]

    assert ended == 0, log.read_text()
    return found
