"""`DataBlock`: what the data is, in fastai's words. With a source it becomes a `Plan`; carried out, `DataLoaders`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from blocks.errors import DataError
from blocks.plan import BatchSide, Column, Encode, Fit, Plan, Read, Split, listing_of
from blocks.splits import VALID, RandomSplitter
from blocks.transform import Pipeline, TransformLike

if TYPE_CHECKING:
    from blocks.dataloaders import DataLoaders


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

    blocks: one per input and target, the last `len(blocks) - n_inp` of them targets.
    get_items: source -> list of items; get_x, get_y: item -> what the block opens or labels.
    splitter: `RandomSplitter`, or a function of the items that gives two lists of positions (train, valid).
    item_tfms run once, when the data is prepared; batch_tfms run on each batch, on the model's device.
    """

    blocks: Sequence[TransformBlock]
    get_items: Callable[[Any], Iterable[Any]]
    get_x: Callable[[Any], Any] = the_item
    get_y: Callable[[Any], Any] = the_item
    splitter: Callable[[Sequence[Any]], tuple[Sequence[int], Sequence[int]]] = field(default_factory=RandomSplitter)
    item_tfms: TransformLike | Sequence[TransformLike] = ()
    batch_tfms: TransformLike | Sequence[TransformLike] = ()
    n_inp: int = 1

    def __post_init__(self) -> None:
        if not all(isinstance(b, TransformBlock) for b in self.blocks):
            raise TypeError("blocks are TransformBlocks: call them, as in blocks=(ImageBlock(), CategoryBlock())")
        if len(self.blocks) != 2 or self.n_inp != 1:
            raise ValueError(
                f"a DataBlock has one input and one target block here, not {len(self.blocks)} with n_inp={self.n_inp}"
            )

    def plan(self, source: str | Path) -> Plan:
        """The frozen stages by which `source` becomes batches. Lists the source; opens no item.

        DataError when it is not there, holds no items, or a part is empty.
        """
        root = Path(source)
        items = list(self.get_items(source))
        if not items:
            raise DataError(
                f"no items in {str(root)!r}: {getattr(self.get_items, '__name__', 'get_items')} found nothing there. "
                "Check the path, and that the files have the endings it looks for"
            )
        listing = listing_of(items, root)
        ids = listing["id"].to_pylist()
        train, valid = self.splitter(ids if getattr(self.splitter, "by_row_id", False) else items)
        _check_split(train, valid, len(items))
        part = np.zeros(len(items), np.uint8)
        part[valid] = VALID
        item_tfms = Pipeline.of(self.item_tfms) + Pipeline.of(t for b in self.blocks for t in b.item_tfms)
        batch_tfms = Pipeline.of(self.batch_tfms) + Pipeline.of(t for b in self.blocks for t in b.batch_tfms)
        columns = tuple(
            Column(name, getter, Pipeline.of(block.type_tfms))
            for name, getter, block in zip(("x", "y"), (self.get_x, self.get_y), self.blocks, strict=True)
        )
        fits = [
            Fit(c.name, position)
            for c in columns
            for position, t in enumerate(c.type_tfms.transforms)
            if t.summary is not None and not t.fitted
        ]
        return Plan(
            listing=listing.append_column("part", pa.array(part)),
            stages=(
                Read(str(root.absolute()), self.get_items),
                Split(self.splitter, len(train), len(valid)),
                *fits,
                Encode(columns, item_tfms),
                BatchSide(batch_tfms),
            ),
        )

    def dataloaders(self, source: str | Path, *, batch_size: int = 64, seed: int = 0, max_bad_rows: int = 0) -> "DataLoaders":
        """Prepare `source` in this process, without Ray, and feed it: `cluster.dataloaders` does the same on a cluster."""
        from blocks.dataloaders import dataloaders_of
        from blocks.prepare import prepare

        plan = self.plan(source)
        return dataloaders_of(plan, prepare(plan, max_bad_rows=max_bad_rows), batch_size=batch_size, seed=seed)


def _check_split(train: Sequence[int], valid: Sequence[int], rows: int) -> None:
    for name, part in (("training", train), ("validation", valid)):
        if not len(part):
            raise DataError(
                f"the {name} part is empty: the splitter put all {rows} rows into the other. Give another seed or "
                "fraction, or more rows"
            )
    if sorted([*train, *valid]) != list(range(rows)):
        raise DataError(
            f"the splitter must put each of the {rows} rows into exactly one part, but gave {len(train)} training and "
            f"{len(valid)} validation rows, some twice, left out or beyond the end"
        )
