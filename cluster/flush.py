"""What was recorded and not sent: sent later, and runs whose process was killed are closed."""

from pathlib import Path

from cluster.places import places, shown
from cluster.sender import Sender
from cluster.sent import Sent, left_behind
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
        for run in reversed(open_runs(spool)):  # children before their parent
            append(spool, "end", run, status="KILLED")
        sender.open()
        sender.send()
    finally:
        sender.end(nothing_open=True)
    return sender


def close_left_behind(tracking: str) -> None:
    """End what killed processes have left RUNNING in this store, and send what they could not."""
    for folder in left_behind(Path(places().storage)):
        sent = Sent.read(folder)
        if sent is not None and sent.store == shown(tracking):
            try:
                flush(folder, tracking)
            except Exception:  # noqa: BLE001  it stays for `fastray records flush`, which says why
                continue
