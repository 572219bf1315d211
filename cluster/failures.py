"""An exception's way home from a Ray Train worker: the person sees it as itself; what Ray says of it lies in a file.

a worker       `as_final`      what a person's code raised can't be helped by a restart: it leaves as a `FinalError`
the controller `raise_if_final` ends the run on all ranks at once. An exception in Train's own callback for exceptions is
                               never retried, whatever the failure budget
the driver     `bringing_home` the exception again, with a note of where and the lines on the worker; the rest in `ERRORS`

A process that died, a peer that was lost and what Ray itself raises pass as they are: Train retries those.

The controller imports this file, and no torch: what needs that is imported within functions.
"""

import contextlib
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import UserError
from blocks.storage import is_url, joined, put, shown
from cluster.runtime import ResourceError
from cluster.said import by_rank, take_said

if TYPE_CHECKING:
    from training.learner import Learner

ERRORS = "errors.txt"  # in the run's folder
GRACE_SECONDS = 15.0  # Train ends this process before
EVERYTHING = "everything that was said: "


class FinalError(Exception):
    """What a person's code raised on `rank`. error: itself, as bytes. notes: its own. trace: all of it, as text.

    said: what was printed there before. others: the other ranks' exceptions, by rank, which are for the file alone.
    """

    def __init__(
        self,
        rank: int,
        error: bytes,
        notes: Sequence[str],
        trace: str,
        said: Sequence[str],
        others: Mapping[int, str] | None = None,
    ):
        super().__init__(rank, error, notes, trace, said, others)
        self.rank, self.error, self.notes, self.trace, self.said, self.others = rank, error, notes, trace, said, others or {}

    def __str__(self) -> str:
        return self.trace


class WorkersLost(RuntimeError):
    """More processes of a run were lost than its failure budget replaces."""


def cannot_travel(learn: "Learner", error: Exception) -> UserError:
    """What to raise where `learn` cannot be pickled for the workers: names the part that is the reason of `error`."""
    from ray import cloudpickle

    parts: list[tuple[str, Any]] = [(f"the callback {c.name}", c) for c in learn.callbacks]
    parts += [(f"the metric {m.name}", m) for m in learn.metrics]
    parts += [("the model", learn.model), ("the loss", learn.loss_func), ("the data", learn.dls)]
    parts += [("opt_func", learn.opt_func), ("the splitter", learn.splitter)]
    found = "the Learner"
    for name, part in parts:
        try:
            cloudpickle.dumps(part)
        except Exception as own:  # noqa: BLE001  whatever its __reduce__ raises
            found, error = name, own
            break
    return UserError(
        f"{found} cannot be sent to the workers: {str(error).partition(chr(10))[0]}. Files, locks and connections are opened "
        "where they are used, as a callback does in before_fit; or train in this process"
    )


# --- on a worker ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_final() -> Iterator[None]:
    """Around all that a Ray Train worker runs; a decorator as well."""
    try:
        yield
    except BaseException as error:
        from training.same_host import PeerLeft

        if _is_loss(error):
            if isinstance(error, PeerLeft):
                time.sleep(GRACE_SECONDS)  # the one that left tells why: told first, this would be taken for a loss
            raise
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        notes = [*getattr(error, "__notes__", ()), f"on rank {rank}:\n{_own_lines(error)}"]
        trace = "".join(traceback.format_exception(error))
        raise FinalError(rank, as_bytes(error), notes, trace, take_said()) from None


def _is_loss(error: BaseException) -> bool:
    from ray.exceptions import RayTaskError

    from training.same_host import PeerLost

    rays = type(error).__module__.partition(".")[0] == "ray" and not isinstance(error, RayTaskError)
    return rays or isinstance(error, PeerLost)


def _own_lines(error: BaseException) -> str:
    # The person's own frames, and the last one, whosever it is.
    from training.failure import is_own_file

    frames = traceback.extract_tb(error.__traceback__)
    shown_frames = [frame for frame in frames[:-1] if is_own_file(frame.filename)] + frames[-1:]
    return "".join(traceback.format_list(shown_frames)).rstrip()


def as_bytes(error: BaseException) -> bytes:
    """An exception for `loads` in another process: itself, or a RuntimeError with its words where it cannot be made again."""
    from ray import cloudpickle

    try:
        content = cloudpickle.dumps(error)
        cloudpickle.loads(content)
    except Exception:  # noqa: BLE001  whatever its own __init__ or __reduce__ raises
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        content = cloudpickle.dumps(told)
    return content


