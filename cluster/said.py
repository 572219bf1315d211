"""What is printed on a Ray Train worker reaches the person: kept there until the next report, printed by the driver."""

import contextlib
import io
import sys
from collections import deque
from collections.abc import Iterator

MOST_LINES = 100  # between two reports: a line a batch would be millions


class Said(io.TextIOBase):
    """In the place of `sys.stdout`: keeps the newest lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._begun = ""
        self._number = 0

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        self._number += len(whole)
        self._lines.extend(whole)
        return len(text)

    def take(self) -> list[str]:
        """The lines since they were last taken; of many, the newest, after one that says how many there were."""
        lines, missing = list(self._lines), self._number - len(self._lines)
        self._lines.clear()
        self._number = 0
        return [f"({missing} lines before these)", *lines] if missing else lines


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Around all that a worker runs; a decorator as well: what it prints can be taken by `take_said`."""
    with contextlib.redirect_stdout(Said()):
        yield


def take_said() -> list[str]:
    """What was printed here and not yet taken, by line."""
    return sys.stdout.take() if isinstance(sys.stdout, Said) else []


def by_rank(rank: int, line: str) -> str:
    """A line as the person sees it: they need not think of ranks where the first one speaks."""
    return f"rank {rank}: {line}" if rank else line
