"""Where in the loop an exception was raised, found from its traceback afterwards: a run without one pays nothing for it.

The last frame of the Learner on the way says whose code it called (a callback, the model, the loss, a metric, the data, the
optimizer), and the last frame that is neither ours nor a library's is the line to look at.
"""

import contextlib
import functools
import inspect
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from torch import nn

from blocks.house import HOUSE
from training import distributed
from training.callback import CancelException
from training.same_host import PeerLost

if TYPE_CHECKING:
    from training.learner import Learner

SHOWN_ROWS = 3
Frames = Sequence[tuple[FrameType, int]]  # with their line numbers, outermost first


@dataclass(frozen=True)
class Failure:
    """Where an exception was raised; plain data, so that it travels. As text it is the note that the exception carries.

    source: "callback", "model", "loss", "metric", "data", "optimizer", "splitter", "backward", "peer", or "loop" for ours.
    name: of the callback, the metric, or the model's layer. event: the callback's. epoch, batch: None outside of one; part:
    "training" or "validation". rows: the ids of the batch's rows. file, line, function: of the person's own code, or None.
    """

    source: str
    name: str = ""
    event: str = ""
    epoch: int | None = None
    batch: int | None = None
    part: str = "training"
    rank: int = 0
    world: int = 1
    rows: tuple[str, ...] = ()
    file: str | None = None
    line: int | None = None
    function: str = ""

    def __str__(self) -> str:
        parts = [f"in {self._what()}"]
        if self.epoch is not None:
            parts.append(f"epoch {self.epoch}")
        if self.batch is not None:
            parts.append(f"{'validation ' * (self.part == 'validation')}batch {self.batch}")
        if self.world > 1:
            parts.append(f"rank {self.rank} of {self.world}")
        if self.rows:
            more = len(self.rows) - SHOWN_ROWS
            parts.append(f"rows {', '.join(self.rows[:SHOWN_ROWS])}" + (f" and {more} more" if more > 0 else ""))
        return ", ".join(parts) + (f"; {self.file}:{self.line} in {self.function}" if self.file else "")

    def _what(self) -> str:
        match self.source:
            case "callback":
                return f"{self.name}.{self.event}"
            case "model" if self.name:
                return f"the model's {self.name}"
            case "metric":
                return f"the metric {self.name}"
            case "backward":
                return "the backward pass"
            case "peer":
                return "waiting for the other ranks"
        return f"the {self.source}"


def failure_of(error: BaseException) -> Failure | None:
    """What `say_where` found of `error`, or None."""
    return getattr(error, "failure", None)


def say_where(learn: "Learner", error: Exception) -> None:
    """Note on `error`, which `learn` raised, where that was; once, however many Learners it passes."""
    if isinstance(error, CancelException) or failure_of(error) is not None:
        return
    found = _located(learn, error)
    error.add_note(str(found))
    with contextlib.suppress(AttributeError):  # a class with slots
        error.failure = found  # type: ignore[attr-defined]


def learner_of(error: BaseException) -> "Learner | None":
    """The innermost Learner on the way of `error`, in the process in which it was raised; None where there was none."""
    from training.learner import Learner

    on_the_way = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((it for it in reversed(on_the_way) if isinstance(it, Learner)), None)


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line of the person's own code on the way of `error`, or None."""
    own = [summary for summary in traceback.extract_tb(error.__traceback__) if is_own_file(summary.filename)]
    return own[-1] if own else None


def is_own_file(file: str) -> bool:
    """Whether code of `file` is the person's own: not ours, and no library's."""
    if file.startswith("<"):
        return file.startswith(("<stdin>", "<ipython"))
    return not any(Path(file).is_relative_to(folder) for folder in _not_own())


@functools.cache
def _not_own() -> tuple[str, ...]:
    home = Path(__file__).resolve().parent.parent
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (*libraries, *(str(home / package) for package in HOUSE))


