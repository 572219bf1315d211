"""README: its Python blocks run, top to bottom in one namespace; its commands are ones; its file tree is the real one."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_python_blocks_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), vars(module))
    printed = capsys.readouterr().out
    assert "1797 files" in printed
    assert re.search(r"^epoch 1/1  train loss .*images/s$", printed, flags=re.M)
    assert "epochs recorded" in printed
    assert "'lr': 0.003" in printed


def test_commands_are_there() -> None:
    named = set(re.findall(r"^fastray (\w+)", "\n".join(blocks("bash")), flags=re.M))
    assert named == set(cli.commands)
    for name in named:
        assert CliRunner().invoke(cli, [name, "--help"]).exit_code == 0


def test_the_file_tree_is_the_real_one() -> None:
    (tree,) = re.findall(r"^```\n(blocks/.*?)^```", README, flags=re.S | re.M)
    folder, told = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        told.add(name if name == folder else folder + name)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    real = {f for f in listed if f.startswith(("blocks/", "training/", "cluster/", "pipelines/")) and "__" not in f}
    assert {t for t in told if t.endswith(".py")} == real


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]{4,}$", README, flags=re.M)
