"""When two plans prepare the same data: what changes a fingerprint, and what does not."""

import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocks import (
    CategoryBlock,
    DataBlock,
    EndSplitter,
    ImageBlock,
    Normalize,
    Plan,
    RandomSplitter,
    Resize,
    TransformBlock,
    get_image_files,
    parent_label,
)
from blocks.fingerprint import NotFingerprintable, fingerprint


@pytest.fixture(autouse=True)
def users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dataclasses look their module up by its name."""
    monkeypatch.setitem(sys.modules, "users_own", types.ModuleType("users_own"))


def module(source: str) -> types.ModuleType:
    """A user's module with this text."""
    made = types.ModuleType("users_own")
    exec(source, vars(made))
    return made


# --- code --------------------------------------------------------------------------------------------------------------

SAME = "def f(x):\n    return x + 1"
CHANGES = {
    "constant in a function": (SAME, "def f(x):\n    return x + 2"),
    "constant in a lambda": ("f = lambda x: x + 1", "f = lambda x: x + 2"),
    "operation": (SAME, "def f(x):\n    return x - 1"),
    "method called": ("f = lambda x: x.upper()", "f = lambda x: x.lower()"),
    "default": ("def f(x, n=1):\n    return x + n", "def f(x, n=2):\n    return x + n"),
    "keyword default": ("def f(x, *, n=1):\n    return x + n", "def f(x, *, n=2):\n    return x + n"),
    "closure value": (
        "def make(n):\n    return lambda x: x + n\nf = make(1)",
        "def make(n):\n    return lambda x: x + n\nf = make(2)",
    ),
    "closure list": (
        "def make(n):\n    return lambda x: x in n\nf = make([1])",
        "def make(n):\n    return lambda x: x in n\nf = make([1, 2])",
    ),
    "global value": ("N = 1\ndef f(x):\n    return x + N", "N = 2\ndef f(x):\n    return x + N"),
    "called function": (
        "def g(x):\n    return x + 1\ndef f(x):\n    return g(x)",
        "def g(x):\n    return x + 2\ndef f(x):\n    return g(x)",
    ),
    "function called by a called function": (
        "def h(x):\n    return x + 1\ndef g(x):\n    return h(x)\ndef f(x):\n    return g(x)",
        "def h(x):\n    return x + 2\ndef g(x):\n    return h(x)\ndef f(x):\n    return g(x)",
    ),
    "function called by an inner lambda": (
        "def g(x):\n    return x + 1\ndef f(x):\n    return list(map(lambda y: g(y), x))",
        "def g(x):\n    return x + 2\ndef f(x):\n    return list(map(lambda y: g(y), x))",
    ),
    "set in the code": ("f = lambda x: x in {'a', 'b'}", "f = lambda x: x in {'a', 'c'}"),
    "regular expression": (
        "import re\nR = re.compile('a')\nf = lambda x: R.match(x)",
        "import re\nR = re.compile('b')\nf = lambda x: R.match(x)",
    ),
    "partial": (
        "from functools import partial\nf = partial(lambda n, x: x, 1)",
        "from functools import partial\nf = partial(lambda n, x: x, 2)",
    ),
    "keyword of a partial": (
        "from functools import partial\nf = partial(lambda x, n: x, n=1)",
        "from functools import partial\nf = partial(lambda x, n: x, n=2)",
    ),
    "method of a dictionary": ("f = {'a': 1}.get", "f = {'a': 2}.get"),
    "function of a user's module": (
        "import types\nM = types.ModuleType('helpers')\nexec('def g(x):\\n    return x + 1', vars(M))\nf = lambda x: M.g(x)",
        "import types\nM = types.ModuleType('helpers')\nexec('def g(x):\\n    return x + 2', vars(M))\nf = lambda x: M.g(x)",
    ),
    "value of a user's module": (
        "import types\nM = types.ModuleType('settings')\nM.NAMES = ('a',)\nf = lambda x: M.NAMES[x]",
        "import types\nM = types.ModuleType('settings')\nM.NAMES = ('b',)\nf = lambda x: M.NAMES[x]",
    ),
    "module of a user's module": (
        "import types\nM = types.ModuleType('own')\nM.N = types.ModuleType('n')\nM.N.M, M.N.n = M, 1\nf = lambda x: M.N.M.N.n",
        "import types\nM = types.ModuleType('own')\nM.N = types.ModuleType('n')\nM.N.M, M.N.n = M, 2\nf = lambda x: M.N.M.N.n",
    ),
    "function in a library's decorator": (
        "import torch\n@torch.no_grad()\ndef f(x):\n    return x + 1",
        "import torch\n@torch.no_grad()\ndef f(x):\n    return x + 2",
    ),
    "class that a function uses": (
        "class C:\n    def g(self, x):\n        return x + 1\nf = lambda x: C().g(x)",
        "class C:\n    def g(self, x):\n        return x + 2\nf = lambda x: C().g(x)",
    ),
}
TRANSFORM = """
from dataclasses import dataclass
from typing import ClassVar
from plum import dispatch
from blocks import Transform

class Base(Transform):
    def helper(self, x: int) -> int:
        return x + 1

@dataclass
class T(Base):
    n: int = 0
    scale: ClassVar[int] = 3

    @staticmethod
    def apart(x):
        return x * 5

    @property
    def twice(self):
        return self.n * 7

    @dispatch
    def encodes(self, x: int) -> int:
        return self.helper(x) + 10
    @dispatch
    def encodes(self, x: str) -> str:
        return x + "a"
    def own(self, x):
        return x + 20

f = T()
"""
TRANSFORM_CHANGES = {
    "field": ("f = T()", "f = T(5)"),
    "default of a field": ("n: int = 0", "n: int = 1"),
    "dispatched method": ("+ 10", "+ 11"),
    "the other dispatched method": ('"a"', '"b"'),
    "type of a dispatched method": ("x: str", "x: bytes"),
    "method of its own": ("+ 20", "+ 21"),
    "method of a base": ("x + 1\n", "x + 2\n"),
    "class variable": ("= 3", "= 4"),
    "static method": ("* 5", "* 6"),
    "property": ("* 7", "* 8"),
}


