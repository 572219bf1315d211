"""What was recorded and not sent: sent later, and runs whose process was killed are closed."""

from dataclasses import dataclass
from pathlib import Path

from blocks.errors import UserError
from cluster.places import places, shown
from cluster.sender import Sender
from cluster.sent import Sent, left_behind, not_done
from cluster.spool import SPOOL, append, read


def open_runs(spool: Path) -> list[str]:
    """The runs of a spool that have begun and not ended, in the order they began."""
    opened: dict[str, None] = {}
    for record, _ in read(spool):
        if record["kind"] == "start":
            opened[record["run"]] = None
        elif record["kind"] == "end":
            opened.pop(record["run"], None)
    return list(opened)


def end_open_runs(spool: Path) -> None:
    """Record that the runs which nobody ended were killed: children before their parent."""
    for run in reversed(open_runs(spool)):
        append(spool, "end", run, status="KILLED")


def flush(folder: Path, tracking: str) -> Sender | None:
    """Send the rest of the spool in `folder`; runs that nobody ended end as KILLED. None when nothing was recorded there.

    UserError when a living process is at it, StoreError when the store cannot be used.
    """
    spool, sent = folder / SPOOL, Sent.read(folder)
    if sent is None or not spool.exists():
        return None
    sender = Sender(spool, tracking, sent.experiment)
    sender.begin()
    try:
        end_open_runs(spool)
        sender.open()
        sender.send()
    finally:
        sender.end(nothing_open=True)
    return sender


@dataclass(frozen=True)
class Flushed:
    """The folder of a run, and why not all of its records could be sent; None: they were."""

    folder: Path
    trouble: str | None


def flush_records(run: str | None = None) -> list[Flushed]:
    """Send what was recorded while the store was away: of `run`, a folder or its name, or of all runs of this place.

    UserError when nothing was recorded in `run`, or it is still going on.
    """
    storage, tracking = Path(places().storage), places().tracking
    if run is None:
        return [_flushed(folder, tracking) for folder in not_done(storage)]
    folder = Path(run) if Path(run).is_dir() else storage / run
    sender = flush(folder, tracking)
    if sender is None:
        raise UserError(f"no records are kept in {folder}: give a run's folder, or its name in {storage}")
    return [Flushed(folder, sender.trouble)]


def _flushed(folder: Path, tracking: str) -> Flushed:
    try:
        sender = flush(folder, tracking)
    except UserError as error:  # the others are to be sent all the same
        return Flushed(folder, str(error))
    return Flushed(folder, None if sender is None else sender.trouble)


def close_left_behind(tracking: str) -> None:
    """End what killed processes have left RUNNING in this store, and send what they could not."""
    for folder in left_behind(Path(places().storage)):
        sent = Sent.read(folder)
        if sent is not None and sent.store == shown(tracking):
            try:
                flush(folder, tracking)
            except Exception:  # noqa: BLE001  it stays for `fastray records flush`, which says why
                continue
