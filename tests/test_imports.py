"""The rooms of the house: who may import whom. Reads every import of every file, those inside functions as well."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.house import HOUSE

ROOT = Path(__file__).parent.parent
ALLOWED = {package: set(HOUSE[: place + 1]) for place, package in enumerate(HOUSE)}
ONLY_IN_CLUSTER = {"ray", "mlflow", "optuna"}
FILES = [f for package in ALLOWED for f in sorted((ROOT / package).rglob("*.py*")) if f.suffix in (".py", ".pyi")]


def imported(source: str) -> Iterator[str]:
    """The top-level package of each absolute import in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_only_downwards(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    found = set(imported(file.read_text()))
    assert found & set(ALLOWED) <= ALLOWED[package]
    if package != "cluster":
        assert not found & ONLY_IN_CLUSTER


def test_the_check_sees_imports_inside_functions() -> None:
    assert set(imported("def f():\n    from ray.data import x\n    import mlflow.pyfunc as m")) == {"ray", "mlflow"}


def test_every_package_is_checked() -> None:
    assert {f.relative_to(ROOT).parts[0] for f in FILES} == set(ALLOWED)


def test_no_package_among_the_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_a_name_costs_what_it_needs() -> None:
    """`import training` loads no library, and a Learner none that draws, reads tables or pictures, or measures."""
    code = (
        "import sys, training; print('torch' in sys.modules); from training import Adam, Learner; "
        "print([m for m in ('matplotlib', 'pandas', 'PIL', 'ray', 'torchmetrics', 'torchvision') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n[]\n"