@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_changed_code_changes_the_fingerprint(before: str, after: str) -> None:
    assert fingerprint(module(before).f) == fingerprint(module(before).f)
    assert fingerprint(module(before).f) != fingerprint(module(after).f)


@pytest.mark.parametrize(("before", "after"), TRANSFORM_CHANGES.values(), ids=TRANSFORM_CHANGES)
def test_a_changed_transform_changes_the_fingerprint(before: str, after: str) -> None:
    assert before in TRANSFORM
    assert fingerprint(module(TRANSFORM).f) == fingerprint(module(TRANSFORM).f)
    assert fingerprint(module(TRANSFORM).f) != fingerprint(module(TRANSFORM.replace(before, after)).f)


def test_a_transform_with_a_made_default_has_a_fingerprint() -> None:
    text = TRANSFORM.replace("n: int = 0", "n: list = field(default_factory=list)")
    text = text.replace("import dataclass", "import dataclass, field")
    assert fingerprint(module(text).f) == fingerprint(module(text).f)
    assert fingerprint(module(text).f) != fingerprint(module(text.replace("T()", "T([1])")).f)


def test_a_class_of_a_module_that_nobody_can_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was given to exec, as documentation is when it is tested."""
    monkeypatch.delitem(sys.modules, "users_own")
    text = "from dataclasses import dataclass\n@dataclass\nclass C:\n    n: int = 1\nf = C()"
    assert fingerprint(module(text).f) != fingerprint(module(text.replace("1", "2")).f)


@pytest.mark.parametrize(
    "after",
    ["\n\n" + SAME, "# a comment\n" + SAME, SAME + "  # said so", "def unused():\n    pass\n" + SAME],
    ids=["moved", "comment above", "comment behind", "another function"],
)
def test_what_a_function_does_not_see_leaves_the_fingerprint(after: str) -> None:
    assert fingerprint(module(SAME).f) == fingerprint(module(after).f)


def test_functions_that_call_themselves_or_each_other_end() -> None:
    text = "def g(x):\n    return f(x - 1)\ndef f(x):\n    return x and g(x) + f(x - 1)"
    assert fingerprint(module(text).f) == fingerprint(module(text).f) != fingerprint(module(text.replace("1", "2")).f)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, True),
        (1, 1.0),
        ("1", 1),
        ("a", b"a"),
        ((1, 2), [1, 2]),
        ((1, 2), (2, 1)),
        (["ab"], ["a", "b"]),
        ([["a"], "b"], [["a", "b"]]),
        ({"a": 1}, {"a": 2}),
        (None, "None"),
        (Path("a"), "a"),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (np.array([1, 2]), np.array([1, 3])),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.array(["2024-01-01"], "M8[D]"), np.array(["2024-01-02"], "M8[D]")),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (Resize(8), Resize(9)),
        (parent_label, get_image_files),
        (functools.partial(parent_label, 1), functools.partial(parent_label, 2)),
        (RandomSplitter(0.2, seed=1), RandomSplitter(0.2, seed=2)),
    ],
)
def test_different_values_differ(a: Any, b: Any) -> None:
    assert fingerprint(a) != fingerprint(b)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(a))


def test_an_array_is_what_it_holds() -> None:
    grid = np.arange(12.0).reshape(3, 4)
    assert fingerprint(grid[:, ::2]) == fingerprint(grid[:, ::2].copy())


def test_the_order_of_a_set_does_not_count() -> None:
    names = [f"name{i}" for i in range(50)]
    assert fingerprint(set(names)) == fingerprint(frozenset(names[::-1]))


def test_values_without_identity() -> None:
    with pytest.raises(NotFingerprintable, match=r"\(object\) has no lasting identity"):
        fingerprint([1, object()])


# --- plans -------------------------------------------------------------------------------------------------------------

BLOCK = DataBlock(
    blocks=(ImageBlock(), CategoryBlock()),
    get_items=get_image_files,
    get_y=parent_label,
    splitter=RandomSplitter(0.25, seed=1),
    item_tfms=Resize(16),
)


def planned(source: Path, **changes: Any) -> Plan:
    return dataclasses.replace(BLOCK, **changes).plan(source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight files; a plan opens none of them."""
    root = tmp_path / "data"
    for i in range(8):
        file = root / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345678")
    return root


