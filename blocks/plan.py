"""`Plan`: what a DataBlock and a source become. Frozen stages in order, plain data that knows no engine.

Read -> Split -> Fit (one for each thing to learn) -> Encode   once, kept under the fingerprint
the random part of Encode                                      each epoch, as rows are drawn
BatchSide                                                      each batch, on the device
"""

import html
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, assert_never

import numpy as np

from blocks.fingerprint import NotFingerprintable, fingerprint, versions
from blocks.rows import Rows
from blocks.sources import Piece, Source
from blocks.splits import LEFT_OUT, TRAIN, Splitter, as_splitter
from blocks.transform import Pipeline, Transform, transform_from_plain


@dataclass(frozen=True)
class Read:
    """List the items of a source."""

    source: str
    get_items: Callable[[Any], Any]


@dataclass(frozen=True)
class Split:
    """Say which rows train and which validate. train, valid: how many, where the driver counts them; else the tasks do."""

    splitter: Any
    train: int | None = None
    valid: int | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Fit:
    """Learn the state of one transform of one column from the training part."""

    column: str
    position: int  # of the transform among the column's
    depth: int = 1  # of the pass over the training part: 2 needs what 1 found


@dataclass(frozen=True)
class Column:
    """One input or target: how to get it from an item, and the transforms that make it a typed value."""

    name: str
    getter: Callable[[Any], Any]
    type_tfms: Pipeline
    keeps_file: bool = False  # the encoded file is stored, and opened each epoch: its size is random, its pixels are many


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
            flat |= self.named(column, value)
        return flat

    def named(self, column: Column, value: Any) -> dict[str, Any]:
        """The value of one block as those of its stored columns, by name."""
        if isinstance(value, tuple):
            return {f"{column.name}.{i}": part for i, part in enumerate(value)}
        return {column.name: value}

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
    feed: Mapping[str, Any] = field(default_factory=dict)  # settings that the blocks need, for `DataLoaders.new`

    def in_lanes(self, prepared: Any) -> bool:
        """Whether `prepared` is fed in lanes: larger than memory, where no setting needs an order over all its rows."""
        return not prepared.fits_in_memory and not self.feed.keys() & {"sort_by_length", "samples"}


Stage = Read | Split | Fit | Encode | BatchSide


