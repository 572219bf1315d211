"""From a spool to a store that may be away, starting where it was sent before."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.places import shown
from cluster.sent import Heartbeat, Sent
from cluster.spool import read
from cluster.store import BATCHED, Store, StoreError, away, first_line

REFUSALS = (0.2, 1.0)  # seconds before a refused request is tried again; then it is left out
BEAT_SECONDS = 5.0


class Sender:
    """Sends a spool to a store.

    away: why the store does not answer. refused: the first thing that the store, which did answer, did not take.
    """

    def __init__(self, spool: Path, tracking: str, experiment: str):
        self.spool, self.tracking = spool, tracking
        self.sent = Sent.read(spool.parent) or Sent(shown(tracking), experiment)
        self.away: str | None = None
        self.refused: str | None = None
        self._store: Store | None = None
        self._heartbeat: Heartbeat | None = None
        self._beaten = 0.0

    @property
    def trouble(self) -> str | None:
        """Why something was not sent."""
        return self.refused or self.away

    def begin(self) -> None:
        """Take charge of the spool. UserError when another process has it."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(self.spool.parent)
            self.sent.write(self.spool.parent)

    def open(self) -> None:
        """Open the store, or find it away. StoreError when it cannot be used."""
        self.away = away(self.tracking)
        if self.away is None and self._store is None:
            self._store = Store(self.tracking, self.spool.parent, self.sent)

    def beat(self) -> None:
        """Have other processes know that this one lives."""
        if self._heartbeat is not None and time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._heartbeat.beat()

    def send(self) -> bool:
        """Send what is new; whether all of it could be. StoreError when the store that was away cannot be used."""
        if self._heartbeat is None:
            if not self.spool.exists():
                return True
            self.begin()
        if self.away:
            self._open_again()
        for records, position in _requests(read(self.spool, self.sent.position)):
            if self.away or not self._carried_out(records):
                return False
            self.sent.position = position
            self.sent.write(self.spool.parent)
            self.beat()
        return not self.away

    def end(self, nothing_open: bool) -> None:
        """Let go of the spool; what was not sent stays in it. nothing_open: all its runs have ended."""
        if self._heartbeat is not None:
            self._heartbeat.end(nobody_needed=nothing_open and not read(self.spool, self.sent.position))
            self._heartbeat = None

    def _open_again(self) -> None:
        try:
            self.open()
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  such as a server that has only half started
            self.away = shown(first_line(error), of=self.tracking)

    def _carried_out(self, records: list[dict[str, Any]]) -> bool:
        # What a store that answers refuses again and again is left out: it must not keep back what follows.
        assert self._store is not None
        for wait in (*REFUSALS, None):
            try:
                self._store.send(records)
                return True
            except Exception as error:  # noqa: BLE001
                self.away = away(self.tracking)
                if self.away:
                    return False
                reason = shown(first_line(error), of=self.tracking)
            if wait is not None:
                time.sleep(wait)
        self.refused = self.refused or reason
        return True


def _requests(records: list[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    # Neighbours of one run that one request can carry, with the position after them.
    together: list[dict[str, Any]] = []
    end = 0
    for record, position in records:
        fits = together and record["run"] == together[-1]["run"] and {record["kind"], together[-1]["kind"]} <= BATCHED
        if together and not fits:
            yield together, end
            together = []
        together.append(record)
        end = position
    if together:
        yield together, end
