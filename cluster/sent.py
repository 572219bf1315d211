"""How far a spool was sent to MLflow: kept beside it, so that whoever goes on sends nothing twice and adopts its runs."""

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from blocks.errors import UserError

SENT, HEARTBEAT = "sent.json", "heartbeat"
STALE_SECONDS = 30.0  # several heartbeats: another machine of a shared disk sees no lock, only the time


@dataclass
class SentRun:
    """One run of a spool. id: MLflow's, "" while it is being made. mark: its highest step.

    model: MLflow's id of its model. version: NAME/NUMBER, where that is registered.
    """

    id: str = ""
    mark: int = -1
    model: str = ""
    version: str = ""


@dataclass
class Sent:
    """What was sent, to which store and experiment: the spool up to the byte `position`.

    store: without user and password. experiment: its name. experiment_id: MLflow's, once it is known.
    """

    store: str
    experiment: str
    experiment_id: str = ""
    position: int = 0
    runs: dict[str, SentRun] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Sent | None":
        """What was sent of the spool in `folder`; None where nobody has begun."""
        try:
            found = json.loads((folder / SENT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        found["runs"] = {name: SentRun(**run) for name, run in found["runs"].items()}
        return cls(**found)

    def write(self, folder: Path) -> None:
        """Keep it, whole at any moment."""
        unfinished = folder / f"{SENT}.part"
        unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")
        unfinished.replace(folder / SENT)


class Heartbeat:
    """Says that a living process sends the spool of `folder`: a lock that dies with it, and a file it touches.

    UserError when another one does.
    """

    def __init__(self, folder: Path):
        self.file = folder / HEARTBEAT
        self._lock: IO[bytes] = self.file.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"the run in {folder} is still going on, or its records are being sent, in another process"
            ) from None
        except OSError:  # a disk without locks: the time alone tells
            pass
        self.beat()

    def beat(self) -> None:
        """Still there."""
        os.utime(self.file)

    def end(self, nobody_needed: bool) -> None:
        """Let go. nobody_needed: all runs have ended and all was sent, so nobody has to look after this folder."""
        if nobody_needed:
            self.file.unlink(missing_ok=True)
        self._lock.close()


def not_done(storage: Path) -> list[Path]:
    """Folders in `storage` with runs that are open, or not all sent."""
    return [file.parent for file in sorted(storage.glob(f"*/{HEARTBEAT}"))]


def left_behind(storage: Path) -> list[Path]:
    """Those of them whose process has not been heard of for a while."""
    now = time.time()
    return [f for f in not_done(storage) if now - (f / HEARTBEAT).stat().st_mtime > STALE_SECONDS]
