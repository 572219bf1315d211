"""`Workers`: where a Learner trains. Here, or on Ray Train workers that bring everything home afterwards."""

import contextlib
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blocks.errors import UserError
from cluster.runtime import check_resources, start_ray, start_ray_meanwhile
from cluster.spool import SPOOL, append_epoch, follow
from training import distributed
from training.callback import Callback
from training.callbacks import Progress, epoch_line
from training.learner import Learner, Rate
from training.schedule import Schedule, total_epochs

STATE_FILE = "learner.pt"


@dataclass(frozen=True)
class Workers:
    """`Workers(0)`: this process. `Workers(4)`: four CPU workers, `Workers(4, gpu=True)`: with a GPU each.

    For `learn.fit(schedule, on=Workers(4))`. storage: where the run's folder is made; a temporary one by default.
    """

    number: int
    gpu: bool = False
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"workers={self.number}: give 0 to train in this process, or how many workers")

    @classmethod
    def asked(cls, number: int | None, default: int | None = None) -> "Workers":
        """So many workers; unsaid, `default`, or else one a GPU, or else this process."""
        gpus = torch.cuda.device_count()
        if number is None:
            number = gpus if default is None else default
        return cls(number, gpu=0 < number <= gpus)

    def check(self, batch_size: int) -> None:
        """What is asked for against what there is, before anything is prepared. UserError with what to write instead."""
        if self.number == 0:
            return
        if batch_size < self.number:
            raise UserError(f"batch_size={batch_size} is the global one, of all {self.number} workers: at least {self.number}")
        self._find_resources()

    def _find_resources(self) -> None:
        start_ray_meanwhile()
        import ray.train.torch  # noqa: F401  seconds, which pass while Ray starts

        start_ray()
        check_resources(CPU=self.number, **({"GPU": self.number} if self.gpu else {}))

    def run(self, learn: Learner, schedule: Schedule, lr: Rate) -> None:
        """Train a copy of `learn` on the workers; afterwards `learn` looks as if it had trained here."""
        if self.number == 0:
            learn.fit(schedule, lr)
            return
        self._find_resources()
        with contextlib.ExitStack() as stack:
            folder = Path(self.storage or stack.enter_context(tempfile.TemporaryDirectory(prefix="fastray-")))
            folder.mkdir(parents=True, exist_ok=True)
            report = next((c for c in learn.callbacks if isinstance(c, SpoolReport)), None)
            spool, run = (folder / SPOOL, "run") if report is None else (Path(report.path), report.run)
            if any(isinstance(c, Progress) for c in learn.callbacks):
                stack.enter_context(_printed(spool, run, total_epochs(schedule)))
            state = _trained_state(self, _shipped(learn), schedule, lr, folder, spool, run)
        learn.load_state_dict(state)


class SpoolReport(Callback):
    """Appends each epoch's values to the spool: the record of a run that trains in this process."""

    order = 80

    def __init__(self, path: str, run: str):
        self.path, self.run = path, run

    def after_epoch(self, learn: Learner) -> None:
        if distributed.rank() == 0:
            append_epoch(self.path, self.run, dict(learn.recorder.values))


class _TrainReport(Callback):
    """Reports each epoch to Ray Train, from every rank."""

    order = 90

    def after_epoch(self, learn: Learner) -> None:
        import ray.train

        ray.train.report(dict(learn.recorder.values))


def _shipped(learn: Learner) -> bytes:
    # What prints and records stays on the driver: it follows the spool.
    from ray import cloudpickle

    at_home = [c for c in learn.callbacks if isinstance(c, Progress | SpoolReport)]
    for callback in at_home:
        learn.remove_callback(callback)
    try:
        return cloudpickle.dumps(learn)
    finally:
        for callback in at_home:
            learn.add_callback(callback)


def _trained_state(
    workers: Workers, learn: bytes, schedule: Schedule, lr: Rate, folder: Path, spool: Path, run: str
) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    from cluster.controller import InterruptibleTrainer, ToSpool

    trainer = InterruptibleTrainer(
        _train_loop,
        train_loop_config={"learn": ray.put(learn), "schedule": schedule, "lr": lr},
        scaling_config=ScalingConfig(num_workers=workers.number, use_gpu=workers.gpu),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            callbacks=[ToSpool(str(spool), run)],
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        # Where one rank fails the others lose their peer: that is not the reason.
        failures = sorted(error.worker_failures.items(), key=lambda rank: ("gloo" in str(rank[1]).lower(), rank[0]))
        raise failures[0][1] from None
    with result.checkpoint.as_directory() as home:
        return torch.load(Path(home, STATE_FILE), map_location="cpu", weights_only=True)


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a worker has one CPU
    learn: Learner = pickle.loads(ray.get(config["learn"]))  # noqa: S301  the driver's own, of this run
    context = ray.train.get_context()
    learn.dls = learn.dls.shard(context.get_world_rank(), context.get_world_size())
    learn.device = get_device()
    learn.add_callback(_TrainReport())
    learn.fit(config["schedule"], config["lr"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if context.get_world_rank() == 0:
            torch.save(learn.state_dict(), os.path.join(folder, STATE_FILE))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=checkpoint)


@contextlib.contextmanager
def _printed(spool: Path, run: str, epochs: int) -> Iterator[None]:
    # A thread prints each epoch's line as the spool grows.
    finished = threading.Event()

    def work() -> None:
        for records in follow(spool, finished):
            for record in records:
                if record["kind"] == "metrics" and record["run"] == run:
                    print(epoch_line(record["values"], epochs), flush=True)

    thread = threading.Thread(target=work, name="fastray-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
