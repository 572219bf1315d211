"""What ranks found, for the tests of several files."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..conftest import write_few_digits
from . import several_ranks
from .several_ranks import Scenario, name_of, scenarios_of

ROOT = Path(__file__).parents[2]


RANKS = pytest.StashKey[tuple[subprocess.Popen[bytes], Path, Path]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The ranks begin now, and are done by the time the tests come to theirs. All files' scenarios; warnings are errors."""
    asking = [i for i in session.items if isinstance(i, pytest.Function) and "ranks_found" in i.fixturenames]
    if not asking or session.config.option.collectonly:
        return
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    names = sorted(m.__name__.rpartition(".")[2] for m in {item.module for item in asking} if scenarios_of(m))
    quiet_forks = "ignore:This process:DeprecationWarning"
    command = [sys.executable, "-W", "error", "-W", quiet_forks, several_ranks.__file__, str(folder), *names]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "FEW_DIGITS": str(write_few_digits(folder / "digits"))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    log = folder / "said.txt"
    with log.open("wb") as said:
        # A session of its own, so that all that it forked can be ended.
        running = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    session.config.stash[RANKS] = running, folder, log
    session.config.add_cleanup(lambda: _end(running, folder))


def _end(running: subprocess.Popen[bytes], folder: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def ranks_found(pytestconfig: pytest.Config) -> Callable[[Scenario, int], list[Any]]:
    """(scenario, world) -> what each rank got, None of one that died."""
    running, folder, log = pytestconfig.stash[RANKS]
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
