"""`record("name")`: the callback with which a script's own `learn.fit(...)` is recorded in MLflow as a recipe is."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.places import places, shown
from cluster.runs import new_run_folder
from cluster.spool import SPOOL, append
from cluster.tracking import Tracker, start_run
from cluster.train import ending, none_left_open, record_data, record_model, tags_of
from cluster.workers import SpoolReport
from training import distributed
from training.learner import Learner


def record(name: str, **params: Any) -> "Record":
    """Have each `fit` recorded as a run of the experiment `name`, in the store of `places()`.

    `learn.add_callback(record("pets"))`, or `learn.fit(5, callbacks=[record("pets")])`; here or on workers. params: what to
    write down beside the schedule, the rate and the rest that the Learner knows.
    """
    return Record(name, params)


class Record(SpoolReport):
    """See `record`. A fit on `Workers(storage=...)` that is gone on with goes on as the same run."""

    def __init__(self, name: str, params: dict[str, Any]):
        super().__init__("", "")
        self.experiment, self.params = name, params
        self._open = contextlib.ExitStack()

    def before_fit(self, learn: Learner) -> None:
        if distributed.rank() == 0:
            self._open.enter_context(self.recording(learn, None))

    def after_fit(self, learn: Learner) -> None:
        # The error that ends the run passes by here: it says how the run ends.
        self._open.__exit__(*sys.exc_info())

    @contextlib.contextmanager
    def recording(self, learn: Learner, folder: str | None) -> Iterator[None]:
        """While the Learner trains, here or elsewhere. folder: of the run, where it has one on this machine."""
        where = Path(folder or new_run_folder(places().storage, self.experiment))
        self.path, self.run_id = str(where / SPOOL), where.name
        with Tracker(where / SPOOL, places().tracking, self.experiment) as tracker, none_left_open(where / SPOOL):
            tracker.opened()
            where.mkdir(parents=True, exist_ok=True)
            prepared = learn.dls.prepared if hasattr(learn.dls, "prepared") else None
            start_run(where / SPOOL, self.run_id, self.run_id, self._params(learn), tags_of(learn.dls) if prepared else {})
            with ending(where / SPOOL, self.run_id):
                if prepared is not None:
                    record_data(where / SPOOL, self.run_id, where, learn.dls)
                yield
                _record_model(where, learn)
        print(f"record: run {tracker.run_id(self.run_id) or 'not sent'} in {shown(places().tracking)}", flush=True)
        if tracker.trouble:
            print(f"record: not all sent: {tracker.trouble}. It is kept: fastray records flush {where.name}", flush=True)

    def _params(self, learn: Learner) -> dict[str, Any]:
        known = {
            "schedule": learn.schedule,
            "lr": learn.run_lr,
            "wd": learn.wd,
            "model": type(learn.model).__name__,
            "loss": getattr(learn.loss_func, "__name__", type(learn.loss_func).__name__),
            "opt": getattr(learn.opt_func, "__name__", repr(learn.opt_func)),
            "batch_size": getattr(learn.dls.train, "batch_size", None),
        }
        return {name: value for name, value in known.items() if value is not None} | self.params


def _record_model(folder: Path, learn: Learner) -> None:
    # What cannot be exported is no reason to fail: the rest is recorded all the same.
    spool, run = folder / SPOOL, folder.name
    if getattr(learn.dls, "encode", None) is None:
        return
    try:
        record_model(spool, run, folder, learn)
    except ValueError as error:
        append(spool, "tag", run, key="fastray.no_model", value=str(error))
