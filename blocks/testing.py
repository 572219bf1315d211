"""The contract that every transform and block keeps, as functions for anyone's tests: ours run them over one table of cases.

    check_transform(Case(MyTransform(3), values=["a", "b"], inverse=0))

Each check raises AssertionError with what differs. They need neither pytest nor Ray: `check_carried` takes the carrier.
"""

import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from blocks.datablock import TransformBlock
from blocks.fingerprint import fingerprint
from blocks.shards import TYPE_KEY, BytesColumn, FixedColumn, RaggedColumn, read_column, typed_column
from blocks.tensors import tensor_type
from blocks.transform import ColumnSummary, ColumnTransform, Pipeline, Summary, Transform, transform_from_plain

Carrier = Callable[[Callable[[pa.Table], pa.Table], Sequence[pa.Table]], Iterable[pa.Table]]


@dataclass(frozen=True)
class Case:
    """A transform and what to try it on.

    values: some that it acts on, each alone (a tuple is a sample). inverse: how far decode(encode(value)) may be from the
    value, 0 for exactly; None where nothing leads back. batch: the values are tensors of one shape, and stacked they are a
    batch. column: whether `values` as an Arrow column are encoded as a whole. tolerance: how far a value alone may be from
    the same one in a batch.
    """

    transform: Transform
    values: Sequence[Any] = ()
    inverse: float | None = None
    batch: bool = False
    column: bool = False
    tolerance: float = 0.0
    seed: int = field(default=0, kw_only=True)

    @property
    def keys(self) -> torch.Tensor:
        """A key for each value, by which random transforms draw."""
        return torch.arange(len(self.values)) * 7919 + self.seed

    def value(self, i: int) -> Any:
        """Value `i`, anew, as a batch of one where values are batched."""
        return _stacked([self.values[i]]) if self.batch else _copied(self.values[i])

    def encoded(self, i: int) -> Any:
        """Value `i` alone after the transform, on the training side."""
        return self._through(self.value(i), self.keys[i : i + 1])

    def encoded_together(self) -> Any:
        """All values as one batch after the transform, on the training side."""
        return self._through(_stacked(self.values), self.keys)

    def _through(self, value: Any, keys: torch.Tensor) -> Any:
        return Pipeline((self.transform,))(value, split_idx=0, keys=keys)


def check_transform(case: Case) -> None:
    """All that holds for a transform in this process; `check_fingerprints` and `check_carried` cross into others."""
    check_plain(case.transform)
    check_stranger(case.transform)
    check_unchanged(case)
    if case.inverse is not None:
        check_inverse(case)
    if case.batch:
        check_alone_as_in_a_batch(case)
    if case.column:
        check_column(case)


def check_plain(transform: Transform) -> None:
    """It is equal to itself pickled, copied field by field, and written as JSON and read again; its fingerprint too."""
    plain = json.loads(json.dumps(transform.to_plain()))
    copies = {
        "pickled": pickle.loads(pickle.dumps(transform)),  # noqa: S301  our own bytes
        "copied": dataclasses.replace(transform),
        "written as JSON": transform_from_plain(plain),
    }
    for how, copy in copies.items():
        _require(type(copy) is type(transform), f"{transform} {how} is a {type(copy).__name__}")
        _require(copy == transform, f"{transform} {how} is {copy}")
        _require(fingerprint(copy) == fingerprint(transform), f"{transform} {how} has another fingerprint")
    _require(f"{type(transform).__name__}(" in repr(transform), f"{transform!r} does not print as the dataclass it is")


def check_stranger(transform: Transform) -> None:
    """A value of a type it does not know passes as it is, or is refused by an error that names the type.

    One whose `encodes` is for any object, such as a Categorize with a class for the unknown, may make something of it.
    """
    stranger = object()
    encodes: Any = type(transform).encodes
    takes_any = any(method.signature.types[1] is object for method in encodes.methods)
    try:
        passed = Pipeline((transform,))(stranger, split_idx=0, keys=torch.tensor([1]))
    except (TypeError, ValueError) as refused:
        _require("object" in str(refused), f"{transform} refuses an object by saying {str(refused)!r}")
    else:
        _require(takes_any or passed is stranger, f"{transform} makes {passed!r:.100} of an object it cannot know")
        _require(transform.decode(stranger) is stranger, f"{transform} decodes an object it cannot know")


def check_unchanged(case: Case) -> None:
    """Encoding twice gives the same, and leaves the transform as it was."""
    before = case.transform.to_plain()
    for i in range(len(case.values)):
        differ = _differ(case.encoded(i), case.encoded(i), 0)
        _require(differ is None, f"{case.transform} of value {i} twice: {differ}")
    _require(case.transform.to_plain() == before, f"{case.transform} was changed by encoding")


