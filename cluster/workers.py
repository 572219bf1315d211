"""`Workers`: where a Learner trains. Here, or on Ray Train workers that bring everything home afterwards."""

import contextlib
import math
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blocks.errors import UserError
from blocks.feed import Feed
from blocks.storage import filesystem, is_url, shown
from cluster.checkpoints import TRAIN, Checkpoints, SaveHere, mend_list, read_state
from cluster.data import map_on_ray
from cluster.failures import as_final, bringing_home, cannot_travel
from cluster.places import places
from cluster.runs import (
    RESTARTS,
    Run,
    check_data,
    driven,
    find_run,
    finish_run,
    new_run_folder,
    restarts_of,
    run_name,
    words_of,
    write_run,
)
from cluster.runtime import check_resources, start_ray, start_ray_meanwhile
from cluster.said import heard
from cluster.shards import across_nodes, make_lost_again
from cluster.spool import SPOOL, append, append_epoch, follow, read
from training import distributed
from training.callback import Callback
from training.callbacks import Progress, epoch_line
from training.features import compute_ahead
from training.learner import Learner, Rate
from training.schedule import Schedule, total_epochs
from training.state import generators, seed_all, set_generators

RESIZE_SECONDS = 30.0  # how often an elastic run looks whether nodes have come: to take one in costs a restart
START_FAILURES = 3  # so many times Ray Train may fail to start the workers where there is room for them


@dataclass(frozen=True)
class Workers:
    """`Workers(0)`: this process. `Workers(4)`: four CPU workers, `Workers(4, gpu=True)`: with a GPU each.

    For `learn.fit(schedule, on=Workers(4))`. number: how many; `(least, most)`: as many as there are resources for.
    storage: a folder or URL in which each run makes a folder of its own; without it nothing is left of the run but what comes
    home. sync_bn: BatchNorm takes the statistics of the global batch. max_rows: more rows than these do not go through the
    model at once; where a worker's share of a batch is larger, it goes in pieces whose gradients accumulate, each with batch
    statistics of its own. max_failures: so many times a lost process is replaced, and training goes on from the newest
    checkpoint; that a node was taken away with notice does not count. Where nodes are lost, it waits five minutes for as many
    as the (least) number takes. There is one each epoch; within an epoch, every
    `checkpoint_steps` batches or `checkpoint_minutes`. keep: the newest so many stay, and the best one.
    """

    number: int | tuple[int, int]
    gpu: bool = False
    storage: str | None = None
    sync_bn: bool = True
    max_rows: int | None = None
    max_failures: int = 3
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        ends = self.number if isinstance(self.number, tuple) else (self.number, self.number)
        whole = len(ends) == 2 and all(map(_is_whole, ends))
        if not whole or not (ends == (0, 0) or 1 <= ends[0] <= ends[1]):
            raise UserError(
                f"workers={self.number!r}: give 0 to train in this process, how many workers, or (least, most) with least >= 1"
            )
        for name, at_least in (("max_rows", 1), ("max_failures", 0), ("checkpoint_steps", 1), ("keep", 1)):
            value = getattr(self, name)
            unsaid = value is None and name in ("max_rows", "checkpoint_steps")
            if not unsaid and not (_is_whole(value) and value >= at_least):
                raise UserError(f"{name}={value!r}: give a whole number, at least {at_least}")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise UserError(f"checkpoint_minutes={self.checkpoint_minutes!r}: give a number of minutes above 0")

    @property
    def least(self) -> int:
        """How many workers there are at least."""
        return self.number[0] if isinstance(self.number, tuple) else self.number

    @property
    def most(self) -> int:
        """How many workers there are at most."""
        return self.number[1] if isinstance(self.number, tuple) else self.number

    @classmethod
    def asked(cls, number: int | tuple[int, int] | None, default: int | None = None) -> "Workers":
        """So many workers; unsaid, `default`, or else one a GPU, or else this process."""
        gpus = torch.cuda.device_count()
        if number is None:
            number = gpus if default is None else default
        workers = cls(number)
        return replace(workers, gpu=0 < workers.most <= gpus)

    def check(self, batch_size: int) -> None:
        """What is asked for against what there is, before anything is prepared. UserError with what to write instead."""
        if self.most == 0:
            return
        if batch_size < self.most:
            raise UserError(f"batch_size={batch_size} is the global one, of all {self.most} workers: at least {self.most}")
        self._find_resources()

    def _find_resources(self) -> None:
        start_ray_meanwhile()
        import ray.train.torch  # noqa: F401  seconds, which pass while Ray starts

        start_ray()
        at_least = "at least " * (self.least < self.most)
        check_resources(self.least, self.gpu, asked=f"{at_least}{self.least} worker{'s' * (self.least != 1)}")

    def run(self, learn: Learner, schedule: Schedule, lr: Rate, resume: str | None) -> None:
        """Train a copy of `learn` on the workers; afterwards `learn` looks as if it had trained here.

        resume: the run to go on with, by its folder, its URL or its name in `storage`.
        """
        batch_size = getattr(learn.dls.train, "batch_size", None)
        words = words_of({"schedule": schedule, "lr": lr, "batch_size": batch_size})
        data = getattr(learn.dls, "fingerprint", None)
        if resume is not None:
            folder, begun = find_run(resume, self.storage or places().storage)
            if begun.words != words:
                raise UserError(
                    f"{shown(resume)!r} was begun with {_as_settings(begun.words)}: give it the same, not {_as_settings(words)}"
                )
            began_here = begun.runner.get("workers") == 0
            if began_here != (self.most == 0):  # it would not find the other's checkpoints, and begin again
                where, number = ("in this process", "0") if began_here else ("on workers", "1 or more")
                raise UserError(f"{shown(resume)!r} was begun {where}, where its checkpoints are: give Workers of {number}")
            check_data(folder, begun, data)
            InFolder(self, folder, resumed=True).run(learn, schedule, lr, None)
            finish_run(folder)
        elif self.storage is not None:
            folder = new_run_folder(self.storage, "fit")
            write_run(folder, Run("train", None, words, {"workers": self.number}, data))
            print(f"run: {run_name(folder)} in {shown(self.storage)}", flush=True)
            InFolder(self, folder).run(learn, schedule, lr, None)
            finish_run(folder)
        elif self.most == 0:
            learn.fit(schedule, lr)
        else:
            with tempfile.TemporaryDirectory(prefix="fastray-") as temporary:
                InFolder(self, temporary, kept=False).run(learn, schedule, lr, None)


