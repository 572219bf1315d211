"""What recording costs: a training that is recorded against the same one that is not, and one report over HTTP.

    .venv/bin/python benchmarks/tracking.py
    ... --epochs 1 --rounds 1 --size 8                         # only to see that it runs

scikit-learn's digits, ResNet-18, in this process, in rounds A, B, C, A, B, C, ...: bare, recorded in a sqlite file, recorded
in a server that is dead. Wall time of the whole fit, with all that is recorded before and after it: pictures, the exported
model, the wait until all is sent. The minimum of the rounds. Then reports of 500 metrics to a server on loopback, one by one.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cluster import record  # noqa: E402
from cluster.places import places  # noqa: E402
from cluster.sent import Sent  # noqa: E402
from cluster.store import Store, away, open_client  # noqa: E402
from pipelines import digits  # noqa: E402
from training import Callback, Learner  # noqa: E402

DEAD = "http://127.0.0.1:9"
METRICS, REPORTS = 500, 30


def learner(size: int) -> Learner:
    """The recipe's Learner, its data prepared."""
    recipe = digits(size=size)
    torch.manual_seed(0)
    learn = recipe.learner(recipe.block.dataloaders(recipe.located(), **recipe.data_settings))
    return learn


def fit_seconds(size: int, epochs: int, callbacks: list[Callback]) -> float:
    """Wall time of a fit, alone in its kind."""
    learn = learner(size)
    began = time.perf_counter()
    with learn.no_logging():
        learn.fit(epochs, 3e-3, callbacks=callbacks)
    return time.perf_counter() - began


def fits(size: int, epochs: int, rounds: int) -> None:
    """The three trainings, in rounds."""
    home = places().tracking
    open_client(home)  # a store is made once, not by each run
    ways: dict[str, Callable[[], float]] = {
        "bare": lambda: fit_seconds(size, epochs, []),
        "recorded": lambda: fit_seconds(size, epochs, [record("bench")]),
        "recorded, server dead": lambda: with_store(DEAD, lambda: fit_seconds(size, epochs, [record("bench")])),
    }
    best = dict.fromkeys(ways, float("inf"))
    fit_seconds(size, 1, [record("warm")])
    for _ in range(rounds):
        for name, run in ways.items():
            best[name] = min(best[name], run())
    for name, seconds in best.items():
        print(f"{name:<24}{seconds:8.2f} s  {seconds / best['bare']:.3f} of bare")


def with_store(tracking: str, run: Callable[[], float]) -> float:
    """`run` with another store."""
    before = os.environ["MLFLOW_TRACKING_URI"]
    os.environ["MLFLOW_TRACKING_URI"] = tracking
    try:
        return run()
    finally:
        os.environ["MLFLOW_TRACKING_URI"] = before


def reports(folder: Path) -> None:
    """Reports of many metrics to MLflow's server on loopback."""
    with server(folder) as address:
        store = Store(address, folder, Sent(address, "reports"))
        start = {"kind": "start", "run": "r", "time": 0, "name": "r", "params": {}, "tags": {}, "parent": ""}
        store.send([start])
        times = []
        for step in range(REPORTS):
            values = {f"train/m{i}": float(i) for i in range(METRICS)}
            began = time.perf_counter()
            store.send([{"kind": "metrics", "run": "r", "time": step, "step": step, "values": values}])
            times.append(time.perf_counter() - began)
    print(f"{METRICS} metrics in one report: {1e3 * min(times):.1f} ms, median {1e3 * sorted(times)[len(times) // 2]:.1f} ms")


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """MLflow's server on a sqlite file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'server.db'}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        while away(f"http://127.0.0.1:{port}") and process.poll() is None:
            time.sleep(0.2)
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory(prefix="fastray-bench-") as scratch:
        os.environ["FASTRAY_STORAGE"] = f"{scratch}/runs"
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        fits(asked.size, asked.epochs, asked.rounds)
        reports(Path(scratch))


if __name__ == "__main__":
    main()