def check_inverse(case: Case) -> None:
    """decode undoes encode, up to `case.inverse`."""
    assert case.inverse is not None
    for i in range(len(case.values)):
        differ = _differ(case.transform.decode(case.encoded(i)), case.value(i), case.inverse, types=False)
        _require(differ is None, f"{case.transform}: decoding does not lead back to value {i}: {differ}")


def check_alone_as_in_a_batch(case: Case) -> None:
    """A value comes out alone, as a batch of one, as it does among others."""
    together = case.encoded_together()
    for i in range(len(case.values)):
        differ = _differ(_row(case.encoded(i), 0), _row(together, i), case.tolerance)
        _require(differ is None, f"{case.transform}: value {i} alone is not as in its batch: {differ}")


def check_column(case: Case) -> None:
    """`encodes_column` of an Arrow column has in each row what `encodes` makes of the value, slices and no rows too."""
    _require(isinstance(case.transform, ColumnTransform), f"{case.transform} has no encodes_column")
    values = pa.array(list(case.values))
    encode: Any = case.transform
    for some in (values, values[1:], values[:0]):
        column = encode.encodes_column(some)
        parts = column if isinstance(column, tuple) else (column,)
        lists = [_rows_in(part) for part in parts]
        _require(all(len(rows) == len(some) for rows in lists), f"{case.transform}: other rows than {len(some)} values")
        for i, value in enumerate(some.to_pylist()):
            single = case.transform(value)
            alone = single if isinstance(column, tuple) else (single,)
            for rows, one in zip(lists, alone, strict=True):
                wanted = one.numpy() if isinstance(one, torch.Tensor) else one
                same = np.array_equal(rows[i], wanted) and np.asarray(rows[i]).dtype == np.asarray(wanted).dtype
                _require(same, f"{case.transform}: {value!r:.100} is {rows[i]!r} in a column, {wanted!r} alone")


def _rows_in(part: Any) -> list[Any]:
    if isinstance(part, np.ndarray):
        return list(part)
    return [row.values.to_numpy() for row in part] if isinstance(part, pa.LargeListArray) else part.to_pylist()


def check_block(block: TransformBlock, items: Sequence[Any], item_tfms: Any = ()) -> None:
    """What a block makes of items can be stored and comes back as it was, typed, and passes its batch transforms.

    item_tfms: what a DataBlock would need besides, such as Resize. The block needs nothing fitted: give its vocabulary.
    """
    for tfms in (block.type_tfms, block.item_tfms, block.batch_tfms):
        for transform in Pipeline.of(tfms).transforms:
            check_plain(transform)
    encode = (Pipeline.of(block.type_tfms), Pipeline.of([*block.item_tfms, *Pipeline.of(item_tfms).transforms]))
    encoded = [encode[1]((encode[0](item),))[0] for item in items]
    columns = list(zip(*encoded, strict=True)) if type(encoded[0]) is tuple else [tuple(encoded)]
    batch = []
    for number, values in enumerate(columns):
        back = _once_stored(values)
        for i, value in enumerate(values):
            differ = _differ(back[i], value, 0)
            _require(differ is None, f"column {number} of item {i}, once stored: {differ}")
        batch.append(torch.stack(back) if len({b.shape for b in back}) == 1 else back[0][None])
    transformed = Pipeline.of(block.batch_tfms)(tuple(batch), split_idx=1)
    for number, (before, after) in enumerate(zip(batch, transformed, strict=True)):
        _require(type(after) is type(before), f"column {number} is a {type(after).__name__} after batch_tfms")


def check_summary(kind: Callable[[], Summary], values: Sequence[Any], seed: int = 0, tolerance: float = 1e-12) -> None:
    """What parts of the values show, merged in any order, is what one pass over them shows; through JSON and columns too.

    Whole numbers and texts are equal, floats up to `tolerance`, relative to their size.
    """
    draw = random.Random(seed)
    whole = _seen(kind, values, range(len(values)))
    part_of = [draw.randrange(4) for _ in values]
    for order in (range(4), reversed(range(4)), draw.sample(range(4), 4)):
        merged = kind()
        for part in order:
            ids = [i for i, p in enumerate(part_of) if p == part]
            seen = _seen(kind, [values[i] for i in ids], ids)
            merged.merge(type(whole).from_plain(json.loads(json.dumps(seen.to_plain()))))
        _require(
            _close(merged.to_plain(), whole.to_plain(), tolerance),
            f"{merged} of parts is not {whole}, of all {len(values)} values",
        )
    if isinstance(whole, ColumnSummary):
        for first in (0, 1):  # a slice of an array keeps its offset
            by_column: Any = kind()
            by_column.observe_column(pa.array(list(values))[first:], pa.array(range(len(values)))[first:])
            by_row = _seen(kind, values[first:], range(first, len(values)))
            _require(_close(by_column.to_plain(), by_row.to_plain(), tolerance), f"{by_column} of a column is not {by_row}")