@dataclass(frozen=True)
class InFolder:
    """These workers, for the run whose folder or URL this is. resumed: it goes on from its newest checkpoint, if it has one.

    kept: the folder outlasts the run.
    """

    workers: Workers
    folder: str
    resumed: bool = False
    kept: bool = True

    def run(self, learn: Learner, schedule: Schedule, lr: Rate, resume: str | None) -> None:
        """Train a copy of `learn` on the workers; afterwards `learn` looks as if it had trained here."""
        assert resume is None
        with driven(self.folder):
            if self.workers.most == 0:
                self._run_here(learn, schedule, lr)
            else:
                self._run_on_workers(learn, schedule, lr)

    def _run_on_workers(self, learn: Learner, schedule: Schedule, lr: Rate) -> None:
        self.workers._find_resources()
        if self.resumed:
            mend_list(self.folder)
        prepared = getattr(learn.dls, "prepared", None)
        if prepared is None or prepared.others is None:  # else each node computes what it is going to read
            compute_ahead(learn, schedule, map_on_ray)
        with contextlib.ExitStack() as stack:
            report = next((c for c in learn.callbacks if isinstance(c, SpoolReport)), None)
            if report is not None:
                own = self.folder if self.kept and not is_url(self.folder) else None
                stack.enter_context(report.recording(learn, own))
                spool, run = Path(report.path), report.run_id
            else:
                home = self.folder
                if is_url(home):  # the controller appends to the spool, and storage at a URL only takes whole files
                    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastray-"))
                spool, run = Path(home, SPOOL), "run"
            restarts = restarts_of(spool) + self.resumed
            logged = any(isinstance(c, Progress) for c in learn.callbacks)
            stack.enter_context(_printed(spool, run, total_epochs(schedule) if logged else None))
            stack.enter_context(bringing_home(self.folder if self.kept else None))
            shipped = _shipped(learn)
            state = _trained_state(self.workers, shipped, schedule, lr, self.folder, str(spool), run, restarts)
            learn.load_state_dict(state)

    def _run_here(self, learn: Learner, schedule: Schedule, lr: Rate) -> None:
        saves = SaveHere(self.folder)
        report = next((c for c in learn.callbacks if isinstance(c, SpoolReport)), None)
        if self.resumed and report is not None and report.path:
            append(report.path, "tag", report.run_id, key=RESTARTS, value=str(restarts_of(Path(report.path)) + 1))
        with learn.added_callbacks(saves):
            state = saves.read() if self.resumed else None
            if state is None:
                learn.fit(schedule, lr)
            else:
                learn.load_state_dict(state)
                if not state["finished"]:
                    learn.resume()
            saves.save(learn, finished=True)


class SpoolReport(Callback):
    """Appends each epoch's values to the spool: the record of a run that trains in this process."""

    order = 80

    def __init__(self, path: str, run: str):
        self.path, self.run_id = path, run

    def recording(self, learn: Learner, folder: str | None) -> contextlib.AbstractContextManager[None]:
        """While `learn` trains elsewhere, in `folder` where that is kept on this machine: the driver's side of the record."""
        return contextlib.nullcontext()

    def after_epoch(self, learn: Learner) -> None:
        if distributed.rank() == 0:
            append_epoch(self.path, self.run_id, dict(learn.recorder.values))


