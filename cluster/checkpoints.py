"""Checkpoints of a training on Ray Train workers: one part that all ranks share and one of each rank's own.

A worker copies its state in memory and trains on; a thread of Ray Train's writes the copy to the run's storage and then tells
the controller, which keeps the newest and gives the newest that is whole to workers that start.

All ranks save at the same places, without a collective to agree on them: where an epoch begins, every so many batches, and
after the batch in whose gradient sum a rank asked for it (`Ranks.asks`), because its clock says so or a node is about to go.
The place is always *before* other callbacks hear an event that every rank gets to. After one, a rank on which a callback has
raised a cancel would already wait for the others' votes while those wait for its checkpoint.
"""

import copy
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Semaphore
from typing import Any, TypeVar

import numpy as np
import torch
from pyarrow.fs import FileSelector, FileType, LocalFileSystem
from torch import Tensor

from blocks.errors import UserError
from blocks.storage import filesystem, get, is_url, joined, put, writing
from cluster.preemption import noticed
from cluster.said import take_said
from training import distributed
from training.callback import Callback
from training.learner import Learner
from training.state import OF_RANK, Position

TRAIN = "train"  # Ray Train's folder in the run's
SHARED = "learner.pt"
RETRY_SECONDS = 1.0, 4.0, 15.0
NOTICED_SECONDS = 5.0  # how often while a node of the run is about to go
BEST = "best.pt"  # in the run's folder: the whole state after the best epoch, for `learn.load`

T = TypeVar("T")


def file_of(rank: int) -> str:
    """The name of a rank's own part in a checkpoint."""
    return f"rank{rank}.pt"


def read_state(checkpoint: Any, rank: int, world: int | None = None) -> dict[str, Any]:
    """A `learn.state_dict()` of a rank from a Ray Train checkpoint; "world": how many there were, "finished": the run was.

    world: how many there are now; where that is another number, the state has the "parts" of all that there were.
    """
    state = _read(checkpoint, SHARED)
    if world not in (None, state["world"]):
        return state | {"parts": [_read(checkpoint, file_of(old)) for old in range(state["world"])]}
    return state | _read(checkpoint, file_of(rank))


def _read(checkpoint: Any, name: str) -> dict[str, Any]:
    def content() -> bytes:
        with checkpoint.filesystem.open_input_file(f"{checkpoint.path}/{name}") as file:
            return file.read()

    return _from_bytes(retried(content))


