"""`Datasets`: the samples of a source one by one, without a store, as its blocks make them: for looking and trying out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blocks.encode import naming
from blocks.fit import fit
from blocks.plan import Encode, Plan
from blocks.sources import SourceItems
from blocks.splits import TRAIN, VALID


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Any]):
    """Some rows of a source as samples: a tuple with what getter and type transforms make of the item, for each block.

    positions: of the rows in the source, int64. An item is read and encoded whenever it is asked for.
    """

    items: SourceItems
    positions: np.ndarray
    encode: Encode

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        position = int(self.positions[range(len(self))[i]])
        return self._sample(position, self.items[position])

    def __iter__(self) -> Iterator[Any]:
        mine = iter(self.positions.tolist())
        wanted = next(mine, None)
        for position, item in enumerate(self.items):
            if position == wanted:
                yield self._sample(position, item)
                wanted = next(mine, None)

    def _sample(self, position: int, item: Any) -> tuple[Any, ...]:
        values = []
        for column in self.encode.columns:
            with naming(position, column.name):
                values.append(column.type_tfms(column.getter(item)))
        return tuple(values)


@dataclass(frozen=True, eq=False)
class Datasets:
    """The training and the validation part of a source as `Dataset`s, with what their transforms learned."""

    train: Dataset
    valid: Dataset

    @classmethod
    def of(cls, plan: Plan) -> "Datasets":
        fitted, moved = fit(plan, map)
        encode = plan.encode_with(fitted)
        blocks = [(rows.positions, parts) for work in plan.work(65_536, moved) for rows, parts in work.blocks(65_536)]
        positions, parts = (np.concatenate(each) for each in zip(*blocks, strict=True))
        items = SourceItems(plan.source)
        train, valid = (Dataset(items, positions[parts == part], encode) for part in (TRAIN, VALID))
        return cls(train, valid)

    @property
    def vocab(self) -> tuple[str, ...]:
        """The class names of the target, in the order of their indices; empty for other targets."""
        tfms = self.train.encode.columns[-1].type_tfms.transforms
        return next((t.vocab for t in tfms if hasattr(t, "vocab")), ())