def label_by_stem(item: Path) -> str:
    return item.stem


@pytest.mark.parametrize(
    "changes",
    [
        {"item_tfms": Resize(17)},
        {"item_tfms": ()},
        {"get_y": label_by_stem},
        {"get_x": str},
        {"splitter": RandomSplitter(0.25, seed=2)},
        {"splitter": RandomSplitter(0.26, seed=1)},
        {"blocks": (ImageBlock(), CategoryBlock(vocab=("a", "b")))},
        {"get_items": lambda source: get_image_files(source)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_changed_block_changes_the_fingerprint(changes: dict[str, Any], folder: Path) -> None:
    assert planned(folder).fingerprint == planned(folder).fingerprint
    assert planned(folder, **changes).fingerprint != planned(folder).fingerprint
    assert planned(folder, **changes).unkept is None


def test_batch_transforms_leave_the_fingerprint(folder: Path) -> None:
    other = planned(folder, batch_tfms=[Normalize((0.5,), (0.5,)), lambda x: x])
    assert other.fingerprint == planned(folder).fingerprint


def rewritten(folder: Path) -> None:
    """Another size at the same time."""
    file = folder / "a" / "0.png"
    at = file.stat().st_mtime_ns
    file.write_bytes(b"123456789")
    os.utime(file, ns=(at, at))


def touched(folder: Path) -> None:
    file = folder / "a" / "0.png"
    at = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(at, at))


CHANGED_FILES: list[Callable[[Path], Any]] = [
    rewritten,
    touched,
    lambda folder: (folder / "a" / "new.png").write_bytes(b"1"),
    lambda folder: (folder / "b" / "7.png").unlink(),
    lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "00.png"),
]


@pytest.mark.parametrize("change", CHANGED_FILES, ids=["size", "time", "added", "removed", "renamed"])
def test_changed_files_change_the_fingerprint(change: Callable[[Path], Any], folder: Path) -> None:
    before = planned(folder).fingerprint
    change(folder)
    assert planned(folder).fingerprint != before


def test_what_is_no_item_leaves_the_fingerprint(folder: Path) -> None:
    before = planned(folder).fingerprint
    (folder / "notes.txt").write_text("no picture")
    assert planned(folder).fingerprint == before


ITEMS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "text": (lambda line: line, lambda item: item.split(",")[1]),
    "dictionary": (lambda line: {"text": line, "label": line.split(",")[1]}, lambda item: item["label"]),
}