def retried(read: Callable[[], T]) -> T:
    """What `read` returns; where storage fails for a moment, after as many tries as `RETRY_SECONDS` has pauses, and one."""
    for pause in RETRY_SECONDS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def mend_list(folder: str) -> None:
    """Have Ray Train go on with the run in `folder`, a path or a URL, whose list of checkpoints was cut short by a kill.

    Train writes that file in place and refuses a run whose file is not whole (Ray 2.60). Then it is written anew, of the
    checkpoints that are.
    """
    from ray.train import Checkpoint
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as LIST
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

    train = joined(folder, TRAIN) if is_url(folder) else f"{folder}/{TRAIN}"
    try:
        json.loads(get(train, LIST))
    except FileNotFoundError:
        return
    except ValueError:
        fs, path = filesystem(train) if is_url(train) else (LocalFileSystem(), train)
    else:
        return
    names = sorted(info.base_name for info in fs.get_file_info(FileSelector(path)) if info.type == FileType.Directory)
    whole = [_TrainingResultState(checkpoint_dir_name=n, metrics={}) for n in names if _is_whole(Checkpoint(f"{path}/{n}", fs))]
    known = _CheckpointManagerState(
        checkpoint_results=whole,
        checkpoint_report_indices=list(range(len(whole))),
        latest_checkpoint_result=whole[-1] if whole else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(whole),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    put(train, LIST, known.model_dump_json().encode())


def _is_whole(checkpoint: Any) -> bool:
    try:
        for rank in range(read_state(checkpoint, rank=0)["world"]):
            read_state(checkpoint, rank)
    except Exception:  # noqa: BLE001  whatever torch raises of a file that is half there
        return False
    return True


class Checkpoints(Callback):
    """On each worker: reports epochs and checkpoints to Ray Train.

    folder: the run's, or its URL. steps, minutes: how often within an epoch; not at all by default.
    """

    order = -1000
    needs_inputs = False

    def __init__(self, folder: str, steps: int | None, minutes: float | None):
        self.folder, self.steps, self.minutes = folder, steps, minutes
        self._reported = 0
        self._at = Position()  # of the newest one
        self._saved_at = time.monotonic()
        self._writing = Semaphore()
        self._votes: Tensor | None = None

    def before_fit(self, learn: Learner) -> None:
        # Those of a run that goes on are told again, in case their report was lost: who records them knows them by number.
        self._reported = first_of_run(learn)
        self._at = replace(learn.position)

    def before_epoch(self, learn: Learner) -> None:
        if learn.position.opens_epoch and learn.position != self._at:
            self.save(learn)

    def before_batch(self, learn: Learner) -> None:
        if not learn.training:
            return
        if self._votes is not None and learn._ranks is not None:
            learn._ranks.votes.copy_(self._votes)
            self._votes = None
        asked = self._asks()
        if learn._ranks is not None:
            learn._ranks.asks = asked and distributed.rank() == 0
            asked = learn._ranks.asked
        due = asked or (self.steps is not None and learn.iter % self.steps == 0)
        if due and learn.iter and learn.position != self._at:
            self.save(learn)

    def _asks(self) -> bool:
        often = math.inf if self.minutes is None else 60 * self.minutes
        if noticed():
            often = min(often, NOTICED_SECONDS)
        return time.monotonic() - self._saved_at >= often

    def save(self, learn: Learner, finished: bool = False) -> None:
        """Report what is new, with a checkpoint of this moment. Every rank must call it."""
        import ray.train

        if learn._ranks is not None:
            learn._ranks.asked = False
            self._votes = learn._ranks.votes.clone()
        state, rank = learn.state_dict(), distributed.rank()
        self._votes = None
        self._writing.acquire()  # storage that is slower than the checkpoints come must not fill the memory
        state = _copied(state) | {"finished": finished, "world": distributed.world()}
        own = {name: state.pop(name) for name in OF_RANK}
        parts = {file_of(rank): own, SHARED: state} if rank == 0 else {file_of(rank): own}
        # Within an epoch, a run that goes on has its earlier epochs to tell again, but weights that are none of theirs.
        ended = learn.position.opens_epoch and len(learn.recorder.history) > self._reported
        best = rank == 0 and ended and is_best(learn)
        self._at, self._saved_at = replace(learn.position), time.monotonic()
        ray.train.report(
            self._news(learn),
            checkpoint=ray.train.Checkpoint("/", LocalFileSystem()),  # not read: `_write` has what to write
            # No place is saved twice, so names do not meet; what a killed process left half written is written over.
            checkpoint_dir_name=f"epoch-{learn.epochs_trained:04d}-batch-{self._at.batch:06d}{'-end' * finished}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=partial(_write, parts, self.folder if best else None, self._writing.release),
        )

    def tell(self, learn: Learner) -> None:
        """Report all epochs of the run, without a checkpoint. Every rank must call it."""
        import ray.train

        self._reported = first_of_run(learn)
        ray.train.report(self._news(learn))

    def _news(self, learn: Learner) -> dict[str, Any]:
        # Of the epochs, rank 0's report is the one that is read.
        epochs = _copied(learn.recorder.history[self._reported :])
        self._reported += len(epochs)
        return {"said": take_said()} | ({"epochs": epochs} if distributed.rank() == 0 else {})

    def state_dict(self) -> dict[str, Any]:
        return {"votes": self._votes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._votes = state["votes"]

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What any rank wanted is still wanted."""
        votes = [state["votes"] for state in states if state["votes"] is not None]
        return {"votes": torch.stack(votes).amax(0) if votes else None}


def _write(parts: dict[str, Any], best: str | None, done: Callable[[], None], _: Any, name: str) -> Any:
    # In Ray Train's thread. best: the folder that takes a copy of the whole.
    import ray.train

    try:
        storage = ray.train.get_context().get_storage()
        path, fs = storage.build_checkpoint_path_from_name(name), storage.storage_filesystem
        fs.create_dir(path, recursive=True)
        for file, part in parts.items():
            with fs.open_output_stream(f"{path}/{file}") as out:
                torch.save(part, out)
        if best is not None:
            with writing(best, BEST) as out:
                torch.save({key: value for part in parts.values() for key, value in part.items()}, out)
        return ray.train.Checkpoint(path, fs)
    finally:
        done()


def _from_bytes(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_PLAIN = (type(None), bool, int, float, str)


def _copied(state: Any) -> Any:
    # In memory of its own, on the CPU: training goes on while it is written. What could not be read again is refused now: at
    # the end of the training, when it comes home, nothing would be left of it.
    if type(state) in _PLAIN:
        return state
    if isinstance(state, np.generic):  # a metric of NumPy's, say
        return state.item()
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # a model's state has its versions as an attribute
        copied.update({key: _copied(value) for key, value in state.items()})
        return copied
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    _check_readable(state)
    return state


def _check_readable(value: Any) -> None:
    try:
        content = io.BytesIO()
        torch.save(value, content)
        _from_bytes(content.getvalue())
    except Exception as error:  # whatever its __reduce__ raises
        raise UserError(
            f"a checkpoint keeps tensors, numbers, strings, lists and dicts, but the state of a callback (or the record, the "
            f"model, the optimizer) has {value!r}, a {type(value).__name__}"
        ) from error


class SaveHere(Callback):
    """The same for a training in this process: its state, in the run's folder or at its URL, where each epoch begins."""

    order = -1000

    def __init__(self, folder: str):
        self.folder = folder

    def before_epoch(self, learn: Learner) -> None:
        if learn.position.opens_epoch and learn.position != Position():
            self.save(learn)

    def save(self, learn: Learner, finished: bool = False) -> None:
        """Write the state of this moment."""
        state = learn.state_dict()
        own = _copied({name: state[name] for name in OF_RANK})
        with writing(self.folder, SHARED) as out:
            torch.save(state | own | {"finished": finished}, out)

    def read(self) -> dict[str, Any] | None:
        """The newest state, if there is one."""
        try:
            return _from_bytes(get(self.folder, SHARED))
        except FileNotFoundError:
            return None


def score_of(learn: Learner) -> tuple[str, bool]:
    """What tells a good epoch, and whether more of it is better: the first metric, or else the validation loss."""
    if not learn.metrics:
        return "valid/loss", False
    return f"valid/{learn.metrics[0].name}", learn.metrics[0].higher_is_better


def is_best(learn: Learner) -> bool:
    """Whether the last epoch of the run is the best of it so far."""
    name, higher = score_of(learn)
    run = learn.recorder.history[first_of_run(learn) :]
    *before, last = [values.get(name, math.nan) * (1 if higher else -1) for values in run]
    return not math.isnan(last) and not any(score >= last for score in before)


def first_of_run(learn: Learner) -> int:
    """Where this run's epochs begin in the history, after those of earlier runs."""
    return len(learn.recorder.history) - learn.position.epochs_before(learn.schedule)
