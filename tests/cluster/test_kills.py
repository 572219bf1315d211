"""Killed anywhere, a training ends with the bits of the unbroken one, and its history holds each step once."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.cloudpickle
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from blocks import DataLoaders
from blocks.errors import UserError
from blocks.storage import get, is_url, joined
from cluster import Workers, dataloaders
from cluster.checkpoints import BEST
from cluster.runs import RunError, read_run
from training import Callback, CancelFitException, Learner, distributed

from . import killed
from .killed import BATCHES, EPOCHS, SCHEDULE, Kills, began, digits_block, small_learner

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what these files define travels by value, because workers cannot import them.
ray.cloudpickle.register_pickle_by_value(killed)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

_unbroken: dict[int, Learner] = {}


@pytest.fixture
def dls(few_digits: Path) -> DataLoaders:
    return dataloaders(digits_block(), few_digits, batch_size=16)


def unbroken(world: int, dls: DataLoaders) -> Learner:
    """The Learner that nobody killed, by number of workers; trained once."""
    if world not in _unbroken:
        _unbroken[world] = small_learner(dls)
        _unbroken[world].fit(SCHEDULE, on=Workers(world))
    return _unbroken[world]


def assert_same_bits(learn: Learner, whole: Learner) -> None:
    for (name, a), b in zip(whole.model.state_dict().items(), learn.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert without_times(learn) == without_times(whole)
    assert learn.recorder.losses == whole.recorder.losses


def without_times(learn: Learner) -> list[dict[str, Any]]:
    assert [values["epoch"] for values in learn.recorder.history] == list(range(EPOCHS))
    return [{k: v for k, v in values.items() if not k.startswith("time/")} for values in learn.recorder.history]


def killed_and_replaced(
    workers: Workers, dls: DataLoaders, notes: Path, ranks: tuple[int, ...], at: tuple[int, int]
) -> Learner:
    """The Learner that trained on, after the processes of these ranks were killed at (epoch, batch)."""
    learn = small_learner(dls, Kills(notes, ranks, *at))
    learn.fit(SCHEDULE, on=workers)
    starts = began(notes)
    assert len(starts) == 2, starts
    assert starts[0] == (0, 0) < starts[1] <= at, starts
    return learn


def test_one_of_two_workers_killed(dls: DataLoaders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = killed_and_replaced(Workers(2, checkpoint_steps=2), dls, tmp_path, ranks=(1,), at=(1, 3))
    printed = capsys.readouterr().out
    assert_same_bits(learn, unbroken(2, dls))
    assert [line for line in printed.splitlines() if line.startswith("train: ")] == [
        "train: goes on from the newest checkpoint with 2 workers"
    ]
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("epoch ")] == ["1/3", "2/3", "3/3"]


@pytest.mark.slow  # all of two are killed at a URL, below
def test_all_of_three_workers_killed(dls: DataLoaders, tmp_path: Path) -> None:
    """After checkpoints by the clock: this one has always run out, so that each batch saves."""
    learn = killed_and_replaced(Workers(3, checkpoint_minutes=1e-9), dls, tmp_path, ranks=(0, 1, 2), at=(2, 4))
    assert_same_bits(learn, unbroken(3, dls))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random(dls: DataLoaders, tmp_path: Path, seed: int, world: int) -> None:
    draw = random.Random(seed)
    ranks = tuple(rank for rank in range(world) if draw.random() < 0.5) or (draw.randrange(world),)
    at = draw.randrange(EPOCHS), draw.randrange(BATCHES)
    learn = small_learner(dls, Kills(tmp_path, ranks, *at))
    learn.fit(SCHEDULE, on=Workers(world, checkpoint_steps=draw.randint(1, 4)))
    assert len(began(tmp_path)) == 2
    assert_same_bits(learn, unbroken(world, dls))


def killed_script(storage: str, few_digits: Path, notes: Path) -> str:
    """The name of a run in `storage` whose driver was killed, once its processes are gone."""
    notes.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, killed.__file__, storage, str(few_digits), str(notes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stdout + done.stderr
    (run,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run: ")]
    wait_for_the_end_of_its_workers(notes)
    return run


def wait_for_the_end_of_its_workers(notes: Path) -> None:
    for line in (notes / "began").read_text().splitlines():
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(line.split()[2])).wait(timeout=60)


def test_the_driver_killed_and_the_run_gone_on_with_in_another_folder(
    dls: DataLoaders, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    run = killed_script(here, few_digits, tmp_path / "notes")
    shutil.copytree(here, there)
    shutil.rmtree(here)
    learn = small_learner(dls, Kills(tmp_path / "notes", (), 0, 0))
    with pytest.raises(RunError, match=f"there is no run 'fit-1' in {there}; unfinished there: {run}"):
        learn.fit(SCHEDULE, on=Workers(2, storage=there), resume="fit-1")
    with pytest.raises(UserError, match=r"was begun with schedule=.*: give it the same, not schedule=flat\(5\)"):
        learn.fit(5, on=Workers(2, storage=there), resume=run)
    listed = Path(there, run, "train", "checkpoint_manager_snapshot.json")
    listed.write_bytes(listed.read_bytes()[:50])  # as where the kill comes while Ray Train writes it
    capsys.readouterr()
    learn.fit(SCHEDULE, on=Workers(2, storage=there), resume=run)
    assert_same_bits(learn, unbroken(2, dls))
    starts = began(tmp_path / "notes")
    assert starts[0] == (0, 0) < starts[1] <= (1, 3)
    assert read_run(Path(there, run)).finished
    # What it goes on by names no place; its records do, of where checkpoints were saved then.
    assert here not in "".join(p.read_text() for p in Path(there, run).rglob("*.json"))
    with pytest.raises(RunError, match=f"the run {run} has ended"):
        learn.fit(SCHEDULE, on=Workers(2, storage=there), resume=run)


def test_checkpoints_at_a_url(dls: DataLoaders, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = joined(bucket, "runs")
    learn = killed_and_replaced(Workers(2, storage=storage, checkpoint_steps=2, keep=1), dls, tmp_path, (0, 1), (1, 4))
    assert_same_bits(learn, unbroken(2, dls))
    printed = capsys.readouterr().out
    assert "testing" not in printed
    (run,) = [line.split()[1] for line in printed.splitlines() if line.startswith("run: ")]
    folder = joined(storage, run)
    assert is_url(folder)
    assert read_run(folder).finished
    (tmp_path / BEST).write_bytes(get(folder, BEST))
    best = small_learner(dls).load(tmp_path / BEST)
    scores = [values["valid/accuracy"] for values in learn.recorder.history]
    assert best.validate()["valid/accuracy"] == pytest.approx(max(scores))
    assert len(best.recorder.history) == scores.index(max(scores)) + 1


class StopsAlone(Callback):
    """On one rank, wants the training to end after its third batch."""

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.iter == 2 and distributed.rank() == 1:
            raise CancelFitException


def test_a_checkpoint_does_not_part_ranks_of_which_one_wants_to_stop(dls: DataLoaders, tmp_path: Path) -> None:
    learn = small_learner(dls, StopsAlone())
    learn.fit(SCHEDULE, on=Workers(2, storage=str(tmp_path / "runs"), checkpoint_steps=1))
    assert learn.position.batch == 3
    assert learn.recorder.history == []
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_run(folder).finished


def test_a_training_in_this_process_goes_on_where_its_last_epoch_ended(dls: DataLoaders, tmp_path: Path) -> None:
    class Ends(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.epoch == 2 and learn.training:
                raise KeyboardInterrupt

    here = Workers(0, storage=str(tmp_path / "runs"))
    whole = small_learner(dls)
    whole.fit(SCHEDULE)
    stopped = small_learner(dls, Ends())
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(SCHEDULE, on=here)
    (folder,) = (tmp_path / "runs").iterdir()
    learn = small_learner(dls)
    learn.fit(SCHEDULE, on=here, resume=folder.name)
    assert_same_bits(learn, whole)
    with pytest.raises(RunError, match="has ended"):
        learn.fit(SCHEDULE, on=here, resume=str(folder))


RECIPE = """
import os
from pathlib import Path