def _located(learn: "Learner", error: Exception) -> Failure:
    frames = list(traceback.walk_tb(error.__traceback__))
    source, name, event = ("peer", "", "") if isinstance(error, PeerLost) else _source(learn, frames)
    batch, rows = _batch(learn, frames)
    own = own_frame(error)
    return Failure(
        source,
        name,
        event,
        epoch=learn.epoch if _in_fit(frames) and learn.epoch < learn.n_epoch else None,
        batch=batch,
        part="training" if learn.training else "validation",
        rank=distributed.rank(),
        world=distributed.world(),
        rows=rows,
        file=own.filename if own else None,
        line=own.lineno if own else None,
        function=own.name if own else "",
    )


@functools.cache
def _sources() -> dict[CodeType, str]:
    # By code object, so that a method that is renamed is missed at once.
    from training.callbacks import Recorder
    from training.learner import Learner
    from training.metrics import values_over_ranks

    return {
        Learner.__call__.__code__: "callback",
        Learner._end_fit.__code__: "callback",
        Learner._one_batch.__code__: "model",
        Learner._take_loss.__code__: "loss",
        Learner._backward.__code__: "backward",
        Learner._step.__code__: "optimizer",
        Learner.opt.fget.__code__: "optimizer",  # type: ignore[attr-defined]
        Learner.layer_groups.fget.__code__: "splitter",  # type: ignore[attr-defined]
        Learner._train.__code__: "data",
        Learner._all_batches.__code__: "data",
        Learner._split.__code__: "data",
        Recorder.before_validate.__code__: "metric",
        Recorder._note_batch.__code__: "metric",
        values_over_ranks.__code__: "metric",
    }


def _source(learn: "Learner", frames: Frames) -> tuple[str, str, str]:
    # Source, name and event, by the innermost frame that tells.
    for frame, _ in reversed(frames):
        source, local = _sources().get(frame.f_code), frame.f_locals
        match source:
            case "callback" if "method" in local:
                return source, local["method"].__self__.name, local.get("event", "after_fit")
            case "metric" if "metric" in local:
                return source, local["metric"].name, ""
            case "model":
                return source, _layer(learn.model, frames), ""
            case "loss" | "backward" | "optimizer" | "splitter" | "data":
                return source, "", ""
    return "loop", "", ""


def _layer(model: nn.Module, frames: Frames) -> str:
    modules = [frame.f_locals.get("self") for frame, _ in frames]
    inner = next((m for m in reversed(modules) if isinstance(m, nn.Module)), model)
    name = next((name for name, module in model.named_modules() if module is inner), "")
    return f"layer {name} ({type(inner).__name__})" if name else ""


def _batch(learn: "Learner", frames: Frames) -> tuple[int | None, tuple[str, ...]]:
    # The number of the batch, and the ids of its rows where they are known; those of a batch being drawn are not.
    from training.learner import Learner

    codes = [frame.f_code for frame, _ in frames]
    if Learner._all_batches.__code__ not in codes:
        return None, ()
    last = len(codes) - 1 - codes[::-1].index(Learner._all_batches.__code__)
    if last + 1 == len(codes):
        return None, ()
    if codes[last + 1] in (Learner._with_events.__code__, Learner._split.__code__):
        return learn.iter, _row_ids(learn)
    local = frames[last][0].f_locals
    return local["start"] + local.get("drawn", 0), ()


def _row_ids(learn: "Learner") -> tuple[str, ...]:
    if getattr(learn.batch, "borrowed", False):
        return ()
    with contextlib.suppress(Exception):  # what explains an error must not raise another
        return tuple(str(i) for i in getattr(learn.batch, "ids", ()))
    return ()


def _in_fit(frames: Frames) -> bool:
    from training.learner import Learner

    around = [*frames, *traceback.walk_stack(frames[0][0])]
    run = inspect.unwrap(Learner._run).__code__  # what is around it has one code for all that it is around of
    return any(frame.f_code is run for frame, _ in around)
