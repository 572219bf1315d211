"""The live table: one in a terminal and in a notebook, plain lines elsewhere."""

import sys
from types import ModuleType
from typing import Any

import pytest

from cluster.live import MOST, LiveTable
from cluster.swept import Trial


def trials() -> list[Trial]:
    return [Trial(n, {"lr": 0.01 * n}, {}, 0.5 + n / 100, 2, "running" if n == 3 else "finished") for n in range(40)]


def test_plain_lines_where_nothing_can_be_drawn_over() -> None:
    said: list[str] = []
    with LiveTable("valid/accuracy", "max", said.append) as table:
        table.update(trials(), "trial 0003  epoch 2/3")
    assert said == ["trial 0003  epoch 2/3"]


def test_one_table_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with LiveTable("valid/accuracy", "max", pytest.fail) as table:
        table.update(trials(), "")
    drawn = capsys.readouterr().out
    assert "0003" in drawn
    assert "0039" in drawn


def test_one_table_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Display:
        def update(self, page: str) -> None:
            shown.append(page)

    def display(page: str, display_id: bool) -> Any:
        return Display()

    for name in ("ipykernel", "IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["IPython.display"].HTML = str  # type: ignore[attr-defined]
    sys.modules["IPython.display"].display = display  # type: ignore[attr-defined]
    with LiveTable("valid/accuracy", "max", pytest.fail) as table:
        table.update(trials(), "")
        table.update(trials()[:3], "")
    assert [page.count("<tr>") for page in shown] == [MOST + 1, 4]
    assert shown[0].index("<td>0003") < shown[0].index("<td>0039")  # what runs, then the best