@pytest.mark.parametrize(("as_item", "get_y"), ITEMS.values(), ids=ITEMS)
def test_changed_items_that_are_no_files_change_the_fingerprint(
    as_item: Callable[[str], Any], get_y: Callable[[Any], Any], tmp_path: Path
) -> None:
    """The rows of a table have no size and time of their own: what they hold counts."""
    table = tmp_path / "rows.csv"

    def read(source: Path) -> list[Any]:
        return [as_item(line) for line in Path(source).read_text().splitlines()]

    def plan() -> Plan:
        return DataBlock((TransformBlock(), CategoryBlock()), get_items=read, get_y=get_y).plan(table)

    table.write_text("\n".join(f"text {i},{'ab'[i % 2]}" for i in range(20)))
    before = plan()
    assert before.unkept is None
    assert plan().fingerprint == before.fingerprint
    table.write_text(table.read_text().replace("text 3", "TEXT 3"))
    assert plan().fingerprint != before.fingerprint


def test_changed_files_named_by_text_change_the_fingerprint(folder: Path) -> None:
    """get_items may as well give names of files: glob.glob does."""

    def plan() -> Plan:
        by_name = EndSplitter(0.5)
        return planned(folder, get_items=lambda source: sorted(map(str, Path(source).rglob("*.png"))), splitter=by_name)

    before = plan().fingerprint
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")
    assert plan().fingerprint != before


ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path
from plum import dispatch
from blocks import *

@dataclass
class Mark(Transform):
    n: int = 3

    @dispatch
    def encodes(self, x: PILImage) -> PILImage:
        return x

    @dispatch
    def encodes(self, x: TensorCategory | str):
        return x

WORDS = {"alpha", "beta", "gamma", "delta"}

def label(item, known=frozenset(["x", "y", "z"])):
    return item.parent.name if item.stem not in WORDS | {"one", "two", "three"} else str(known)

block = DataBlock(
    blocks=(ImageBlock(), CategoryBlock()), get_items=get_image_files, get_y=lambda item: label(item),
    splitter=RandomSplitter(0.25, seed=1), item_tfms=[Resize(16), Mark()],
)
def show(source):
    plan = block.plan(source)
    print(plan.fingerprint, plan.unkept)
"""


def test_a_fresh_process_finds_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "users_own.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", "import sys, users_own; users_own.show(sys.argv[1])", folder],
        # Of this checkout, wherever the installation points.
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    here = module(SCRIPT).block.plan(folder)
    assert done.stdout == f"{here.fingerprint} None\n"


@pytest.fixture
def open_socket() -> Iterator[socket.socket]:
    with socket.socket() as opened:
        yield opened


def test_a_plan_that_cannot_be_recognised(folder: Path, open_socket: socket.socket) -> None:
    def label(item: Path) -> str:
        return str(open_socket) and item.parent.name

    first, second = planned(folder, get_y=label), planned(folder, get_y=label)
    assert "socket" in str(first.unkept)
    assert "has no lasting identity" in str(first.unkept)
    assert first.fingerprint == first.fingerprint
    assert first.fingerprint != second.fingerprint
    assert f"not kept across runs: {first.unkept}" in first.explain()
    assert planned(folder).unkept is None
    assert "not kept" not in planned(folder).explain()


def test_pickling_an_object_leaves_the_fingerprint_of_its_class() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own:
        n: int = 1

    before = fingerprint(Own())
    Own().__reduce_ex__(2)  # what pickle does, which leaves a list of slots on the class
    assert "__slotnames__" in vars(Own)
    assert fingerprint(Own()) == before
