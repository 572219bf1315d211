"""Scenarios on several ranks: gloo processes, without Ray, for the tests of all files at once.

`@on_ranks(2, 3)` marks a function of (rank, world) that gives plain data; the fixture `ranks_found` gives what each rank got.
To start a process costs more than most scenarios. So one program imports the files that have scenarios, and forks: a process a
rank runs all scenarios in turn, with two ranks and then with three; those that break their process group (alone=True) have
processes of their own.
"""

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Scenario = Callable[[int, int], Any]
WORLDS = (2, 3)
LONG = float(os.environ.get("RANKS_MAY_TAKE", "200"))  # seconds


def on_ranks(*worlds: int, alone: bool = False) -> Callable[[Scenario], Scenario]:
    """Mark a scenario: it runs on so many ranks. alone: in processes and a process group of its own."""

    def mark(scenario: Scenario) -> Scenario:
        scenario.worlds, scenario.alone = worlds, alone  # type: ignore[attr-defined]
        return scenario

    return mark


def scenarios_of(module: ModuleType) -> list[Scenario]:
    """Those that are marked in a test file."""
    return [f for f in vars(module).values() if callable(f) and hasattr(f, "worlds") and f.__module__ == module.__name__]


def name_of(scenario: Scenario) -> str:
    """Unique among the test files."""
    return f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"


def be_a_rank(rank: int, folder: Path, worlds: tuple[int, ...], scenarios: list[Scenario]) -> None:
    """Run these as `rank` in groups of so many, one after the other, and save what they give."""
    import torch
    import torch.distributed as dist

    from training import distributed

    faulthandler.dump_traceback_later(LONG, exit=True)  # where it waits
    os.environ["FASTRAY_CACHE"] = str(folder / f"cache{rank}")
    alone = scenarios[0].alone  # type: ignore[attr-defined]
    title = name_of(scenarios[0]) if alone else "all"
    for world in [w for w in worlds if rank < w]:
        meeting = f"file://{folder / f'{title}-meeting{world}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        found: dict[str, Any] = {}
        for scenario in scenarios:
            if world not in scenario.worlds:  # type: ignore[attr-defined]
                continue
            try:
                found[name_of(scenario)] = scenario(rank, world)
            except Exception:  # noqa: BLE001
                found["failed"] = f"{name_of(scenario)} on rank {rank} of {world}: {traceback.format_exc()}"
                break
        torch.save(found, folder / f"{title}-{rank}of{world}.pt")
        if alone:
            os._exit(0)  # its group is broken, and whether it ends well another's concern
        if "failed" in found:
            dist.destroy_process_group()  # those who wait for this rank notice
            distributed.let_go_of_the_group()
        else:
            distributed.leave()
    faulthandler.cancel_dump_traceback_later()


def main(folder: Path, names: list[str]) -> None:
    """Fork the ranks; a rank returns from here as an ordinary program does, since how it ends is part of what is tried."""
    import torch
    import torchmetrics  # noqa: F401  once for all ranks

    torch.set_num_threads(1)
    # A package of these files under a name that no other has, unlike `tests`.
    package = ModuleType("files_with_scenarios")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[package.__name__] = package
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    scenarios = [f for module in modules for f in scenarios_of(module)]
    together = [f for f in scenarios if not f.alone]  # type: ignore[attr-defined]
    jobs: list[tuple[int, tuple[int, ...], list[Scenario]]] = []
    if together:
        jobs += [(rank, WORLDS, together) for rank in range(max(WORLDS))]
    for f in scenarios:
        if f.alone:  # type: ignore[attr-defined]
            jobs += [(rank, (world,), [f]) for world in f.worlds for rank in range(world)]  # type: ignore[attr-defined]
    forked = {}
    for rank, worlds, some in jobs:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            be_a_rank(rank, folder, worlds, some)
            return
        forked[pid] = f"rank {rank} of {worlds} in {name_of(some[0])}"
    for pid, what in forked.items():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status and status != DIED:
            print(f"{what} ended with {status}", file=sys.stderr)
            sys.exit(1)


DIED = 77  # a rank that a scenario kills

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
