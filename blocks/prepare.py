"""Carrying a plan out: fit what has to be fitted, encode every item once, keep the shards under the fingerprint.

The work is functions from a piece of the source to an Arrow table of what came of it, and `map_work` says who runs them
over all pieces: this process (`map_here`), or Ray Data's tasks (`cluster.data`).
"""

import errno
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blocks.cache import INDEX, make_room, place_of, unfinished
from blocks.encode import encode_rows
from blocks.errors import DataError, UserError
from blocks.fit import MapWork, fit, spread
from blocks.plan import Encode, Plan, Work, empty_part
from blocks.prepared import Prepared
from blocks.rows import Rows
from blocks.shards import SAME_SIZE, described_field, write_shard
from blocks.storage import is_url, joined, put

SHARD_BYTES = 32_000_000
MEASURED_ROWS = 8


def map_here(function: Callable[[Any], pa.Table], work: Sequence[Any]) -> Iterator[pa.Table]:
    """`function` of each piece of work, one after the other, in this process."""
    return map(function, work)


def prepare(plan: Plan, *, map_work: MapWork = map_here, max_bad_rows: int = 0, cache: str = "disk") -> Prepared:
    """Carry `plan` out, or find it carried out already by its fingerprint.

    cache: "disk" keeps the result below the cache folder or at its URL, "memory" in a tmpfs folder, "off" until this process
    ends. DataError when more than `max_bad_rows` rows cannot be read (the first ones are named), when a class is only in the
    validation part, or when there is only one class.
    """
    if not isinstance(max_bad_rows, int) or max_bad_rows < 0:
        raise UserError(f"max_bad_rows is a whole number of rows, at least 0, not {max_bad_rows!r}")
    place = place_of(cache)
    lasting = cache != "off" and plan.unkept is None
    if lasting:
        found = Prepared.open(
            place.home / plan.fingerprint, plan.encode_of, True, place.url and joined(place.url, plan.fingerprint)
        )
        if found is not None:
            check_bad_rows(found.index["bad_rows"], max_bad_rows)
            return _mended(found, plan, map_work)
    try:
        with unfinished(place, plan.fingerprint, lasting) as made:
            folder = made.finish(_carry_out(plan, made.where, map_work, max_bad_rows))
            prepared = Prepared.open(folder, plan.encode_of, False, place.url and joined(place.url, folder.name))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left in {place.home}: `fastray cache clear` makes room, $FASTRAY_CACHE names another place"
        ) from error
    assert prepared is not None
    make_room(place.home)
    return prepared


def _carry_out(plan: Plan, where: str, map_work: MapWork, max_bad_rows: int) -> dict[str, Any]:
    # The shards are written to `where`; returns the index that describes them.
    began = time.perf_counter()
    fitted, moved = fit(plan, map_work)
    encode = plan.encode_with(fitted)
    shard_rows = _rows_per_shard(plan, encode)
    work = plan.work(shard_rows, moved)
    reports = [r for t in map_work(partial(encode_to_shards, encode, where, shard_rows), work) for r in t.to_pylist()]
    reports.sort(key=lambda report: report["file"])
    bad_rows = [bad for report in reports for bad in json.loads(report.pop("bad_rows"))]
    check_bad_rows(bad_rows, max_bad_rows)
    shards = [report for report in reports if report["rows"]]
    if not shards:
        raise DataError(f"none of the {plan.source.rows} rows could be read")
    check_written_here(where, shards)
    parts = {name: sum(report[name] for report in reports) for name in ("train", "valid")}
    for name, part in (("training", parts["train"]), ("validation", parts["valid"])):
        if not part:
            raise DataError(
                empty_part(name, f"{len(bad_rows)} unreadable rows and those of classes with one item are taken out of it")
            )
    kinds = {report.pop("columns"): report.pop("names") for report in shards}
    if len(kinds) > 1:
        first, other = list(kinds)[:2]
        raise DataError(f"some files end up as {first}, others as {other}: {SAME_SIZE}")
    return {
        "source": plan.source.name,
        "columns": json.loads(next(iter(kinds.values()))),
        "shards": shards,
        "shard_rows": shard_rows,
        "moved": sorted(moved),
        "fitted": fitted,
        "parts": parts,
        "bad_rows": bad_rows,
        "seconds": round(time.perf_counter() - began, 3),
    }


