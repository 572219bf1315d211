"""Values as text: literals and calls of listed names are read, anything that is code is refused, nothing is evaluated."""

from pathlib import Path
from typing import Any

import pytest

from training import fine_tune, flat, one_cycle
from training.expressions import NotAnExpression, read_expression
from training.schedule import SCHEDULES


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        (" -2.5 ", -2.5),
        ("True", True),
        ("None", None),
        ("'a b'", "a b"),
        ("(1, 2)", (1, 2)),
        ("()", ()),
        ("[1, [2, -3]]", [1, [2, -3]]),
        ("{'a': (1,), 2: None}", {"a": (1,), 2: None}),
        ("one_cycle(2)", one_cycle(2)),
        ("fine_tune(4, freeze_epochs=1)", fine_tune(4, freeze_epochs=1)),
        ("[flat(1), one_cycle(2, pct_start=0.5)]", [flat(1), one_cycle(2, pct_start=0.5)]),
    ],
)
def test_literals_and_listed_calls(text: str, value: Any) -> None:
    found = read_expression(text, SCHEDULES)
    assert found == value
    assert type(found) is type(value)


NO_VALUES = [
    "",
    "resnet18",
    "flat",
    "flat.__globals__",
    "(1).__class__",
    "flat(1).__class__",
    "flat(1)(2)",
    "(lambda: 1)()",
    "lambda: 1",
    "[x for x in (1, 2)]",
    "{x for x in (1, 2)}",
    "(x for x in (1, 2))",
    "f'{1}'",
    "f'{flat(1)}'",
    "flat(*[1])",
    "[*[1, 2]]",
    "{**{1: 2}}",
    "1 + 1",
    "2 ** 999999999",
    "not 1",
    "1 < 2",
    "1 if 2 else 3",
    "[1][0]",
    "(x := 1)",
    "{1, 2}",
    "await x",
    "yield",
    "import os",
    "x = 1",
    "1; 2",
    "C:\\data",
    "a/b.png",
    "\0",
]


@pytest.mark.parametrize("text", NO_VALUES)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(NotAnExpression):
        read_expression(text, SCHEDULES)


@pytest.mark.parametrize("text", NO_VALUES)
def test_what_is_no_value_is_refused_inside_a_list(text: str) -> None:
    with pytest.raises(NotAnExpression):
        read_expression(f"[1, {text}, 2]", SCHEDULES)


@pytest.mark.parametrize("text", ["open('x')", "eval('1')", "__import__('os')", "flatt(3)", "[print(1)]"])
def test_a_name_that_is_not_listed_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not known here; known: Curve, Phase, fine_tune, flat, "):
        read_expression(text, SCHEDULES)


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for code in (
        f"__import__('pathlib').Path({str(made)!r}).touch()",
        f"open({str(made)!r}, 'w')",
        f"[open({str(made)!r}, 'w')]",
        f"flat(open({str(made)!r}, 'w'))",
        f"f\"{{open({str(made)!r}, 'w')}}\"",
        f"flat.__globals__['__builtins__']['open']({str(made)!r}, 'w')",
    ):
        with pytest.raises(ValueError, match="not"):
            read_expression(code, SCHEDULES)
    assert not made.exists()


def test_arguments_are_unpacked_for_no_function() -> None:
    """Also not for one that takes any argument."""
    with pytest.raises(ValueError, match=r"\*\*"):
        read_expression("anything(**{'a': 1})", {"anything": lambda **named: named})


def test_a_misleading_argument_name_is_not_invented() -> None:
    with pytest.raises(ValueError, match=r"\*\*") as refused:
        read_expression("flat(**{'epochs': 3})", SCHEDULES)
    assert "'None'" not in str(refused.value)


@pytest.mark.parametrize("text", ["flat()", "flat(0)", "flat(1, 2)", "one_cycle(2, pct=0.5)", "one_cycle(2, pct_start=7)"])
def test_a_refused_argument_is_said_with_the_call(text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)") + ": .") as refused:
        read_expression(text, SCHEDULES)
    assert not isinstance(refused.value, NotAnExpression)


@pytest.mark.parametrize("text", ["{[1]: 2}", "{{}: 1}", "one_cycle(5, div=0)", "flat('3')"])
def test_only_value_errors_come_out(text: str) -> None:
    """The command line catches ValueError; whatever a person typed must not end in a traceback."""
    with pytest.raises(ValueError, match=r"."):
        read_expression(text, SCHEDULES)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "-" * 100_000 + "1",
        "+".join(["1"] * 50_000),
        "a" + ".a" * 50_000,
        "9" * 5_000,
    ],
    ids=["open", "lists", "minus", "sum", "attributes", "digits"],
)
def test_huge_and_deep_texts_are_refused(text: str) -> None:
    with pytest.raises(NotAnExpression):
        read_expression(text, SCHEDULES)
