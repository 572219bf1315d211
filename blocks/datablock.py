"""`DataBlock`: what the data is, in fastai's words. With a source it becomes a `Plan`; carried out, `DataLoaders`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from blocks.errors import DataError
from blocks.items import ItemGetter
from blocks.plan import BatchSide, Column, Encode, Fit, Plan, Read, Split, empty_part, the_item
from blocks.rows import Rows
from blocks.sources import Source, SourceItems, source_of
from blocks.splits import LEFT_OUT, TRAIN, VALID, RandomSplitter, Splitter, as_splitter
from blocks.transform import FunctionTransform, Pipeline, RandTransform, TransformLike, as_transform

if TYPE_CHECKING:
    from blocks.dataloaders import DataLoaders
    from blocks.datasets import Datasets

SPLIT_ROWS = 65_536  # at a time

Getter = Callable[[Any], Any]


@dataclass(frozen=True)
class TransformBlock:
    """What one block brings: transforms from item to typed value, for the whole sample, and for the batch.

    dls_kwargs: settings of the feed that this kind of data needs, as `DataLoaders.new` takes them; pad is here the number that
    fills the short rows of this block's columns, and sort_by_length may be True, for this block's column.
    """

    type_tfms: tuple[TransformLike, ...] = ()
    item_tfms: tuple[TransformLike, ...] = ()
    batch_tfms: tuple[TransformLike, ...] = ()
    dls_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataBlock:
    """How to get items, inputs and targets from a source, which rows validate, and which transforms run where.

    blocks: one per input and target, the first `n_inp` inputs, by default all but the last.
    get_items: source -> list of items; without it the source is the items.
    get_x, get_y: item -> what the block opens or labels; a list of them for several inputs or targets. getters: the
    same for all blocks at once.
    splitter: a splitter such as `RandomSplitter`, or a function of the items that gives two lists of positions (train, valid);
    rows in neither are left out.
    item_tfms run once, when the data is prepared, from the first random one on each epoch; batch_tfms run on each batch,
    on the model's device.
    """

    blocks: Sequence[TransformBlock]
    get_items: Callable[[Any], Any] | None = None
    get_x: Getter | Sequence[Getter] = the_item
    get_y: Getter | Sequence[Getter] = the_item
    splitter: Splitter | Callable[[Sequence[Any]], tuple[Sequence[int], Sequence[int]]] = field(default_factory=RandomSplitter)
    item_tfms: TransformLike | Sequence[TransformLike] = ()
    batch_tfms: TransformLike | Sequence[TransformLike] = ()
    n_inp: int | None = None
    getters: Sequence[Getter] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.blocks, TransformBlock):
            raise TypeError("blocks is a tuple, one block each for input and target: blocks=(ImageBlock(), CategoryBlock())")
        if self.get_items is not None and not callable(self.get_items):
            raise TypeError(f"get_items is a function of the source, such as get_image_files, not {self.get_items!r}")
        as_splitter(self.splitter)  # so that what is none is said here
        if not self.blocks or not all(isinstance(b, TransformBlock) for b in self.blocks):
            raise TypeError("blocks are TransformBlocks: call them, as in blocks=(ImageBlock(), CategoryBlock())")
        if not 1 <= self._inputs <= len(self.blocks):
            raise ValueError(f"n_inp is the number of blocks that are inputs, 1 to {len(self.blocks)}, not {self.n_inp}")
        self._columns()  # so that a wrong number of getters is said here

    @property
    def _inputs(self) -> int:
        return max(1, len(self.blocks) - 1) if self.n_inp is None else self.n_inp

    def _columns(self) -> tuple[Column, ...]:
        n_inp, n_targ = self._inputs, len(self.blocks) - self._inputs
        if self.getters is None:
            getters = [*_getters("get_x", self.get_x, n_inp), *_getters("get_y", self.get_y, n_targ)]
        elif len(self.getters) == len(self.blocks):
            getters = list(self.getters)
        else:
            raise ValueError(f"getters has one function a block: {len(self.blocks)}, not {len(self.getters)}")
        names = _names("x", n_inp) + _names("y", n_targ)
        return tuple(
            Column(name, getter, Pipeline.of(block.type_tfms))
            for name, getter, block in zip(names, getters, self.blocks, strict=True)
        )

    def plan(self, source: Any) -> Plan:
        """The frozen stages by which `source` becomes batches. Lists the source; opens no item.

        source: what `get_items` takes; without it a table (a CSV or Parquet file, several, a folder of them, by path or
        URL; a DataFrame; an Arrow table), whose rows are the items, or the items themselves.
        DataError when it is not there, holds no items, or a part is empty.
        """
        found = source_of(source if self.get_items is None else self.get_items(source), source)
        if not found.rows:
            how = f"{getattr(self.get_items, '__name__', 'get_items')} found nothing there" if self.get_items else "it is empty"
            raise DataError(
                f"no items in {str(source)[:200]!r}: {how}. Check the path, and that the files have the endings it looks for"
            )
        parts = _parts(as_splitter(self.splitter), found)
        columns, item_tfms = self._columns(), _item_side(self)
        unfitted = next((t for t in item_tfms.transforms if t.summary is not None and not t.fitted), None)
        if unfitted is not None:
            raise ValueError(f"{unfitted} learns from the data, so it belongs to a block's type_tfms, or to batch_tfms")
        once, each_epoch = _sides(item_tfms)
        if each_epoch.transforms and not any(t.fixes_size for t in once.transforms):
            # Pictures of any size: the files are much smaller than their pixels.
            columns = tuple(replace(c, keeps_file=_opens_file(c)) for c in columns)
            if any(c.keeps_file for c in columns):
                once, each_epoch = Pipeline(), item_tfms
        return Plan(
            source=found,
            parts=parts,
            stages=(
                Read(found.name, self.get_items or the_item),
                Split(self.splitter, *(() if parts is None else (int((parts == p).sum()) for p in (TRAIN, VALID, LEFT_OUT)))),
                *(f for c in columns for f in _fits(c)),
                Encode(columns, once, each_epoch, self._inputs),
                BatchSide(
                    _with_those_of_blocks(self.batch_tfms, [b.batch_tfms for b in self.blocks]),
                    _feed_settings(self.blocks, columns),
                ),
            ),
        )

    @classmethod
    def from_columns(
        cls,
        blocks: Sequence[TransformBlock],
        *,
        get_items: Callable[[Any], Sequence[Sequence[Any]]] | None = None,
        getters: Sequence[Getter] | None = None,
        **settings: Any,
    ) -> "DataBlock":
        """A DataBlock whose source, or what `get_items` makes of it, is one sequence of values for each block."""
        if getters is None:
            getters = [ItemGetter(i) for i in range(len(blocks))]
        return cls(blocks, get_items=Zipped(get_items), getters=getters, **settings)

    def new(self, **changes: Any) -> "DataBlock":
        """The same DataBlock with some things changed: `block.new(item_tfms=Resize(224))`."""
        return replace(self, **changes)

    def datasets(self, source: Any) -> "Datasets":
        """The training and validation samples of `source` one by one, encoded when asked for, nothing stored."""
        from blocks.datasets import Datasets

        return Datasets.of(self.plan(source))

    def summary(self, source: Any) -> None:
        """Print what each step makes of one sample of `source`, then of a batch of a few.

        DataError at a step that fails: which transform, which item, which error.
        """
        from blocks.summary import summary_lines

        for line in summary_lines(self, source):
            print(line)

    def dataloaders(
        self, source: Any, *, batch_size: int = 64, seed: int = 0, max_bad_rows: int = 0, cache: str = "disk"
    ) -> "DataLoaders":
        """Prepare `source` in this process, without Ray, and feed it: `cluster.dataloaders` does the same on a cluster.

        seed: of the order of the training rows and of random transforms. max_bad_rows: so many unreadable rows are left out,
        more are an error. cache: where prepared data is kept, "disk", "memory", or "off" until this process ends.
        """
        from blocks.dataloaders import dataloaders_of
        from blocks.prepare import prepare

        plan = self.plan(source)
        prepared = prepare(plan, max_bad_rows=max_bad_rows, cache=cache)
        return dataloaders_of(plan, prepared, batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class Zipped:
    """Columns as items: a tuple a row."""

    columns: Callable[[Any], Sequence[Sequence[Any]]] | None

    def __call__(self, source: Any) -> list[tuple[Any, ...]]:
        columns = source if self.columns is None else self.columns(source)
        try:
            return list(zip(*columns, strict=True))
        except (TypeError, ValueError) as error:
            raise DataError(f"the columns must be sequences of one length, one a block: {error}") from error


def _names(kind: str, n: int) -> list[str]:
    return [kind] if n == 1 else [f"{kind}{i}" for i in range(n)]


def _feed_settings(blocks: Sequence[TransformBlock], columns: Sequence[Column]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    pad = {}
    for block, column in zip(blocks, columns, strict=True):
        own = dict(block.dls_kwargs)
        if "pad" in own:
            pad[column.name] = own.pop("pad")
        if own.get("sort_by_length") is True:
            own["sort_by_length"] = column.name
        settings |= own
    return settings | {"pad": pad} if pad else settings


def _getters(name: str, given: Getter | Sequence[Getter], n: int) -> list[Getter]:
    if callable(given):
        if n > 1 and given is not the_item:
            raise ValueError(f"{name} is one function, but there are {n} blocks for it: give a list of {n} functions")
        return [given] * n
    if isinstance(given, str):
        raise TypeError(f"{name} is a function of the item, not {given!r}: for a column of a table write ColReader({given!r})")
    if len(given) != n:
        raise ValueError(f"{name} lists {len(given)} functions, but there are {n} blocks for it")
    return list(given)


def _with_those_of_blocks(own: Any, of_blocks: Sequence[Any]) -> Pipeline:
    # Two blocks may bring the same kind, which is to run once: the last one counts, or the person's own.
    given = Pipeline.of(own)
    kinds = {type(part) for t in given.transforms for part in t.parts} - {FunctionTransform}
    brought = [as_transform(t) for tfms in of_blocks for t in tfms]
    last = {id(t) if isinstance(t, FunctionTransform) else type(t): t for t in brought}
    return given + Pipeline.of(t for t in last.values() if type(t) not in kinds)


def _sides(item_tfms: Pipeline) -> tuple[Pipeline, Pipeline]:
    # What is drawn anew each epoch, and all that follows it, cannot be kept.
    tfms = item_tfms.transforms
    first = next((i for i, t in enumerate(tfms) if isinstance(t, RandTransform)), len(tfms))
    return Pipeline(tfms[:first]), Pipeline(tfms[first:])


def _item_side(block: DataBlock) -> Pipeline:
    return _with_those_of_blocks(block.item_tfms, [b.item_tfms for b in block.blocks])


def _opens_file(column: Column) -> bool:
    return any(t.opens_file for t in column.type_tfms.transforms[:1])


def _fits(column: Column) -> list[Fit]:
    to_fit = [i for i, t in enumerate(column.type_tfms.transforms) if t.summary is not None and not t.fitted]
    return [Fit(column.name, position, depth) for depth, position in enumerate(to_fit, 1)]


def _parts(splitter: Splitter, source: Source) -> np.ndarray | None:
    # A table is split in the tasks that read it, but for splitters that must see all rows at once.
    if splitter.needs_all:
        named = source.kind == "files"
        ids = pa.concat_arrays(rows.ids for rows in _blocks(source)) if named else pa.array(np.arange(source.rows))
        parts = splitter.parts(Rows(ids, SourceItems(source), 0, source.rows))
    elif source.kind == "rows":
        return None
    else:
        parts = np.concatenate([splitter.parts(replace(rows, total=source.rows)) for rows in _blocks(source)])
    for name, part in (("training", TRAIN), ("validation", VALID)):
        if not (parts == part).any():
            left_out = int((parts == LEFT_OUT).sum())
            left = f" and left {left_out} out" if left_out else ""
            raise DataError(empty_part(name, f"the splitter put all {source.rows - left_out} rows into the other{left}"))
    return parts


def _blocks(source: Source) -> Iterator[Rows]:
    return (rows for piece in source.pieces(SPLIT_ROWS) for rows in piece.blocks(SPLIT_ROWS))