# --- in the controller ---------------------------------------------------------------------------------------------------


def raise_if_final(worker_exceptions: Mapping[int, Exception]) -> None:
    """End the run if one of these, by rank, is a `FinalError`. For `ray.train.UserCallback.after_exception`."""
    final = next((error for _, error in sorted(worker_exceptions.items()) if isinstance(error, FinalError)), None)
    if final is not None:
        others = {rank: str(error) for rank, error in sorted(worker_exceptions.items()) if error is not final}
        raise FinalError(final.rank, final.error, final.notes, final.trace, final.said, others)


# --- on the driver -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bringing_home(folder: str | Path | None) -> Iterator[None]:
    """Around `trainer.fit()` of the run in `folder`: a path, a URL, or None where it leaves none."""
    from ray.train import TrainingFailedError

    try:
        yield
    except TrainingFailedError as error:
        raise _brought_home(error, folder) from None


def _brought_home(error: Exception, folder: str | Path | None) -> BaseException:
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, FinalError):
        raised, told = _itself(failure), _all_of(failure)
        for line in failure.said:
            print(by_rank(failure.rank, line), flush=True)
        raised.__notes__ = list(failure.notes)  # some exceptions lose theirs on the way
    else:
        raised, told = _lost(error, failure), "".join(traceback.format_exception(error))
    raised.add_note(f"{EVERYTHING}{_written(told, folder)}")
    return raised


def happened_elsewhere(error: BaseException) -> bool:
    """Whether `error` was brought home: the frames of this process say nothing of it."""
    return any(note.startswith(EVERYTHING) for note in getattr(error, "__notes__", ()))


def _itself(failure: FinalError) -> BaseException:
    from ray import cloudpickle

    try:
        raised = cloudpickle.loads(failure.error)
    except Exception as error:  # noqa: BLE001  whatever it needs that is not here
        raised = RuntimeError(f"{failure.trace.strip().splitlines()[-1]} (and it cannot be loaded here: {error})")
    return raised


def _all_of(failure: FinalError) -> str:
    texts = {failure.rank: failure.trace, **failure.others}
    return "\n".join(f"rank {rank}:\n{text}" for rank, text in texts.items())


def _lost(error: Any, failure: Any) -> Exception:
    if type(failure).__name__ == "WorkerGroupStartupTimeoutError":  # its class is not public
        return ResourceError(
            f"no room for {failure.num_workers} workers: they could not be started, because what was free is so no more. "
            "Give fewer, or try again when others are done"
        )
    if failure is not None:
        return RuntimeError(f"Ray Train cannot go on: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}")
    from training.same_host import PeerLost

    # That others lost it is not what happened to the one that was lost, where that is known.
    ends = sorted(error.worker_failures.items(), key=lambda end: (isinstance(end[1], PeerLost), end[0]))
    known = [end for end in ends if not isinstance(end[1], PeerLost)] or ends[:1]
    said = "; ".join(f"rank {rank}: {_how_lost(e)}" for rank, e in known)
    return WorkersLost(f"workers were lost more often than max_failures allows to replace them, the last time {said}")


def _how_lost(error: Exception) -> str:
    from ray.exceptions import RayActorError

    from training.same_host import PeerLost

    error = getattr(error, "health_check_failure", error)
    if isinstance(error, RayActorError):
        return "its process has ended: killed, perhaps for the memory it took, or crashed"
    first_line = str(error).strip().partition("\n")[0]
    return first_line if isinstance(error, PeerLost) else f"{type(error).__name__}: {first_line}"


def _written(text: str, folder: str | Path | None) -> str:
    # Where nothing is left of a run, a file among the temporary ones is.
    if folder is None or not (is_url(str(folder)) or Path(folder).is_dir()):
        with tempfile.NamedTemporaryFile("w", prefix="fastray-", suffix=f"-{ERRORS}", delete=False) as file:
            file.write(text)
        return file.name
    try:
        put(folder, ERRORS, text.encode())
    except Exception as error:  # noqa: BLE001  a storage that is away must not hide why the run ended
        return f"not to be written to {shown(str(folder))}: {error}"
    return shown(joined(str(folder), ERRORS)) if is_url(str(folder)) else str(Path(folder, ERRORS).absolute())