def check_written_here(where: str, shards: Sequence[dict[str, Any]]) -> None:
    """UserError when tasks on another node wrote to that node's own disk."""
    away = [] if is_url(where) else [shard["file"] for shard in shards if not Path(where, shard["file"]).exists()]
    if away:
        raise UserError(
            f"{len(away)} of {len(shards)} shards were written on other nodes, whose disks this one does not see: set "
            "$FASTRAY_CACHE to a folder that all nodes share, or to a storage URL such as s3://bucket/path"
        )


def _mended(found: Prepared, plan: Plan, map_work: MapWork) -> Prepared:
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
    positions = [int(PurePosixPath(name).stem) for name in names]
    rows = found.index["shard_rows"]
    pieces = plan.work(rows, frozenset(found.index["moved"]))
    work = [w for w in pieces if any(w.piece.first <= p < w.piece.first + w.piece.rows for p in positions)]
    run = PurePosixPath(shards[0]["file"]).parent.name  # below the URL; in a folder there is none
    where = joined(found.url, run) if found.url else str(found.folder)
    again = partial(encode_to_shards, found.encode, where, rows)
    made = {r["file"]: r for table in map_work(again, work) for r in table.to_pylist()}
    for i, name in zip(damaged, names, strict=True):
        if made[name]["rows"] != shards[i]["rows"]:
            raise DataError(
                f"the shard {name} of {found.folder} is damaged, and its rows can no longer be read as they were: bring their "
                f"files back, or start afresh with `fastray cache clear {found.fingerprint}`"
            )
        shards[i] |= {key: made[name][key] for key in ("bytes", "crc32")}
    put(found.url or found.folder, INDEX, json.dumps(found.index | {"shards": shards}, indent=1).encode())
    mended = Prepared.open(found.folder, plan.encode_of, True, found.url)
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


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_to_shards(encode: Encode, where: str, most: int, work: Work) -> pa.Table:
    """Encode the rows of one piece and write a shard for each `most` of them; returns a row a shard that says what is in it."""
    reports = [_written(encode, where, rows, parts) for rows, parts in work.blocks(most)]
    return pa.Table.from_pylist(reports, REPORT)


REPORT = pa.schema(
    {name: pa.string() for name in ("file", "columns", "names", "bad_rows")}
    | {name: pa.int64() for name in ("rows", "bytes", "crc32", "train", "valid")}
)


def _written(encode: Encode, where: str, rows: Rows, parts: np.ndarray) -> dict[str, Any]:
    table, bad = encode_rows(encode, rows, parts)
    nothing = {"file": _file(rows.first), "rows": 0, "bytes": 0, "crc32": 0}
    valid = 0 if table is None else int(pc.sum(table["part"]).as_py())
    columns = "" if table is None else ", ".join(f"{f.name}: {described_field(f)}" for f in list(table.schema)[2:])
    return {
        **(nothing if table is None else write_shard(where, _file(rows.first), table)),
        "train": 0 if table is None else table.num_rows - valid,
        "valid": valid,
        "columns": columns,
        "names": json.dumps([] if table is None else table.column_names[2:]),
        "bad_rows": json.dumps(bad),
    }


def _file(first: int) -> str:
    # A shard is called by the position of its first row in the source.
    return f"{first:012d}.arrow"


def _rows_per_shard(plan: Plan, encode: Encode) -> int:
    # So many that a shard has about SHARD_BYTES, by the rows at the beginning, in the middle and at the end of the source.
    work = plan.work(spread(plan.source.rows))
    measured = []
    for one in {id(w): w for w in (work[0], work[len(work) // 2], work[-1])}.values():
        rows = next(one.blocks(MEASURED_ROWS), None)
        table = None if rows is None else encode_rows(encode, *rows)[0]
        if table is not None:
            measured.append(math.ceil(table.nbytes / table.num_rows))
    return max(1, min(SHARD_BYTES // max(measured, default=1), spread(plan.source.rows)))