@dataclass(frozen=True)
class Work:
    """What one task is given: a piece of the source, and what says which of its rows train.

    parts: of the piece's rows, or the splitter to ask. total: the rows of the source. moved: the ids of validation rows that
    train instead.
    """

    piece: Piece
    parts: np.ndarray | Splitter
    total: int
    moved: frozenset[str] = frozenset()

    def blocks(self, most: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """At most `most` rows at a time with their parts (uint8), without those that are in neither part."""
        for found in self.piece.blocks(most):
            rows = replace(found, total=self.total)
            start = rows.first - self.piece.first
            parts = self.parts.parts(rows) if isinstance(self.parts, Splitter) else self.parts[start : start + len(rows)]
            if self.moved:
                moved = np.array([str(i) in self.moved for i in rows.ids.to_pylist()], bool)
                parts = np.where(moved, np.uint8(TRAIN), parts)
            used = parts != LEFT_OUT
            if used.any():
                yield rows.where(used), parts[used]


@dataclass(frozen=True, eq=False)
class Plan:
    """The source, the part of each of its rows where the driver has split them, and the stages."""

    source: Source
    parts: np.ndarray | None
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

    def passes(self) -> list[list[Fit]]:
        """What there is to learn from the data, by the pass over the training part that learns it."""
        fits = [s for s in self.stages if isinstance(s, Fit)]
        return [[f for f in fits if f.depth == depth] for depth in sorted({f.depth for f in fits})]

    def work(self, rows: int, moved: frozenset[str] = frozenset()) -> list[Work]:
        """The source in pieces of about `rows` rows, each with what says which rows train."""
        splitter, parts = as_splitter(self.stage(Split).splitter), self.parts
        return [
            Work(p, splitter if parts is None else parts[p.first : p.first + p.rows], self.source.rows, moved)
            for p in self.source.pieces(rows)
        ]

    def encode_with(self, fitted: Sequence[dict[str, Any]], layout: Sequence[str] = ()) -> Encode:
        """The encoding stage with the fitted transforms, given as plain data by column and position, in their places."""
        encode: Encode = self.stage(Encode)
        tfms = {c.name: list(c.type_tfms.transforms) for c in encode.columns}
        for fit in fitted:
            tfms[fit["column"]][fit["position"]] = transform_from_plain(fit["transform"])
        columns = tuple(replace(c, type_tfms=Pipeline(tuple(tfms[c.name]))) for c in encode.columns)
        return replace(encode, columns=columns, layout=tuple(layout))

    def encode_of(self, index: dict[str, Any]) -> Encode:
        """The encoding stage with what its transforms learned when this plan was carried out, as that index says."""
        return self.encode_with(index["fitted"], index["columns"])

    @cached_property
    def _identity(self) -> tuple[str, str | None]:
        try:
            return fingerprint(self._what_shapes_the_store()), None
        except NotFingerprintable as reason:
            return uuid.uuid4().hex[:16], str(reason)

    def _what_shapes_the_store(self) -> list[Any]:
        # What happens to each batch leaves the store as it is, so it may change without preparing anything again.
        parts = None if self.parts is None else self.parts.tobytes()
        return [versions(), self.source.identity, parts, *(s for s in self.stages if not isinstance(s, BatchSide))]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the configuration, the listing, a function or a library does."""
        return self._identity[0]

    @property
    def unkept(self) -> str | None:
        """Why this plan cannot be recognised in a later run, or None."""
        return self._identity[1]

    def explain(self, prepared: Any = None) -> str:
        """One line a stage: what, how often, where, rows and bytes; with `prepared`, what came of it."""
        return str(self.explained(prepared))

    def explained(self, prepared: Any = None) -> "Explained":
        """What `explain` prints, as a value: a table in a notebook, `to_json` for a program."""
        return Explained(self.fingerprint, self.unkept, tuple(self._steps(prepared)))

    def _repr_html_(self) -> str:
        return self.explained()._repr_html_()

    def _steps(self, prepared: Any) -> Iterator["Step"]:
        fitted = {} if prepared is None else {c.name: c.type_tfms for c in prepared.encode.columns}
        for stage in self.stages:
            match stage:
                case Read(source, get_items):
                    how = f"{_name(get_items)} of {source}" if get_items is not the_item else source
                    yield Step(
                        "read", "once", "tasks", f"{self.source.rows} {self.source.kind}, {size(self.source.nbytes)}, {how}"
                    )
                case Split(splitter, train, valid, left_out):
                    where = "driver" if self.parts is not None else "tasks"
                    if prepared is not None:  # once lone classes have moved and bad rows are gone
                        train, valid = prepared.index["parts"]["train"], prepared.index["parts"]["valid"]
                    counted = "counted as they are read" if train is None else f"{train} training rows, {valid} validation rows"
                    left = f", {left_out} rows left out" if left_out else ""
                    yield Step("split", "once", where, f"{_name(splitter)}: {counted}{left}")
                case Fit(column, position, depth):
                    tfm = next(c for c in self.columns if c.name == column).type_tfms.transforms[position]
                    state = f" = {_learned(tfm, fitted[column].transforms[position])}" if column in fitted else ""
                    what = f"{column}: {type(tfm).__name__} on the training part, pass {depth}{state}"
                    yield Step("fit", "once", "tasks", what)
                case Encode(columns, item_tfms, each_epoch):
                    for c in columns:
                        kept = "the encoded file" if c.keeps_file else c.type_tfms
                        yield Step("encode", "once", "tasks", f"{c.name}: {_name(c.getter)} -> {kept}")
                    yield Step("encode", "once", "tasks", f"sample: {item_tfms}")
                    if prepared is not None:
                        yield Step("store", "once", "disk", prepared.described())
                    if each_epoch.transforms:
                        opened = "".join(f"{c.name}: {c.type_tfms}; " for c in columns if c.keeps_file)
                        what = f"{opened}{each_epoch}, drawn anew by (seed, epoch, row)"
                        yield Step("sample", "each epoch", "feed", what)
                case BatchSide(batch_tfms):
                    if prepared is not None:
                        fits = "fits into" if prepared.fits_in_memory else "is larger than"
                        how = "in lanes, a few shards at a time" if stage.in_lanes(prepared) else "resident, any order"
                        yield Step("feed", "each epoch", "feed", f"{how}: the store {fits} memory")
                    yield Step("batch", "each batch", "device", f"{batch_tfms}")
                case _:
                    assert_never(stage)


@dataclass(frozen=True)
class Step:
    """One line of `explain`."""

    stage: str
    when: str  # once, each epoch, each batch
    where: str  # driver, tasks, disk, feed, device
    what: str


@dataclass(frozen=True)
class Explained:
    """What a plan does, step by step. unkept: why it cannot be recognised in a later run, or None."""

    fingerprint: str
    unkept: str | None
    steps: tuple[Step, ...]

    def _title(self) -> str:
        return f"plan {self.fingerprint}" + (f" (not kept across runs: {self.unkept})" if self.unkept else "")

    def __str__(self) -> str:
        lines = [f"  {s.stage:<7} {s.when:<11} {s.where:<7} {s.what}" for s in self.steps]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(v)}</td>' for v in asdict(s).values())}</tr>" for s in self.steps)
        head = "".join(f"<th>{name}</th>" for name in ("stage", "when", "where", "what"))
        return f"<table><caption>{html.escape(self._title())}</caption><tr>{head}</tr>{rows}</table>"

    def to_json(self) -> dict[str, Any]:
        """Plain data: fingerprint, unkept, steps."""
        return asdict(self)


def the_item(item: Any) -> Any:
    """The item as it is: the getter of a block that is given none."""
    return item


def empty_part(name: str, why: str) -> str:
    """The message for a part without rows."""
    return f"the {name} part is empty: {why}. Give the splitter another seed or fraction, or more rows"


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)


def _learned(before: Transform, fitted: Transform) -> str:
    was, now = before.to_plain(), fitted.to_plain()
    values = [v for name, v in now.items() if isinstance(v, tuple) and v and v != was.get(name)]
    return "; ".join(f"{_counted(v)} ({', '.join(map(_short, v[:10]))}{', ...' if len(v) > 10 else ''})" for v in values)


def _short(value: Any) -> str:
    return _counted(value) if isinstance(value, tuple) else str(value)


def _counted(values: tuple[Any, ...]) -> str:
    return f"{len(values)} value{'s' * (len(values) != 1)}"


def size(n: float) -> str:
    """Bytes for a person: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:.3g} TB"
