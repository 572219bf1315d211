"""The ways a person uses fastray, each as a real command on a handful of digits: train, predict, sweep, submit, Ctrl-C, ui."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

COMMAND = [sys.executable, "-m", "pipelines"]
PATIENCE = 240.0  # seconds, for machines that are busy


def quick(few_digits: Path, *more: str) -> list[str]:
    """The words for a small model on small pictures."""
    return ["folder", f"path={few_digits}", "size=16", "batch_size=16", "lr=0.003", *more]


def fastray(*words: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def runs(home: Path, experiment: str = "folder") -> list[Run]:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], order_by=["start_time"])


def test_train_on_two_workers(own_places: Path, few_digits: Path) -> None:
    """The whole path: Ray Data, two Ray Train workers, MLflow, the model loaded back in a fresh process."""
    done = fastray("train", *quick(few_digits, "schedule=one_cycle(2)", "workers=2"))
    assert "120 files decoded by Ray Data" in done.stdout
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 15

    (run,) = runs(own_places)
    client = MlflowClient(f"sqlite:///{own_places / 'mlflow.db'}")
    assert run.info.status == "FINISHED"
    assert run.data.params["schedule"] == "one_cycle(2)"
    assert run.data.params["workers"] == "2"
    assert run.data.params["lr"] == "0.003"
    assert len(run.data.tags["fastray.fingerprint"]) == 16
    for name in ("train/loss", "valid/loss", "valid/accuracy", "hp/lr", "time/epoch"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [0, 1]
    files = {a.path for a in client.list_artifacts(run.info.run_id)} | {
        a.path for a in client.list_artifacts(run.info.run_id, "pictures")
    }
    assert files == {"plan.txt", "pictures", "pictures/batch.png", "pictures/predictions.png"}

    model = re.search(r"models:/m-[0-9a-f]+", done.stdout)
    assert model is not None
    picture = next((few_digits / "2").iterdir())
    (line,) = fastray("predict", model[0], str(picture)).stdout.splitlines()
    (logged,) = client.search_logged_models([run.info.experiment_id])
    pyfunc = mlflow.pyfunc.load_model(logged.artifact_location)
    assert [c.name for c in pyfunc.metadata.signature.inputs] == ["image"]
    assert pyfunc.input_example is not None
    answer = pyfunc.predict(pd.DataFrame({"image": [picture.read_bytes()]})).iloc[0]
    assert line.split()[1:] == [answer["label"], f"{answer['probability']:.4f}"]
    code = [f for f in Path(logged.artifact_location.removeprefix("file://")).rglob("*") if f.suffix in (".py", ".pkl", ".pt")]
    assert code == []

    again = fastray("train", *quick(few_digits, "schedule=flat(1)", "workers=0"))
    assert "prepared data found" in again.stdout
    assert "0 files decoded" in again.stdout
    assert "in this process" in again.stdout
    assert [r.info.status for r in runs(own_places)] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_the_main_job_says_little(own_places: Path) -> None:
    done = fastray("train", "digits", "schedule=one_cycle(2)", "workers=2")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 15


def test_an_exception_on_a_worker(own_places: Path, failing_recipe: str) -> None:
    """The person sees it, where it was and their own lines, and nothing of Ray's."""
    done = subprocess.run(
        [*COMMAND, "train", "mine:failing", "workers=2"], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stdout.count("rank 1: looked at 2\n") == 3
    what, where, rank, line, code, everything = done.stderr.splitlines()
    assert what == "ValueError: no such shape: (8, 3)"
    assert re.fullmatch(
        rf"in FailsOnce\.after_pred, epoch 0, batch 2, rank 1 of 2, rows .*; {failing_recipe} in after_pred", where
    )
    assert rank == "on rank 1:"
    assert line == f'  File "{failing_recipe.replace(":", chr(34) + ", line ")}, in after_pred'
    assert code == '    raise ValueError(f"no such shape: {tuple(mine)}")'
    (run,) = runs(own_places, "failing")
    assert run.info.status == "FAILED"
    (folder,) = (own_places / "runs").iterdir()
    assert everything == f"everything that was said: {folder / 'errors.txt'}"
    assert "learner.py" in (folder / "errors.txt").read_text()


def test_sweep(own_places: Path, few_digits: Path) -> None:
    done = fastray(
        "sweep",
        *quick(few_digits)[:4],
        "lr=loguniform(1e-4, 1e-1)",
        "schedule=choice(one_cycle(2), fine_tune(1, freeze_epochs=1))",
        "trials=3",
        "scheduler=asha",
    )
    assert done.stdout.count("files decoded") == 1
    found = runs(own_places)
    (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3
    assert {r.info.status for r in found} == {"FINISHED"}
    assert parent.data.params["lr"] == "loguniform(0.0001, 0.1)"
    assert all(1e-4 <= float(r.data.params["lr"]) <= 0.1 for r in children)
    assert {r.data.params["schedule"] for r in children} <= {"one_cycle(2)", "fine_tune(1, freeze_epochs=1)"}
    assert all("valid/accuracy" in r.data.metrics for r in children)
    best = max(r.data.metrics["valid/accuracy"] for r in children)
    assert f"valid/accuracy {best:.4f};" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_killed_and_leaves_no_process(number: int, own_places: Path, few_digits: Path) -> None:
    words = quick(few_digits, "schedule=flat(500)", "workers=2")
    process = subprocess.Popen([*COMMAND, "train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    started = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {p.name() for p in started}
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.strip() == "fastray: stopped"
    assert [p.name() for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert [r.info.status for r in runs(own_places)] == ["KILLED"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A cluster of this machine, as `ray start --head` makes one; gives the address of its dashboard."""
    port, folder = free_port(), Path("/tmp", f"fastray-test-{os.getpid()}")  # short: sockets lie below it
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    head = subprocess.Popen(
        [
            *command,
            f"--port={free_port()}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}",
            f"--dashboard-agent-listen-port={free_port()}",  # another Ray of this machine may have the usual one
            f"--temp-dir={folder}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    everything = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in everything:
        process.kill()
    head.wait(timeout=20)  # first, and by its own object: reaped by another it would count as running for ever
    psutil.wait_procs(everything, timeout=20)


def test_submit(cluster: str, own_places: Path, few_digits: Path) -> None:
    """The job's output is followed, its records land here, and its exit code is ours."""
    done = fastray("submit", "train", *quick(few_digits, "schedule=flat(1)", "workers=0"), "--address", cluster)
    assert "epoch 1/1" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("SUCCEEDED")
    assert [r.info.status for r in runs(own_places)] == ["FINISHED"]
    failed = subprocess.run(
        [*COMMAND, "submit", "train", "folder", "path=/nowhere", "workers=0", "--address", cluster],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert failed.returncode == 2
    assert "there is no folder '/nowhere'" in failed.stdout


def test_ui(own_places: Path) -> None:
    port = free_port()
    process = subprocess.Popen([*COMMAND, "ui", "--port", str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
        assert b"MLflow" in page.read()
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert [p for p in started if p.is_running()] == []
    process.stdout.close()
