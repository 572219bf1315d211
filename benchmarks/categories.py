"""Fit and encode one column of 1,000 categories: microseconds a row, in one process on one thread.

    .venv/bin/python benchmarks/categories.py [--rows 10000000] [--rounds 3]

The whole preparing of a Parquet file is measured (list, fit the vocabulary, encode, write the shards), and the least of the
rounds counts. Beside it, what numpy and pandas need for the same codes of a column that is in memory already.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

CATEGORIES = 1000


def make_table(file: Path, rows: int) -> pa.ChunkedArray:
    names = np.array([f"category {i:04d}" for i in range(CATEGORIES)], dtype=object)
    codes = np.random.default_rng(0).integers(0, CATEGORIES, rows)
    table = pa.table({"label": pa.array(names[codes])})
    pq.write_table(table, file, row_group_size=1_000_000)
    return table["label"]


def least(rounds: int, work: Callable[[], object]) -> float:
    """The least CPU seconds of a few rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)

    from blocks import CategoryBlock, ColReader, DataBlock, prepare

    block = DataBlock((CategoryBlock(),), getters=[ColReader("label")])

    with tempfile.TemporaryDirectory() as home:
        os.environ["FASTRAY_CACHE"] = home
        file = Path(home, "table.parquet")
        column = make_table(file, asked.rows)
        seconds = least(asked.rounds, lambda: prepare(block.plan(file), cache="off"))
        print(f"ours: {seconds / asked.rows * 1e6:.3f} us a row (wanted: <= 0.5)")
        series = column.to_pandas()
        peer = least(asked.rounds, lambda: pd.Categorical(series).codes)
        print(f"pandas.Categorical of a column in memory: {peer / asked.rows * 1e6:.3f} us a row")


if __name__ == "__main__":
    main()
