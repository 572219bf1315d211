"""Carrying a plan out: fit what has to be fitted, encode every item once, keep the shards under the fingerprint.

The work is functions from an Arrow table of items to an Arrow table of what came of them, and `map_blocks` says who
runs them over the parts of the listing: this process (`map_here`), or Ray Data's tasks (`cluster.data`).
"""

import atexit
import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from blocks.errors import DataError, UnreadableRow
from blocks.plan import Column, Encode, Plan, Read, items_in
from blocks.shards import SAME_SIZE, described_field, map_shard, typed_column, write_shard
from blocks.splits import TRAIN, VALID
from blocks.transform import Pipeline

TableFunction = Callable[[pa.Table], pa.Table]
MapBlocks = Callable[[TableFunction, Sequence[pa.Table]], Iterable[pa.Table]]

SHARD_BYTES = 32_000_000
FEWEST_ROWS = 64  # in a shard, where the data allows: below it, the price of a task outweighs its work
SHARDS_AT_LEAST = 8  # so that a small data set still spreads over some cores


def map_here(function: TableFunction, tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """`function` of each table, one after the other, in this process."""
    return map(function, tables)


def cache_folder() -> Path:
    """Where prepared and example data are kept: $FASTRAY_CACHE, else ~/.cache/fastray."""
    return Path(os.environ.get("FASTRAY_CACHE") or "~/.cache/fastray").expanduser().absolute()


@dataclass(frozen=True)
class Prepared:
    """A plan carried out: a folder of shards, and an index that says what is in them."""

    folder: Path
    index: dict[str, Any]
    encode: Encode  # the item side, with what its transforms learned from the data
    reused: bool  # found under its fingerprint: nothing was decoded

    @classmethod
    def open(cls, folder: Path, plan: Plan, reused: bool) -> "Prepared":
        index = json.loads((folder / "index.json").read_text())
        return cls(folder, index, plan.encode_with(index["fitted"], index["columns"]), reused)

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def rows(self) -> int:
        return sum(s["rows"] for s in self.index["shards"])

    def table(self, number: int) -> pa.Table:
        """One shard, memory-mapped."""
        return map_shard(self.folder / self.index["shards"][number]["file"])

    def tables(self) -> list[pa.Table]:
        """The shards in order, memory-mapped."""
        return [self.table(number) for number in range(len(self.index["shards"]))]

    def described(self) -> str:
        """Rows, bytes, shards and bad rows in one line."""
        size = sum(s["bytes"] for s in self.index["shards"]) / 1e6
        bad = f", {len(self.index['bad_rows'])} bad rows left out" if self.index["bad_rows"] else ""
        return f"{self.rows} rows, {size:.1f} MB in {len(self.index['shards'])} Arrow shards{bad}, {self.folder}"


def prepare(plan: Plan, *, map_blocks: MapBlocks = map_here, max_bad_rows: int = 0) -> Prepared:
    """Carry `plan` out, or find it carried out already by its fingerprint.

    DataError when more than `max_bad_rows` rows cannot be read (the first ones are named), when a class is only in the
    validation part, or when there is only one class.
    """
    home = cache_folder() / "prepared"
    folder = home / plan.fingerprint
    if (folder / "index.json").exists():
        prepared = Prepared.open(folder, plan, reused=True)
        check_bad_rows(prepared.index["bad_rows"], max_bad_rows)
        return prepared
    unfinished = home / f".{plan.fingerprint}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        _carry_out(plan, unfinished, map_blocks, max_bad_rows)
        try:
            unfinished.rename(folder)
        except OSError:  # another run prepared the same in the meantime, and its result is as good
            if not (folder / "index.json").exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if plan.unkept:  # no later run can find it
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Prepared.open(folder, plan, reused=False)


def _carry_out(plan: Plan, folder: Path, map_blocks: MapBlocks, max_bad_rows: int) -> None:
    began = time.perf_counter()
    listing, fitted = _fit(plan, map_blocks)
    encode = plan.encode_with(fitted)
    blocks = _sliced(listing, _rows_per_shard(encode, listing))
    numbered = [b.append_column("block", pa.array([i] * b.num_rows, pa.int32())) for i, b in enumerate(blocks)]
    reports = [r for t in map_blocks(partial(encode_to_shard, encode, folder), numbered) for r in t.to_pylist()]
    reports.sort(key=lambda report: report["file"])
    bad_rows = [bad for report in reports for bad in json.loads(report.pop("bad_rows"))]
    check_bad_rows(bad_rows, max_bad_rows)
    shards = [report for report in reports if report["rows"]]
    if not shards:
        raise DataError(f"none of the {listing.num_rows} rows could be read")
    parts = {name: sum(report[name] for report in reports) for name in ("train", "valid")}
    for name, part in (("training", parts["train"]), ("validation", parts["valid"])):
        if not part:
            raise DataError(
                f"the {name} part is empty once {len(bad_rows)} unreadable rows and those of classes with one item are taken "
                "out of it: give another seed or fraction, or more rows"
            )
    kinds = {report.pop("columns"): report.pop("names") for report in shards}
    if len(kinds) > 1:
        first, other = list(kinds)[:2]
        raise DataError(f"some files end up as {first}, others as {other}: {SAME_SIZE}")
    index = {
        "source": plan.stage(Read).source,
        "columns": json.loads(next(iter(kinds.values()))),
        "shards": shards,
        "fitted": fitted,
        "parts": parts,
        "bad_rows": bad_rows,
        "seconds": round(time.perf_counter() - began, 3),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def check_bad_rows(bad_rows: Sequence[dict[str, str]], most: int) -> None:
    """DataError naming the first bad rows, when there are more than `most`."""
    if len(bad_rows) <= most:
        return
    named = "".join(f"\n  {bad['id']}: {bad['reason']}" for bad in bad_rows[:5])
    more = f"\n  and {len(bad_rows) - 5} more" if len(bad_rows) > 5 else ""
    raise DataError(
        f"{len(bad_rows)} rows cannot be read, {most} are allowed:{named}{more}\n"
        f"Repair or remove them, or leave them out with max_bad_rows={len(bad_rows)}"
    )


# --- fitting -----------------------------------------------------------------------------------------------------------


def _fit(plan: Plan, map_blocks: MapBlocks) -> tuple[pa.Table, list[dict[str, Any]]]:
    # The listing with its final parts, and the state of each fitted transform as plain data.
    listing = plan.listing
    to_fit = plan.to_fit()
    fitted: list[dict[str, Any]] = []
    if not to_fit:
        return listing, fitted
    blocks = _sliced(listing, max(FEWEST_ROWS, math.ceil(listing.num_rows / SHARDS_AT_LEAST)))
    seen: dict[tuple[int, int], Any] = {}
    for table in map_blocks(partial(observe, to_fit), blocks):
        for row in table.to_pylist():
            key = (row["fit"], row["part"])
            summary = _summary(to_fit[row["fit"]]).from_plain(json.loads(row["summary"]))
            if key in seen:
                seen[key].merge(summary)
            else:
                seen[key] = summary
    for number, (column, position) in enumerate(to_fit):
        train, valid = seen[number, TRAIN], seen[number, VALID]
        fresh = replace(column.type_tfms.transforms[position])
        listing = _moved_to_training(listing, fresh.setups(train, valid))
        fitted.append({"column": column.name, "position": position, "transform": fresh.to_plain()})
    return listing, fitted


def _summary(fit: tuple[Column, int]) -> Any:
    column, position = fit
    return column.type_tfms.transforms[position].summary


def observe(to_fit: Sequence[tuple[Column, int]], rows: pa.Table) -> pa.Table:
    """What some rows of the listing tell each transform to fit: one row a (fit, part), the summary as JSON."""
    found = []
    parts = rows["part"].to_pylist()
    samples = list(zip(rows["id"].to_pylist(), parts, items_in(rows), strict=True))
    for number, (column, position) in enumerate(to_fit):
        summaries = {part: _summary((column, position))() for part in (TRAIN, VALID)}
        before = Pipeline(column.type_tfms.transforms[:position])
        for row_id, part, item in samples:
            # What cannot be read is counted when it is encoded.
            with contextlib.suppress(UnreadableRow), _naming(row_id, column.name):
                summaries[part].observe(before(column.getter(item)), row_id)
        found += [{"fit": number, "part": part, "summary": json.dumps(s.to_plain())} for part, s in summaries.items()]
    return pa.Table.from_pylist(found)


def _moved_to_training(listing: pa.Table, row_ids: set[str]) -> pa.Table:
    if not row_ids:
        return listing
    old = zip(listing["id"].to_pylist(), listing["part"].to_pylist(), strict=True)
    parts = pa.array([TRAIN if row_id in row_ids else part for row_id, part in old], pa.uint8())
    return listing.set_column(listing.schema.get_field_index("part"), "part", parts)


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_sample(encode: Encode, row_id: str, item: Any, part: int = VALID) -> tuple[Any, ...]:
    """One item of a part as the values of its blocks: what is stored of it."""
    values = []
    for column in encode.columns:
        with _naming(row_id, column.name):
            values.append(column.type_tfms(column.getter(item)))
    with _naming(row_id, "item_tfms"):
        return encode.item_tfms(tuple(values), split_idx=part)


def finish_sample(encode: Encode, values: Sequence[Any], key: torch.Tensor, split_idx: int) -> tuple[Any, ...]:
    """What the item transforms of each epoch make of the stored values of one row, as the columns of a batch.

    key: int64 (1,), what the row draws its random numbers by (`blocks.draws`).
    """
    finished = encode.each_epoch(encode.nested(values), split_idx=split_idx, keys=key)
    return tuple(encode.flat(finished).values())


def encode_rows(encode: Encode, rows: pa.Table) -> tuple[pa.Table | None, list[dict[str, str]]]:
    """Some rows of the listing as the typed columns id, part, x, y, and the rows that could not be read."""
    samples, ids, parts, bad = [], [], [], []
    for row_id, part, item in zip(rows["id"].to_pylist(), rows["part"].to_pylist(), items_in(rows), strict=True):
        try:
            samples.append(encode.flat(encode_sample(encode, row_id, item, part)))
        except UnreadableRow as unreadable:
            bad.append({"id": row_id, "reason": str(unreadable)})
        else:
            ids.append(row_id)
            parts.append(part)
    if not samples:
        return None, bad
    names = samples[0].keys()
    odd = next((i for i, s in zip(ids, samples, strict=True) if s.keys() != names), None)
    if odd is not None:
        raise DataError(f"the row {odd!r} becomes other columns than {ids[0]!r}: a block must give each row as many values")
    typed = [typed_column(name, [s[name] for s in samples]) for name in names]
    fields = [pa.field("id", pa.string()), pa.field("part", pa.uint8()), *(f for f, _ in typed)]
    arrays = [pa.array(ids, pa.string()), pa.array(parts, pa.uint8()), *(a for _, a in typed)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields)), bad


def encode_to_shard(encode: Encode, folder: Path, rows: pa.Table) -> pa.Table:
    """Encode the rows of one block and write them as its shard; returns one row that says what was written."""
    file = f"{rows['block'][0].as_py():06d}.arrow"
    table, bad = encode_rows(encode, rows)
    written = 0 if table is None else table.num_rows
    if table is not None:
        write_shard(folder / file, table)
    size = (folder / file).stat().st_size if written else 0
    valid = 0 if table is None else int(pc.sum(table["part"]).as_py())
    columns = "" if table is None else ", ".join(f"{f.name}: {described_field(f)}" for f in list(table.schema)[2:])
    report = {
        "file": file,
        "rows": written,
        "bytes": size,
        "train": written - valid,
        "valid": valid,
        "columns": columns,
        "names": json.dumps([] if table is None else table.column_names[2:]),
        "bad_rows": json.dumps(bad),
    }
    return pa.Table.from_pylist([report])


def _rows_per_shard(encode: Encode, listing: pa.Table) -> int:
    # Measured on the first row that can be read among the first few: all rows have the same size.
    first, _ = encode_rows(encode, listing.slice(0, 8))
    row_bytes = max(1, first.nbytes // first.num_rows) if first is not None else 1
    spread = max(FEWEST_ROWS, math.ceil(listing.num_rows / SHARDS_AT_LEAST))
    return max(1, min(SHARD_BYTES // row_bytes, spread))


def _sliced(listing: pa.Table, rows: int) -> list[pa.Table]:
    return [listing.slice(start, rows) for start in range(0, listing.num_rows, rows)]


@contextlib.contextmanager
def _naming(row_id: str, step: str) -> Iterator[None]:
    """Name the row and the step in an error of the user's code."""
    try:
        yield
    except UnreadableRow:
        raise
    except Exception as error:
        error.add_note(f"while preparing {step!r} of the row {row_id!r}")
        raise
