"""Carrying a plan out: fit what has to be fitted, encode every item once, keep the shards under the fingerprint.

The work is functions from an Arrow table of items to an Arrow table of what came of them, and `map_blocks` says who
runs them over the parts of the listing: this process (`map_here`), or Ray Data's tasks (`cluster.data`).
"""

import contextlib
import errno
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from blocks.cache import INDEX, make_room, place_of, unfinished
from blocks.errors import DataError, UnreadableRow, UserError
from blocks.plan import Column, Encode, Plan, Read, items_in
from blocks.prepared import Prepared
from blocks.shards import SAME_SIZE, described_field, typed_column, write_shard
from blocks.splits import TRAIN, VALID
from blocks.storage import is_url, joined, put
from blocks.transform import Pipeline

TableFunction = Callable[[pa.Table], pa.Table]
MapBlocks = Callable[[TableFunction, Sequence[pa.Table]], Iterable[pa.Table]]

SHARD_BYTES = 32_000_000
FEWEST_ROWS = 64  # in a shard, where the data allows: below it, the price of a task outweighs its work
SHARDS_AT_LEAST = 8  # so that a small data set still spreads over some cores


def map_here(function: TableFunction, tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """`function` of each table, one after the other, in this process."""
    return map(function, tables)


def prepare(plan: Plan, *, map_blocks: MapBlocks = map_here, max_bad_rows: int = 0, cache: str = "disk") -> Prepared:
    """Carry `plan` out, or find it carried out already by its fingerprint.

    cache: "disk" keeps the result below the cache folder or at its URL, "memory" in a tmpfs folder, "off" until this process
    ends. DataError when more than `max_bad_rows` rows cannot be read (the first ones are named), when a class is only in the
    validation part, or when there is only one class.
    """
    place = place_of(cache)
    lasting = cache != "off" and plan.unkept is None
    if lasting:
        found = Prepared.open(place.home / plan.fingerprint, plan, True, place.url and joined(place.url, plan.fingerprint))
        if found is not None:
            check_bad_rows(found.index["bad_rows"], max_bad_rows)
            return _mended(found, plan, map_blocks)
    try:
        with unfinished(place, plan.fingerprint, lasting) as made:
            folder = made.finish(_carry_out(plan, made.where, map_blocks, max_bad_rows))
            prepared = Prepared.open(folder, plan, False, place.url and joined(place.url, folder.name))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left in {place.home}: `fastray cache clear` makes room, $FASTRAY_CACHE names another place"
        ) from error
    assert prepared is not None
    make_room(place.home)
    return prepared


