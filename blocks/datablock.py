"""`DataBlock`: what the data is, in fastai's words. With a source it becomes a `Plan`; carried out, `DataLoaders`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from blocks.errors import DataError
from blocks.plan import BatchSide, Column, Encode, Fit, Plan, Read, Split, listing_of
from blocks.splits import LEFT_OUT, TRAIN, VALID, RandomSplitter, Rows, Splitter, as_splitter
from blocks.transform import Pipeline, RandTransform, TransformLike

if TYPE_CHECKING:
    from blocks.dataloaders import DataLoaders


Getter = Callable[[Any], Any]


@dataclass(frozen=True)
class TransformBlock:
    """What one block brings: transforms from item to typed value, for the whole sample, and for the batch."""

    type_tfms: tuple[TransformLike, ...] = ()
    item_tfms: tuple[TransformLike, ...] = ()
    batch_tfms: tuple[TransformLike, ...] = ()


def the_item(item: Any) -> Any:
    return item


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
    get_items: Callable[[Any], Iterable[Any]] = the_item
    get_x: Getter | Sequence[Getter] = the_item
    get_y: Getter | Sequence[Getter] = the_item
    splitter: Splitter | Callable[[Sequence[Any]], tuple[Sequence[int], Sequence[int]]] = field(default_factory=RandomSplitter)
    item_tfms: TransformLike | Sequence[TransformLike] = ()
    batch_tfms: TransformLike | Sequence[TransformLike] = ()
    n_inp: int | None = None
    getters: Sequence[Getter] | None = None

    def __post_init__(self) -> None:
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

        DataError when it is not there, holds no items, or a part is empty.
        """
        root = Path(source).absolute() if isinstance(source, str | Path) else None
        items = list(self.get_items(source))
        if not items:
            raise DataError(
                f"no items in {str(source)[:200]!r}: {getattr(self.get_items, '__name__', 'get_items')} found nothing there. "
                "Check the path, and that the files have the endings it looks for"
            )
        listing = listing_of(items, root)
        part = as_splitter(self.splitter).parts(Rows(listing["id"], items))
        train, valid, left_out = (int((part == p).sum()) for p in (TRAIN, VALID, LEFT_OUT))
        _check_split(train, valid, left_out)
        listing = listing.append_column("part", pa.array(part)).filter(pa.array(part != LEFT_OUT))
        item_tfms = Pipeline.of(self.item_tfms) + Pipeline.of(t for b in self.blocks for t in b.item_tfms)
        batch_tfms = Pipeline.of(self.batch_tfms) + Pipeline.of(t for b in self.blocks for t in b.batch_tfms)
        once, each_epoch = _sides(item_tfms)
        columns = self._columns()
        fits = [
            Fit(c.name, position)
            for c in columns
            for position, t in enumerate(c.type_tfms.transforms)
            if t.summary is not None and not t.fitted
        ]
        return Plan(
            listing=listing,
            stages=(
                Read(str(root or type(source).__name__), self.get_items),
                Split(self.splitter, train, valid, left_out),
                *fits,
                Encode(columns, once, each_epoch, self._inputs),
                BatchSide(batch_tfms),
            ),
        )

    def dataloaders(self, source: Any, *, batch_size: int = 64, seed: int = 0, max_bad_rows: int = 0) -> "DataLoaders":
        """Prepare `source` in this process, without Ray, and feed it: `cluster.dataloaders` does the same on a cluster."""
        from blocks.dataloaders import dataloaders_of
        from blocks.prepare import prepare

        plan = self.plan(source)
        return dataloaders_of(plan, prepare(plan, max_bad_rows=max_bad_rows), batch_size=batch_size, seed=seed)


def _names(kind: str, n: int) -> list[str]:
    return [kind] if n == 1 else [f"{kind}{i}" for i in range(n)]


def _getters(name: str, given: Getter | Sequence[Getter], n: int) -> list[Getter]:
    if callable(given):
        if n > 1 and given is not the_item:
            raise ValueError(f"{name} is one function, but there are {n} blocks for it: give a list of {n} functions")
        return [given] * n
    if len(given) != n:
        raise ValueError(f"{name} lists {len(given)} functions, but there are {n} blocks for it")
    return list(given)


def _sides(item_tfms: Pipeline) -> tuple[Pipeline, Pipeline]:
    # What is drawn anew each epoch, and all that follows it, cannot be kept.
    tfms = item_tfms.transforms
    first = next((i for i, t in enumerate(tfms) if isinstance(t, RandTransform)), len(tfms))
    return Pipeline(tfms[:first]), Pipeline(tfms[first:])


def _check_split(train: int, valid: int, left_out: int) -> None:
    for name, part in (("training", train), ("validation", valid)):
        if not part:
            left = f" ({left_out} are left out)" if left_out else ""
            raise DataError(
                f"the {name} part is empty: the splitter put all {train + valid} rows into the other{left}. Give another seed "
                "or fraction, or more rows"
            )