def _seen(kind: Callable[[], Summary], values: Sequence[Any], ids: Iterable[int]) -> Summary:
    summary: Any = kind()
    for value, row_id in zip(values, ids, strict=True):
        summary.observe(value, row_id)
    return summary


def _close(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[k], other[k], tolerance) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return math.isclose(one, other, rel_tol=tolerance) if isinstance(one, float) else bool(one == other)


def _once_stored(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    stored_field, array = typed_column("x", values)
    kind = tensor_type(stored_field.metadata[TYPE_KEY].decode())
    match read_column(pa.Table.from_arrays([array], schema=pa.schema([stored_field])), "x"):
        case RaggedColumn(flat, offsets):
            rows = [flat[a:b] for a, b in itertools.pairwise(offsets)]
        case FixedColumn(array):
            rows = list(array)
        case BytesColumn():
            raise AssertionError("a block makes tensors, not bytes")
    return [torch.from_numpy(np.array(row)).as_subclass(kind) for row in rows]


def check_fingerprints(transforms: Sequence[Any]) -> None:
    """Another process, with other hashes of Python's own, finds the same fingerprints. They must be importable there."""
    program = (
        "import pickle, sys; from blocks.fingerprint import fingerprint; "
        "print(*[fingerprint(t) for t in pickle.load(sys.stdin.buffer)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(list(transforms)), env=environment, capture_output=True, check=False
    )
    _require(done.returncode == 0, done.stderr.decode())
    for transform, elsewhere in zip(transforms, done.stdout.decode().split(), strict=True):
        _require(fingerprint(transform) == elsewhere, f"{transform} has another fingerprint in another process")


def check_carried(cases: Sequence[Case], carrier: Carrier) -> None:
    """What `carrier` (blocks.prepare.map_here, or Ray Data's) makes of the values elsewhere is what comes of them here."""
    rows = [(c, v) for c, case in enumerate(cases) for v in range(len(case.values))]
    tables = [pa.table({"case": [c], "value": [v]}) for c, v in rows]
    function = partial(_encoded_rows, list(cases))
    elsewhere = {(r["case"], r["value"]): r["encoded"] for t in carrier(function, tables) for r in t.to_pylist()}
    _require(sorted(elsewhere) == sorted(rows), f"{len(rows)} values went out, {len(elsewhere)} came back")
    for c, v in rows:
        case = cases[c]
        there = pickle.loads(elsewhere[c, v])  # noqa: S301  our own bytes
        differ = _differ(there, case.encoded(v), 0)
        _require(differ is None, f"{case.transform} of value {v} elsewhere: {differ}")


def _encoded_rows(cases: Sequence[Case], rows: pa.Table) -> pa.Table:
    pairs = zip(rows["case"].to_pylist(), rows["value"].to_pylist(), strict=True)
    encoded = [pickle.dumps(cases[c].encoded(v)) for c, v in pairs]
    return rows.append_column("encoded", pa.array(encoded, pa.large_binary()))


# --- comparing ---------------------------------------------------------------------------------------------------------


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _copied(value: Any) -> Any:
    # What a transform may change in place is made anew.
    if type(value) is tuple:
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, torch.Tensor) else value.copy() if isinstance(value, Image.Image) else value


def _stacked(values: Sequence[Any]) -> Any:
    if type(values[0]) is tuple:
        return tuple(_stacked(column) for column in zip(*values, strict=True))
    return torch.stack(list(values))


def _row(batch: Any, i: int) -> Any:
    return tuple(_row(column, i) for column in batch) if type(batch) is tuple else batch[i]


def _differ(one: Any, other: Any, tolerance: float, types: bool = True) -> str | None:
    # How two values differ, or None. types: the classes count as well.
    if types and type(one) is not type(other):
        return f"{type(one).__name__} instead of {type(other).__name__}"
    if type(one) is tuple and type(other) is tuple:
        if len(one) != len(other):
            return f"{len(one)} elements instead of {len(other)}"
        found = (_differ(a, b, tolerance, types) for a, b in zip(one, other, strict=True))
        return next((f for f in found if f is not None), None)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or (types and one.dtype != other.dtype):
            return f"{tuple(one.shape)} of {one.dtype} instead of {tuple(other.shape)} of {other.dtype}"
        distance = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
        return None if distance <= tolerance else f"{distance:.3g} apart"
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        same = one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
        return None if same else f"another picture: {one.mode} {one.size} instead of {other.mode} {other.size}"
    if isinstance(one, int | float) and isinstance(other, int | float):
        return None if abs(one - other) <= tolerance else f"{one} instead of {other}"
    return None if bool(np.all(one == other)) else f"{one!r:.100} instead of {other!r:.100}"
