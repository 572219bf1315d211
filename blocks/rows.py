"""Rows as they are read from a source: what splitters, getters and summaries are given."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from blocks.errors import DataError
from blocks.items import cell


class Row(dict[str, Any]):
    """One row of a table as an item: `row["name"]`, `row.name`, and by position `row[0]`."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int) and -len(self) <= key < len(self):
            return list(self.values())[key]
        raise DataError(missing_column(key, list(self)))

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(missing_column(name, list(self)))


def missing_column(name: Any, columns: Sequence[str]) -> str:
    """The message for a column that is not there."""
    near = difflib.get_close_matches(str(name), columns, 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f"there is no column {name!r}; there are {', '.join(columns)}{hint}"


@dataclass(frozen=True, eq=False)
class Rows:
    """Some consecutive rows of a source.

    ids: texts (paths of files), or whole numbers (positions) where rows have no names. items: what get_items gave, or the
    table the rows are in. first: the position of the first among the `total` rows of the source (None: these are all).
    """

    ids: pa.Array
    items: Sequence[Any] | pa.Table
    first: int = 0
    total: int | None = None
    chosen: np.ndarray | None = None  # the positions, once `where` has left some out

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.first, self.first + len(self)) if self.chosen is None else self.chosen

    @property
    def table(self) -> pa.Table | None:
        """The table the rows are in, if they are."""
        return self.items if isinstance(self.items, pa.Table) else None

    def each(self) -> Iterable[Any]:
        """The items one by one; the rows of a table as `Row`."""
        return _rows_of(self.items) if isinstance(self.items, pa.Table) else self.items

    def column(self, name: str) -> pa.Array:
        """A column of the table, or of the mappings or objects that the items are. DataError when there is none."""
        if isinstance(self.items, pa.Table):
            if name not in self.items.column_names:
                raise DataError(missing_column(name, self.items.column_names))
            return self.items[name].combine_chunks()
        return pa.array([cell(item, name) for item in self.items])

    def where(self, mask: np.ndarray) -> "Rows":
        """The rows for which `mask` is true, no longer consecutive."""
        if mask.all():
            return self
        taken = pa.array(mask)
        if isinstance(self.items, pa.Table):
            items: Any = self.items.filter(taken)
        else:
            items = [item for item, take in zip(self.items, mask, strict=True) if take]
        return replace(self, ids=self.ids.filter(taken), items=items, chosen=self.positions[mask])


def _rows_of(table: pa.Table) -> Iterator[Row]:
    return (Row(row) for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
