"""Stores written row by row, without a DataBlock, for what reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from blocks import CategoryBlock, DataBlock, Prepared, TensorCategory, TensorImage
from blocks.shards import typed_column, write_shard
from blocks.splits import VALID

MakeStore = Callable[..., Prepared]


@pytest.fixture
def made(tmp_path: Path) -> MakeStore:
    """Writes a store of so many rows in small shards: row i has the id "i", and the value i unless `columns` are given.

    Which rows validate is random, but the same for the same numbers.
    """
    made_so_far: list[Path] = []

    def make(train: int, valid: int, per_shard: int = 7, columns: dict[str, Sequence[torch.Tensor]] | None = None) -> Prepared:
        rows = train + valid
        parts = np.zeros(rows, np.uint8)
        parts[np.random.default_rng(0).permutation(rows)[:valid]] = VALID
        values: dict[str, Sequence[torch.Tensor]] = columns or {
            "x": [torch.full((1, 2, 2), n, dtype=torch.int64).as_subclass(TensorImage) for n in range(rows)],
            "y": [torch.tensor(n).as_subclass(TensorCategory) for n in range(rows)],
        }
        folder = tmp_path / f"store{len(made_so_far)}"
        made_so_far.append(folder)
        folder.mkdir()
        shards = []
        for start in range(0, rows, per_shard):
            stretch = slice(start, min(start + per_shard, rows))
            typed = [typed_column(name, column[stretch]) for name, column in values.items()]
            schema = pa.schema([pa.field("id", pa.string()), pa.field("part", pa.uint8()), *(f for f, _ in typed)])
            own = parts[stretch]
            ids = pa.array([str(n) for n in range(stretch.start, stretch.stop)])
            table = pa.Table.from_arrays([ids, pa.array(own), *(a for _, a in typed)], schema=schema)
            entry = write_shard(folder, f"{len(shards):06d}.arrow", table)
            shards.append(entry | {"train": int((own != VALID).sum()), "valid": int((own == VALID).sum())})
        block = DataBlock((CategoryBlock(),) * 2, get_items=lambda source: ["a", "b"], splitter=lambda items: ([0], [1]))
        encode = block.plan(folder).encode_with([], list(values))
        return Prepared(folder, {"shards": shards, "bad_rows": []}, encode, reused=False)

    return make
