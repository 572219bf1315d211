"""One live table of a sweep's trials in a terminal or notebook; plain lines elsewhere."""

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from cluster.swept import Trial, html_table, text_table

Say = Callable[[str], None]
MOST = 30  # rows of a live table: those that run, then the best


class LiveTable:
    """Shows trials as they go on, by `update` at each epoch; in a terminal the table goes away where the `with` block ends."""

    def __init__(self, metric: str, mode: str, say: Say):
        self.metric, self.mode, self.say = metric, mode, say
        self._notebook: Any = None
        self._terminal: Any = None

    def __enter__(self) -> Self:
        if "ipykernel" in sys.modules:
            from IPython.display import HTML, display

            self._html = HTML
            self._notebook = display(HTML(""), display_id=True)
        elif sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            # Of its own: the one that all of the process share knows the terminal of when it was made.
            self._terminal = Live(console=Console(), auto_refresh=False, transient=True)
            self._terminal.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._terminal is not None:
            self._terminal.stop()

    def update(self, trials: Sequence[Trial], line: str) -> None:
        """Show the trials anew; or print `line`, which says what is new, where nothing can be drawn over."""
        if self._notebook is not None:
            self._notebook.update(self._html(html_table(self._shown(trials), self.metric)))
        elif self._terminal is not None:
            from rich.text import Text

            self._terminal.update(Text(text_table(self._shown(trials), self.metric), no_wrap=True), refresh=True)
        else:
            self.say(line)

    def _shown(self, trials: Sequence[Trial]) -> list[Trial]:
        return sorted(trials, key=lambda t: (t.ended != "running", t.rank(self.mode)))[:MOST]
