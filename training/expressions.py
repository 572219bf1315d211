"""Values written as text, such as `1e-3` or `fine_tune(4, freeze_epochs=1)`: literals and calls of listed names, no code."""

import ast
from collections.abc import Callable, Mapping
from typing import Any


class NotAnExpression(ValueError):
    """The text is not made of literals and listed names; it may be meant as plain text."""


def read_expression(text: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of `text`. NotAnExpression when it is none; ValueError when a listed name refuses its arguments."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, names)
    except TypeError as error:  # a dict's key that cannot be one
        raise ValueError(f"{text}: {error}") from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise NotAnExpression(f"{text!r} is not a value: {error}") from error


def is_call(text: str) -> bool:
    """Whether `text` is a call, such as `choice(1, 2)`."""
    try:
        return isinstance(ast.parse(text.strip(), mode="eval").body, ast.Call)
    except (SyntaxError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr, names: Mapping[str, Callable[..., Any]]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.Tuple(elements):
            return tuple(_value(e, names) for e in elements)
        case ast.List(elements):
            return [_value(e, names) for e in elements]
        case ast.Dict(keys, values) if None not in keys:
            return {_value(k, names): _value(v, names) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Call(ast.Name(name), args, keywords) if name in names and all(k.arg is not None for k in keywords):
            positional = [_value(a, names) for a in args]
            named = {k.arg: _value(k.value, names) for k in keywords if k.arg is not None}
            try:
                return names[name](*positional, **named)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise ValueError(f"{ast.unparse(node)}: {error}") from error
        case ast.Call(ast.Name(name)) if name not in names:
            raise ValueError(f"{ast.unparse(node)}: {name!r} is not known here; known: {', '.join(sorted(names))}")
    raise NotAnExpression(f"{ast.unparse(node)!r} is not a value: literals and {', '.join(sorted(names))} are")
