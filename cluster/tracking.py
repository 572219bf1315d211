"""The records of a training on their way to MLflow: one thread of the driver follows the spool and sends what it says.

A store that is away costs the training nothing: the records stay in the spool, and are sent when it is back or by
`fastray records flush`. `sent.json` beside the spool says how far it was sent.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.environment import environment
from cluster.flush import close_left_behind, open_runs
from cluster.places import shown
from cluster.sender import Sender
from cluster.spool import POLL_SECONDS, append
from cluster.store import StoreError, first_line, unusable
from cluster.system_metrics import SystemMetrics
from training.schedule import as_words

AWAY_SECONDS = 15.0  # before a store that is away is asked again
LAST_TRIES = 3
END_SECONDS = 20.0  # after Ctrl-C
HANG_SECONDS = 120.0  # a store that takes nothing for so long is not waited for: what is left is sent by another command


class Tracker:
    """The thread that follows a spool into MLflow. `with Tracker(...)` sends everything before it ends.

    A spool that was sent in part, by a process that was stopped or killed, goes on where it stood: its runs are adopted.
    A store that cannot be used is a StoreError of `opened()`; one that fails later costs the training nothing, and `trouble`
    says what is still unsent. UserError when another process follows this spool. system_metrics_of: the run of the spool that
    has them recorded.
    """

    def __init__(self, spool: Path, tracking: str, experiment: str, system_metrics_of: str = ""):
        self._busy_run = system_metrics_of
        self._busy: SystemMetrics | None = None
        self._sender = Sender(spool, tracking, experiment)
        if spool.exists():
            self._sender.begin()
        self._unusable: StoreError | None = None
        self._finished = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastray-mlflow", daemon=True)
        self._thread.start()

    def opened(self, say: Callable[[str], None] = print) -> None:
        """Wait until the store is open, or known to be away, which is said. StoreError when it cannot be used."""
        if not self._opened.wait(HANG_SECONDS):
            say(f"records: {self._hangs()}; they are kept, and sent when it does")
        if self._unusable is not None:
            raise self._unusable
        if self._sender.away:
            say(f"records: {self._sender.away}; they are kept, and sent when it does")

    def close(self) -> None:
        """Send what is left and end the thread; at most `HANG_SECONDS` beyond the last that the store took."""
        self._finished.set()
        try:
            moved, sent = time.monotonic(), self._sender.sent.position
            while self._thread.is_alive():
                self._thread.join(timeout=POLL_SECONDS)
                if self._sender.sent.position != sent:
                    moved, sent = time.monotonic(), self._sender.sent.position
                if time.monotonic() - moved > HANG_SECONDS:  # a call into a database that never answers cannot be ended
                    self._sender.refused = self._sender.refused or self._hangs()
                    return
        except KeyboardInterrupt:  # how the run ended is still to be sent
            self._thread.join(timeout=END_SECONDS)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def trouble(self) -> str | None:
        """Why something was not sent."""
        return self._sender.trouble

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a run of the spool, once it was sent."""
        known = self._sender.sent.runs.get(run)
        return (known.id or None) if known else None

    def registered(self, run: str) -> str | None:
        """The address of a run's model in the registry, once it was sent there."""
        known = self._sender.sent.runs.get(run)
        return f"models:/{known.version}" if known and known.version else None

    def model_uri(self, run: str) -> str | None:
        """The address of a run's model, once it was sent."""
        known = self._sender.sent.runs.get(run)
        return f"models:/{known.model}" if known and known.model else None

    def _hangs(self) -> str:
        return f"{shown(self._sender.tracking)} does not answer"

    def _work(self) -> None:
        # Whatever goes wrong in this thread is told by `opened` or `trouble`: raised here, nobody would hear of it.
        sender = self._sender
        try:
            sender.open()
        except StoreError as error:
            self._unusable = error
        except Exception as error:  # noqa: BLE001
            self._unusable = unusable(sender.tracking, first_line(error))
        finally:
            self._opened.set()
        try:
            if self._unusable is None:
                self._follow()
        except Exception as error:  # noqa: BLE001
            sender.refused = sender.refused or shown(first_line(error), of=sender.tracking)
        finally:
            sender.end(nothing_open=not open_runs(sender.spool))

    def _follow(self) -> None:
        sender = self._sender
        if not sender.away:
            close_left_behind(sender.tracking)
        ask_again = 0.0
        while not self._finished.is_set():
            if time.monotonic() >= ask_again:
                sender.send()
                ask_again = time.monotonic() + AWAY_SECONDS if sender.away else 0.0
            sender.beat()
            if self._busy_run:
                self._sample()
            self._finished.wait(POLL_SECONDS)
        for seconds in range(1 if sender.away else LAST_TRIES):  # a short absence leaves no run RUNNING
            time.sleep(seconds)
            if sender.send():
                break

    def _sample(self) -> None:
        # How busy a machine is cannot be asked of each; the other records are sent all the same.
        try:
            self._busy = self._busy or SystemMetrics(self._sender.spool, self._busy_run)
            self._busy.sample()
        except Exception as error:  # noqa: BLE001
            self._busy_run = ""
            reason = f"system metrics: {shown(first_line(error), of=self._sender.tracking)}"
            self._sender.refused = self._sender.refused or reason


def start_run(
    spool: Path, run: str, name: str, params: dict[str, Any], tags: dict[str, str] | None = None, parent: str = ""
) -> None:
    """Have a run recorded from now on, the same one where it was recorded before; `params` are written as text."""
    texts = {key: shown(as_words(value)) for key, value in params.items()}
    found = {"fastray.sweep": parent} if parent else environment()
    append(spool, "start", run, name=name, params=texts, tags=found | (tags or {}), parent=parent)