def _shipped(learn: Learner) -> bytes:
    # What prints and records stays on the driver: it follows the spool.
    from ray import cloudpickle

    at_home = [c for c in learn.callbacks if isinstance(c, Progress | SpoolReport)]
    dls = learn.dls
    for callback in at_home:
        learn.remove_callback(callback)
    try:
        learn.dls = across_nodes(dls)
        return cloudpickle.dumps(learn)
    except Exception as error:
        raise cannot_travel(learn, error) from error
    finally:
        learn.dls = dls
        for callback in at_home:
            learn.add_callback(callback)


def _trained_state(
    workers: Workers, learn: bytes, schedule: Schedule, lr: Rate, folder: str, spool: str, run: str, restarts: int
) -> dict[str, Any]:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from cluster.controller import NODES_SECONDS, CountsRestarts, InterruptibleTrainer, ToSpool
    from cluster.group import TorchGroup

    # While a lost node is waited for, each time-out of Train's counts as a failure to start.
    waits = math.ceil(NODES_SECONDS / float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]))
    storage, path = filesystem(folder) if is_url(folder) else (None, folder)
    trainer = InterruptibleTrainer(
        _train_loop,
        train_loop_config={
            "learn": ray.put(learn),
            "schedule": schedule,
            "lr": lr,
            "generators": ray.put(generators()),  # tensors, for which the controller would import torch
            "sync_bn": workers.sync_bn,
            "max_rows": workers.max_rows,
            "checkpoints": (folder, workers.checkpoint_steps, workers.checkpoint_minutes),
        },
        backend_config=TorchGroup(),
        scaling_config=ScalingConfig(
            num_workers=workers.number, use_gpu=workers.gpu, elastic_resize_monitor_interval_s=RESIZE_SECONDS
        ),
        run_config=RunConfig(
            name=TRAIN,
            storage_path=path,
            storage_filesystem=storage,
            callbacks=[ToSpool(spool, run), CountsRestarts(spool, run, restarts)],
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=START_FAILURES + waits),
            checkpoint_config=CheckpointConfig(num_to_keep=workers.keep),
        ),
    )
    result = trainer.fit()
    return read_state(result.checkpoint, rank=0)


@heard()
@as_final()
def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a worker has one CPU
    learn: Learner = pickle.loads(ray.get(config["learn"]))  # noqa: S301  the driver's own, of this run
    make_lost_again(learn.dls)
    rank, world = distributed.rank(), distributed.world()
    folder = config["checkpoints"][0]
    if not is_url(folder) and not Path(folder).is_dir():
        raise UserError(
            f"the run's folder {folder} is not to be seen from the node {ray.util.get_node_ip_address()}: workers on several "
            'nodes need Workers(storage=...) to be a folder that all of them share, or a URL such as "s3://bucket/runs"'
        )
    learn.dls = learn.dls.shard(rank, world)
    learn.device, learn.max_rows = get_device(), config["max_rows"]
    learn.sync_bn = config["sync_bn"] and not _in_pieces(learn)
    checkpoints = Checkpoints(*config["checkpoints"])
    learn.add_callback(checkpoints)
    newest = ray.train.get_checkpoint()
    if newest is None:
        set_generators(ray.get(config["generators"]))
        if rank:  # numbers of its own, and the same in each run
            seed_all(int(torch.randint(2**31, ())) + rank)
        learn.fit(config["schedule"], config["lr"])
    else:
        state = read_state(newest, rank, world)
        learn.load_state_dict(state)
        if state["finished"]:
            checkpoints.tell(learn)
            return
        learn.resume()
    checkpoints.save(learn, finished=True)


def _in_pieces(learn: Learner) -> bool:
    # Whether a rank's share of a batch may be more than max_rows. Then ranks differ in their number of passes through the
    # model, in which BatchNorm could not wait for the others. A last row may join a batch, and lanes share out unevenly.
    feed, most = learn.dls.train, learn.max_rows
    assert isinstance(feed, Feed)
    share = feed.batch_size + 1 if feed.lanes else -(-(feed.batch_size + 1) // feed.world)
    if most is None or share <= most:
        return False
    if feed.rank == 0:
        print(f"max_rows={most}: a worker's {share} rows go through the model in pieces, each with batch statistics of its own")
    return True


@contextlib.contextmanager
def _printed(spool: Path, run: str, epochs: int | None) -> Iterator[None]:
    # A thread prints, as the spool grows, what the workers print and, of so many, each epoch's line; what is told again after
    # a restart was printed before.
    finished, began = threading.Event(), time.time() * 1000
    before = [record["step"] for record, _ in read(spool) if record["kind"] == "metrics" and record["run"] == run]

    def work() -> None:
        printed = max(before, default=-1)
        for records in follow(spool, finished):
            for record in records:
                if record["run"] != run:
                    continue
                if record["kind"] == "said" and record["time"] >= began:
                    print(record["line"], flush=True)
                if record["kind"] == "metrics" and record["step"] > printed and epochs is not None:
                    printed = record["step"]
                    print(epoch_line(record["values"], epochs), flush=True)

    thread = threading.Thread(target=work, name="fastray-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_settings(words: Mapping[str, str]) -> str:
    return " ".join(f"{name}={text}" for name, text in words.items())