from killed import SCHEDULE, Kills, digits_block, small_learner
from training import Recipe, Schedule, recipe


@recipe
def tiny(*, lr: float = 0.1, schedule: Schedule = SCHEDULE, pictures: str = "") -> Recipe:
    "Kills the process that runs it."
    kills = Kills(Path.cwd(), (0,), epoch=1, batch=3, other=os.getpid())
    return Recipe(digits_block(), pictures, lambda dls: small_learner(dls, kills), lr, schedule, batch_size=16)
"""


def test_a_recipe_whose_driver_was_killed_is_resumed_and_recorded_once(
    dls: DataLoaders, few_digits: Path, own_places: Path
) -> None:
    (own_places / "mine.py").write_text(RECIPE)
    shutil.copy(killed.__file__, own_places)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def fastray(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", *words]
        return subprocess.run(command, env=environment, cwd=own_places, capture_output=True, text=True, check=False)

    broken = fastray("train", "mine:tiny", "workers=2", "lr=0.01", f"pictures={few_digits}")
    assert broken.returncode == -9, broken.stdout + broken.stderr
    wait_for_the_end_of_its_workers(own_places)
    (run,) = (own_places / "runs").iterdir()
    resumed = fastray("resume", run.name)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"train: going on with {run.name}, 3 epochs on 2 workers" in resumed.stdout
    assert len(began(own_places)) == 2

    weights = load_file(run / "export" / "model.safetensors")
    for name, tensor in unbroken(2, dls).model.state_dict().items():
        assert torch.equal(weights[name], tensor), name

    client = MlflowClient(f"sqlite:///{own_places}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["fastray.restarts"] == "1"
    losses = client.get_metric_history(recorded.info.run_id, "valid/loss")
    assert [metric.step for metric in losses] == list(range(EPOCHS))
    assert [metric.value for metric in losses] == [values["valid/loss"] for values in unbroken(2, dls).recorder.history]

    again = fastray("resume", run.name)
    assert again.returncode == 2
    assert f"the run {run.name} has ended" in again.stderr
