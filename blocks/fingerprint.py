"""Fingerprints: when two plans prepare the same data.

Of a function of the user's, its bytecode, constants, defaults, closure and the functions of the user's modules that it
calls count; of a library's, its name, because `versions` covers the rest.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import platform
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import plum
import pyarrow as pa

from blocks.house import HOUSE

LIBRARIES = ("numpy", "pillow", "pyarrow", "torch")
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib"))


# What Python and dataclass put into every class.
_NOT_ITS_OWN = {
    *vars(object),
    *("__module__", "__dict__", "__weakref__", "__annotations__", "__orig_bases__", "__parameters__", "__slots__"),
    "__slotnames__",  # pickle leaves it on a class whose objects it has seen
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__abstractmethods__", "_abc_impl"),
} - {"__init__", "__eq__", "__hash__"}


class NotFingerprintable(ValueError):
    """A value that has no lasting identity, and where it was found."""


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what turns files into tensors: Python's, the libraries', and a hash of this package's files."""
    ours = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py"))))
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "blocks": ours.hexdigest()} | libraries


def fingerprint(*values: Any, **named: Any) -> str:
    """16 hex digits of `values`. NotFingerprintable when one holds something without a lasting identity."""
    digest = hashlib.sha256()
    for token in _tokens([*values, named], seen={}):
        digest.update(token.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _tokens(value: Any, seen: dict[int, int]) -> Iterator[str]:
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | PurePath():
            yield f"{type(value).__name__}:{value!r}"
        case re.Pattern():
            yield f"pattern:{value.pattern!r}:{value.flags}"
        case enum.Enum():
            yield f"{type(value).__qualname__}.{value.name}"
        case list() | tuple():
            yield f"{type(value).__name__}[{len(value)}"
            for v in value:
                yield from _tokens(v, seen)
        case set() | frozenset():
            yield f"set[{len(value)}"
            yield from sorted(fingerprint(v) for v in value)
        case dict():
            yield f"dict[{len(value)}"
            for k, v in value.items():
                yield from _tokens(k, seen)
                yield from _tokens(v, seen)
        case np.ndarray() if not value.dtype.hasobject:
            yield f"array:{value.dtype}:{value.shape}:{hashlib.sha256(value.tobytes()).hexdigest()}"
        case np.ndarray():
            yield f"array:{value.shape}"
            yield from _tokens(value.tolist(), seen)
        case pa.Table():
            yield hashlib.sha256(_ipc(value)).hexdigest()
        case types.FunctionType():
            yield from _function(value, seen)
        case functools.partial():
            yield from _tokens([value.func, value.args, value.keywords], seen)
        case types.BuiltinFunctionType():
            yield f"{value.__module__}:{value.__qualname__}"
            if not isinstance(value.__self__, types.ModuleType | None):  # a method: labels.get
                yield from _tokens(value.__self__, seen)
        case type():
            yield f"{value.__module__}:{value.__qualname__}"
            yield from _class(value, seen)
        case types.CodeType():
            yield from _code(value, seen)
        case types.MethodType():
            yield from _tokens([value.__func__, value.__self__], seen)
        case _ if dataclasses.is_dataclass(value):
            yield from _tokens(type(value), seen)
            for f in dataclasses.fields(value):
                yield f.name
                yield from _tokens(getattr(value, f.name), seen)
        case _:
            raise NotFingerprintable(f"{value!r:.80} ({type(value).__name__}) has no lasting identity")


def _class(cls: type, seen: dict[int, int]) -> Iterator[str]:
    # What a class of the user's, and each of its bases, defines; of a library's its name has to do.
    if id(cls) in seen:
        return
    seen[id(cls)] = len(seen)
    for base in cls.__mro__:
        if _of_a_library(base.__module__, _file_of(base)):
            continue
        for name, member in sorted(vars(base).items()):
            if name in _NOT_ITS_OWN or (dataclasses.is_dataclass(base) and _made_by_dataclass(name, member)):
                continue
            yield name
            yield from _member(member, seen)


def _made_by_dataclass(name: str, member: Any) -> bool:
    return name.startswith("__") and getattr(getattr(member, "__code__", None), "co_filename", "") == "<string>"


def _member(member: Any, seen: dict[int, int]) -> Iterator[str]:
    match member:
        case staticmethod() | classmethod():
            yield from _tokens(member.__func__, seen)
        case property():
            yield from _tokens([member.fget, member.fset], seen)
        case plum.Function():
            for m in member.methods:
                yield str(m.signature)
                yield from _tokens(m.implementation, seen)
        case types.MemberDescriptorType() | types.GetSetDescriptorType() | functools.cached_property():
            yield "descriptor"
        case _:
            yield from _tokens(member, seen)


def _file_of(cls: type) -> str | None:
    return getattr(sys.modules.get(cls.__module__ or ""), "__file__", None)


def _function(f: types.FunctionType, seen: dict[int, int]) -> Iterator[str]:
    if _of_a_library(f.__module__, f.__code__.co_filename):
        yield f"{f.__module__}:{f.__qualname__}"
        if hasattr(f, "__wrapped__"):  # a library's decorator around a function of the user's
            yield from _tokens(f.__wrapped__, seen)
        return
    if id(f) in seen:  # a function that calls itself, or one that two others call
        yield f"seen:{seen[id(f)]}"
        return
    seen[id(f)] = len(seen)
    yield from _code(f.__code__, seen)
    yield from _tokens([f.__defaults__, f.__kwdefaults__], seen)
    for cell in f.__closure__ or ():
        yield from _tokens(cell.cell_contents, seen)
    names = _names(f.__code__)
    for name in names:
        used = f.__globals__.get(name)
        if isinstance(used, types.ModuleType):
            yield from _module(used, names, seen)
        elif used is not None:
            yield name
            yield from _tokens(used, seen)


def _module(
    module: types.ModuleType, names: list[str], seen: dict[int, int], within: tuple[types.ModuleType, ...] = ()
) -> Iterator[str]:
    # Of a module of the user's, all that a function with these names in it may take from there: values, and other modules.
    yield f"module:{module.__name__}"
    if module in within or _of_a_library(module.__name__, getattr(module, "__file__", None)):
        return
    for name in names:
        used = vars(module).get(name)
        if isinstance(used, types.ModuleType):
            yield from _module(used, names, seen, (*within, module))
        elif used is not None:
            yield name
            yield from _tokens(used, seen)


def _code(code: types.CodeType, seen: dict[int, int]) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        yield from _tokens(constant, seen)


def _names(code: types.CodeType) -> list[str]:
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _of_a_library(module: str | None, filename: str | None) -> bool:
    top = (module or "").partition(".")[0]
    if top in HOUSE or top == "builtins":
        return True
    return filename is not None and any(Path(filename).is_relative_to(p) for p in _INSTALLED)


def _ipc(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return memoryview(sink.getvalue())
