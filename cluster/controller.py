"""Train's controller, from the driver's side and from inside: the controller imports this file, and no Learner and no torch."""

import threading
import time
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result

from blocks.storage import shown
from cluster.failures import raise_if_final
from cluster.runs import RESTARTS
from cluster.runtime import ResourceError, is_own, room
from cluster.said import by_rank
from cluster.spool import append, append_epoch

ABORT_SECONDS = 60.0  # while it starts workers, the controller does not answer; killed then, it would leave their places taken
LOOK_SECONDS = 5.0  # between looks at the cluster's nodes
NODES_SECONDS = 300.0  # a lost node is replaced by then, if by anything


class ToSpool(ray.train.UserCallback):
    """Appends to the spool what the workers print, rank 0's epochs, and where their checkpoints are.

    The controller runs on the driver's node.
    """

    def __init__(self, spool: str, run: str):
        self.spool, self.run = spool, run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        for rank, own in enumerate(metrics):
            for line in own["said"]:
                append(self.spool, "said", self.run, line=by_rank(rank, line))
        for values in metrics[0]["epochs"]:
            append_epoch(self.spool, self.run, values)
        if checkpoint is not None:
            append(self.spool, "tag", self.run, key="fastray.checkpoint", value=shown(checkpoint.path))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        raise_if_final(worker_exceptions)


class CountsRestarts(WorkerGroupCallback):
    """Appends to the spool how often the run went on after a break: a loss, a node taken away, another number of workers.

    restarts: how often it did when this driver began, its own beginning included.
    """

    def __init__(self, spool: str, run: str, restarts: int):
        self.spool, self.run, self.restarts = spool, run, restarts
        self._began = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        if self._began:
            self.restarts += 1
            number = len(worker_group.get_workers())
            line = f"train: goes on from the newest checkpoint with {number} worker{'s' * (number != 1)}"
            append(self.spool, "said", self.run, line=line)
        self._began = True
        if self.restarts:
            append(self.spool, "tag", self.run, key=RESTARTS, value=str(self.restarts))


class InterruptibleTrainer(DataParallelTrainer):
    """A trainer whose `fit` answers Ctrl-C with KeyboardInterrupt, once its workers are gone.

    Train's own handler calls `sys.exit` in the middle of a call into Ray, which ends the raylet and leaves its helpers
    behind (Ray 2.60); it also stays installed afterwards.
    """

    _controller: Any = None
    _lacking: ResourceError | None = None

    def _register_sigint_handler(self, controller: Any) -> None:  # a private hook: a test holds that Ctrl-C works
        self._controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        # Two processes fewer: one frees what a dead driver held, which a Ray of one's own does by ending; the other
        # serves data sets, and there are none.
        # In a trial of a sweep the sweep frees it.
        from ray.tune.trainable.trainable_fn_utils import _in_tune_session  # private, and what Train itself asks

        cleaned = is_own() or _in_tune_session()
        unneeded = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if cleaned else set())
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unneeded]

    def fit(self) -> Result:
        finished = threading.Event()
        watch = threading.Thread(target=self._watch, args=(finished,), name="fastray-room", daemon=True)
        watch.start()
        try:
            return super().fit()
        except KeyboardInterrupt:
            self._abort()
            raise
        except ray.exceptions.RayActorError as ended:
            raise (self._lacking or ended) from None
        finally:
            finished.set()
            watch.join()

    def _abort(self) -> None:
        if self._controller is None:
            return
        try:
            # It ends itself once its workers are gone, so the answer is its death.
            ray.get(self._controller.abort.remote(), timeout=ABORT_SECONDS)
        except ray.exceptions.RayActorError:
            pass
        except ray.exceptions.GetTimeoutError:  # it has no workers, waits for room, and answers nobody (Ray 2.60)
            ray.kill(self._controller)

    def _watch(self, finished: threading.Event) -> None:
        # Where nodes are lost, an elastic run waits for others, for ever.
        number = self.scaling_config.num_workers
        least = number[0] if isinstance(number, tuple) else number
        since = time.monotonic()
        said = False
        while not finished.wait(LOOK_SECONDS):
            fit, now = room(self.scaling_config.use_gpu), time.monotonic()
            if fit >= least:
                since, said = now, False
                continue
            told = f"of at least {least} workers the cluster has room for {fit}"
            if not said:
                print(f"wait: {told}; for nodes to come, at most {NODES_SECONDS:g} s", flush=True)
                said = True
            if now - since > NODES_SECONDS:
                self._lacking = ResourceError(f"{told}, for {now - since:.0f} s. Start more nodes and go on with the run")
                self._abort()
                return
