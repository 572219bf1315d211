"""`Plan`: what a DataBlock and a source become. Frozen stages in order, plain data that knows no engine.

Read -> Split -> Fit (one for each thing to learn) -> Encode   once, kept under the fingerprint
BatchSide                                                      each batch, on the device
"""

import contextlib
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, assert_never

import pyarrow as pa

from blocks.fingerprint import NotFingerprintable, fingerprint, versions
from blocks.transform import Pipeline, Transform, transform_from_plain

ITEMS_KEY = b"fastray.items"
LONGEST_PATH = 4096


@dataclass(frozen=True)
class Read:
    """List the items of a source."""

    source: str
    get_items: Callable[[Any], Any]


@dataclass(frozen=True)
class Split:
    """Say which rows train and which validate."""

    splitter: Any
    train: int
    valid: int
    left_out: int = 0


@dataclass(frozen=True)
class Fit:
    """Learn the state of one transform of one column from the training part."""

    column: str
    position: int  # of the transform among the column's


@dataclass(frozen=True)
class Column:
    """One input or target: how to get it from an item, and the transforms that make it a typed value."""

    name: str
    getter: Callable[[Any], Any]
    type_tfms: Pipeline


@dataclass(frozen=True)
class Encode:
    """Make each item a row of typed values: `item_tfms` once, `each_epoch` whenever a row is drawn.

    A block's value is one stored column, called as the block is; a tuple is several, called `x.0`, `x.1`, ...
    """

    columns: tuple[Column, ...]  # one a block, inputs first
    item_tfms: Pipeline
    each_epoch: Pipeline = field(default_factory=Pipeline)  # the item transforms from the first random one on
    n_inp: int = 1  # how many of the blocks are inputs
    layout: tuple[str, ...] = ()  # the names of the stored columns, known once something is encoded

    @property
    def n_input_columns(self) -> int:
        """How many of the stored columns are inputs."""
        inputs = {c.name for c in self.columns[: self.n_inp]}
        return sum(name.partition(".")[0] in inputs for name in self.layout) or self.n_inp

    def flat(self, values: Sequence[Any]) -> dict[str, Any]:
        """The values of the blocks as those of the stored columns, by name."""
        flat: dict[str, Any] = {}
        for column, value in zip(self.columns, values, strict=True):
            if isinstance(value, tuple):
                flat.update({f"{column.name}.{i}": part for i, part in enumerate(value)})
            else:
                flat[column.name] = value
        return flat

    def nested(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The values of the blocks from those of the stored columns: the parts of a tuple are a tuple again."""
        by_block: dict[str, Any] = {}
        for name, value in zip(self.layout or [c.name for c in self.columns], flat, strict=True):
            block, dot, _ = name.partition(".")
            by_block[block] = (*by_block.get(block, ()), value) if dot else value
        return tuple(by_block.values())


@dataclass(frozen=True)
class BatchSide:
    """What is left for each batch, on the model's device."""

    batch_tfms: Pipeline


Stage = Read | Split | Fit | Encode | BatchSide


@dataclass(frozen=True, eq=False)
class Plan:
    """`listing`: one row an item (id, item, size, mtime_ns, part: 0 train, 1 valid), in the order of the store."""

    listing: pa.Table
    stages: tuple[Stage, ...]

    def stage(self, kind: type[Any]) -> Any:
        """The one stage of this kind."""
        (found,) = (s for s in self.stages if isinstance(s, kind))
        return found

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.stage(Encode).columns

    @property
    def batch_tfms(self) -> Pipeline:
        return self.stage(BatchSide).batch_tfms

    def to_fit(self) -> list[tuple[Column, int]]:
        """The columns with something to learn from the data, and where among their transforms."""
        by_name = {c.name: c for c in self.columns}
        return [(by_name[s.column], s.position) for s in self.stages if isinstance(s, Fit)]

    def encode_with(self, fitted: Sequence[dict[str, Any]], layout: Sequence[str] = ()) -> Encode:
        """The encoding stage with the fitted transforms, given as plain data by column and position, in their places."""
        encode: Encode = self.stage(Encode)
        tfms = {c.name: list(c.type_tfms.transforms) for c in encode.columns}
        for fit in fitted:
            tfms[fit["column"]][fit["position"]] = transform_from_plain(fit["transform"])
        columns = tuple(replace(c, type_tfms=Pipeline(tuple(tfms[c.name]))) for c in encode.columns)
        return replace(encode, columns=columns, layout=tuple(layout))

    @cached_property
    def _identity(self) -> tuple[str, str | None]:
        try:
            return fingerprint(self._what_shapes_the_store()), None
        except NotFingerprintable as reason:
            return uuid.uuid4().hex[:16], str(reason)

    def _what_shapes_the_store(self) -> list[Any]:
        # What happens to each batch leaves the store as it is, so it may change without preparing anything again.
        # A file's content counts by its size and time, another item's by itself.
        files = self.listing.schema.metadata[ITEMS_KEY] == b"paths"
        items = None if files else items_in(self.listing)
        listing = self.listing.drop_columns(["item"])
        return [versions(), listing, items, *(s for s in self.stages if not isinstance(s, BatchSide))]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the configuration, the listing, a function or a library does."""
        return self._identity[0]

    @property
    def unkept(self) -> str | None:
        """Why this plan cannot be recognised in a later run, or None."""
        return self._identity[1]

    def explain(self, prepared: Any = None) -> str:
        """One line a stage: what, where, once or per batch, rows and bytes; with `prepared`, what came of it."""
        lines = [f"plan {self.fingerprint}" + (f" (not kept across runs: {self.unkept})" if self.unkept else "")]
        lines += [f"  {name:<7} {when:<11} {what}" for name, when, what in self._explained(prepared)]
        return "\n".join(lines)

    def _explained(self, prepared: Any) -> Iterator[tuple[str, str, str]]:
        fitted = {} if prepared is None else {c.name: c.type_tfms for c in prepared.encode.columns}
        for stage in self.stages:
            match stage:
                case Read(source, get_items):
                    size = sum(s or 0 for s in self.listing["size"].to_pylist())
                    yield (
                        "read",
                        "once",
                        f"{self.listing.num_rows} items, {_bytes(size)}, {_name(get_items)} of {source}",
                    )
                case Split(splitter, train, valid, left_out):
                    if prepared is not None:  # once lone classes have moved and bad rows are gone
                        train, valid = prepared.index["parts"]["train"], prepared.index["parts"]["valid"]
                    left = f", {left_out} rows left out" if left_out else ""
                    yield "split", "once", f"{_name(splitter)}: {train} training rows, {valid} validation rows{left}"
                case Fit(column, position):
                    tfm = next(c for c in self.columns if c.name == column).type_tfms.transforms[position]
                    state = f" = {_state(fitted[column].transforms[position])}" if column in fitted else ""
                    yield "fit", "once", f"{column}: {type(tfm).__name__} on the training part, one pass{state}"
                case Encode(columns, item_tfms, each_epoch):
                    for c in columns:
                        yield "encode", "once", f"{c.name}: {_name(c.getter)} -> {c.type_tfms}"
                    yield "encode", "once", f"sample: {item_tfms}"
                    if prepared is not None:
                        yield "store", "once", prepared.described()
                    if each_epoch.transforms:
                        yield "sample", "each epoch", f"{each_epoch}, drawn anew by (seed, epoch, row)"
                case BatchSide(batch_tfms):
                    yield "batch", "each batch", f"{batch_tfms}, on the model's device"
                case _:
                    assert_never(stage)


def listing_of(items: Sequence[Any], root: Path | None) -> pa.Table:
    """One row an item: its id (a path relative to the source's root, else its position), itself, size and mtime."""
    paths = all(isinstance(item, Path) for item in items)
    stats = [_stat(item) for item in items]
    return pa.table(
        {
            "id": [_relative(item, root) if paths else str(i) for i, item in enumerate(items)],
            # Anything else travels as it is, from the driver to the tasks of the same run.
            "item": [str(item) for item in items] if paths else [pickle.dumps(item) for item in items],
            "size": pa.array([size for size, _ in stats], pa.int64()),
            "mtime_ns": pa.array([mtime for _, mtime in stats], pa.int64()),
        }
    ).replace_schema_metadata({ITEMS_KEY: b"paths" if paths else b"pickled"})


def _stat(item: Any) -> tuple[int, int]:
    # Of a file; one that is not there is found out when it is read. A text may name a file, or be data itself.
    if isinstance(item, Path) or (isinstance(item, str) and len(item) < LONGEST_PATH):
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(item)
            return found.st_size, found.st_mtime_ns
    return 0, 0


def items_in(rows: pa.Table) -> list[Any]:
    """The items of some rows of a listing, as `get_items` gave them."""
    items: list[Any] = rows["item"].to_pylist()
    if rows.schema.metadata[ITEMS_KEY] == b"paths":
        return [Path(item) for item in items]
    return [pickle.loads(item) for item in items]  # noqa: S301  the driver's own, of this run


def _relative(path: Path, root: Path | None) -> str:
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.as_posix()


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)


def _state(t: Transform) -> str:
    values = [v for v in t.to_plain().values() if isinstance(v, tuple)]
    return "; ".join(f"{len(v)} values ({', '.join(map(str, v[:10]))}{', ...' if len(v) > 10 else ''})" for v in values)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:.3g} TB"
