"""Batches of items that were not prepared: what `DataLoaders.test` gives, encoded whenever they are drawn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from blocks.draws import sample_keys
from blocks.encode import encode_sample, finish_sample
from blocks.errors import DataError, UnreadableRow
from blocks.feed import Batch, ahead, item_threads
from blocks.gather import collate
from blocks.plan import Encode
from blocks.sources import Source
from blocks.splits import VALID

READ_ROWS = 1024  # of a source at a time


class Item(NamedTuple):
    """An item, its id and its position among all."""

    position: int
    id: str
    value: Any


@dataclass(frozen=True)
class NewItems:
    """An iterable of batches over the items of a source, in their order.

    They go through the same fitted transforms as the validation part. encode: with the columns that are wanted. A batch's ids
    are the paths of items that are files, else their positions. DataError names an item that cannot be read.
    """

    source: Source
    encode: Encode
    batch_size: int
    pad: Mapping[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of items."""
        return self.source.rows

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self._batch, self._chunks(), item_threads())

    def _chunks(self) -> Iterator[list[Item]]:
        blocks = (rows for piece in self.source.pieces(READ_ROWS) for rows in piece.blocks(READ_ROWS))
        pairs = (pair for rows in blocks for pair in zip(rows.ids.to_pylist(), rows.each(), strict=True))
        items = (Item(position, str(row_id), value) for position, (row_id, value) in enumerate(pairs))
        while chunk := list(islice(items, self.batch_size)):
            yield chunk

    def _batch(self, items: Sequence[Item]) -> Batch:
        positions = np.array([item.position for item in items])
        samples = []
        names: tuple[str, ...] = ()
        for item, key in zip(items, sample_keys(0, 0, positions), strict=True):
            try:
                stored = self.encode.flat(encode_sample(self.encode, item.id, item.value, VALID))
            except UnreadableRow as error:
                raise DataError(f"the item {item.id} cannot be read: {error}. Leave it out, or repair it") from error
            names = tuple(stored)
            samples.append(finish_sample(replace(self.encode, layout=names), tuple(stored.values()), key[None], VALID))
        ids = [item.id for item in items]
        return Batch(collate(names, samples, self.pad), partial(list, ids), len(ids), positions)


def only_inputs(encode: Encode) -> Encode:
    """The item side without its targets, for items that have none."""
    return replace(encode, columns=encode.columns[: encode.n_inp], layout=encode.layout[: encode.n_input_columns])