def _carry_out(plan: Plan, where: str, map_blocks: MapBlocks, max_bad_rows: int) -> dict[str, Any]:
    # The shards are written to `where`; returns the index that describes them.
    began = time.perf_counter()
    listing, moved, fitted = _fit(plan, map_blocks)
    encode = plan.encode_with(fitted)
    shard_rows = _rows_per_shard(encode, listing)
    reports = [
        r for t in map_blocks(partial(encode_to_shard, encode, where), _numbered(listing, shard_rows)) for r in t.to_pylist()
    ]
    reports.sort(key=lambda report: report["file"])
    bad_rows = [bad for report in reports for bad in json.loads(report.pop("bad_rows"))]
    check_bad_rows(bad_rows, max_bad_rows)
    shards = [report for report in reports if report["rows"]]
    if not shards:
        raise DataError(f"none of the {listing.num_rows} rows could be read")
    _check_written_here(where, shards)
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
    return {
        "source": plan.stage(Read).source,
        "columns": json.loads(next(iter(kinds.values()))),
        "shards": shards,
        "shard_rows": shard_rows,
        "moved": sorted(moved),
        "fitted": fitted,
        "parts": parts,
        "bad_rows": bad_rows,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _check_written_here(where: str, shards: Sequence[dict[str, Any]]) -> None:
    # Tasks on another node wrote to that node's own disk.
    away = [] if is_url(where) else [shard["file"] for shard in shards if not Path(where, shard["file"]).exists()]
    if away:
        raise UserError(
            f"{len(away)} of {len(shards)} shards were written on other nodes, whose disks this one does not see: set "
            "$FASTRAY_CACHE to a folder that all nodes share, or to a storage URL such as s3://bucket/path"
        )


def _mended(found: Prepared, plan: Plan, map_blocks: MapBlocks) -> Prepared:
    # Shards that are missing or damaged are made again from the rows they came from, and that is said.
    damaged = found.damaged()
    if not damaged:
        return found
    shards = [dict(shard) for shard in found.index["shards"]]
    names = [PurePosixPath(shards[i]["file"]).name for i in damaged]
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    warnings.warn(
        f"{len(names)} of {len(shards)} shards of the prepared data {found.fingerprint} are damaged or missing and are made "
        f"again: {listed}",
        stacklevel=3,
    )
    listing = _moved_to_training(plan.listing, set(found.index["moved"]))
    blocks = [block for block in _numbered(listing, found.index["shard_rows"]) if _file(block) in names]
    run = PurePosixPath(shards[0]["file"]).parent.name  # below the URL; in a folder there is none
    where = joined(found.url, run) if found.url else str(found.folder)
    made = {r["file"]: r for t in map_blocks(partial(encode_to_shard, found.encode, where), blocks) for r in t.to_pylist()}
    for i, name in zip(damaged, names, strict=True):
        if made[name]["rows"] != shards[i]["rows"]:
            raise DataError(
                f"the shard {name} of {found.folder} is damaged, and its rows can no longer be read as they were: bring their "
                f"files back, or start afresh with `fastray cache clear {found.fingerprint}`"
            )
        shards[i] |= {key: made[name][key] for key in ("bytes", "crc32")}
    put(found.url or found.folder, INDEX, json.dumps(found.index | {"shards": shards}, indent=1).encode())
    mended = Prepared.open(found.folder, plan, True, found.url)
    assert mended is not None
    return mended


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


def _fit(plan: Plan, map_blocks: MapBlocks) -> tuple[pa.Table, set[str], list[dict[str, Any]]]:
    # The listing with its final parts, the rows moved for it, and the state of each fitted transform as plain data.
    listing = plan.listing
    to_fit = plan.to_fit()
    fitted: list[dict[str, Any]] = []
    all_moved: set[str] = set()
    if not to_fit:
        return listing, all_moved, fitted
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
        moved = fresh.setups(train, valid)
        all_moved |= moved
        listing = _moved_to_training(listing, moved)
        fitted.append({"column": column.name, "position": position, "transform": fresh.to_plain()})
    return listing, all_moved, fitted


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


def encode_to_shard(encode: Encode, where: str, rows: pa.Table) -> pa.Table:
    """Encode the rows of one block and write them as its shard; returns one row that says what was written."""
    table, bad = encode_rows(encode, rows)
    nothing = {"file": _file(rows), "rows": 0, "bytes": 0, "crc32": 0}
    valid = 0 if table is None else int(pc.sum(table["part"]).as_py())
    columns = "" if table is None else ", ".join(f"{f.name}: {described_field(f)}" for f in list(table.schema)[2:])
    report = {
        **(nothing if table is None else write_shard(where, _file(rows), table)),
        "train": 0 if table is None else table.num_rows - valid,
        "valid": valid,
        "columns": columns,
        "names": json.dumps([] if table is None else table.column_names[2:]),
        "bad_rows": json.dumps(bad),
    }
    return pa.Table.from_pylist([report])


def _file(rows: pa.Table) -> str:
    return f"{rows['block'][0].as_py():06d}.arrow"


def _numbered(listing: pa.Table, rows: int) -> list[pa.Table]:
    blocks = enumerate(_sliced(listing, rows))
    return [block.append_column("block", pa.array([i] * block.num_rows, pa.int32())) for i, block in blocks]


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
