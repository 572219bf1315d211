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
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blocks.cache import INDEX, Unfinished, folder_here, make_room, place_of, unfinished
from blocks.encode import encode_rows
from blocks.errors import DataError, UserError
from blocks.fit import MapWork, fit, spread
from blocks.plan import Encode, Plan, Work, empty_part
from blocks.prepared import Others, Prepared
from blocks.rows import Rows
from blocks.shards import SAME_SIZE, described_field, write_shard
from blocks.storage import is_url, joined, put

SHARD_BYTES = 32_000_000
MEASURED_ROWS = 8


def map_here(function: Callable[[Any], pa.Table], work: Sequence[Any]) -> Iterator[pa.Table]:
    """`function` of each piece of work, one after the other, in this process."""
    return map(function, work)


def prepare(
    plan: Plan,
    *,
    map_work: MapWork = map_here,
    max_bad_rows: int = 0,
    cache: str = "disk",
    others: Others | None = None,
) -> Prepared:
    """Carry `plan` out, or find it carried out already by its fingerprint.

    cache: "disk" keeps the result below the cache folder or at its URL, "memory" in a tmpfs folder, "off" until this process
    ends. others: the machines besides this one on which `map_work` runs, each of which may write to a disk of its own.
    DataError when more than `max_bad_rows` rows cannot be read (the first ones are named), when a class is only in the
    validation part, or when there is only one class.
    """
    if not isinstance(max_bad_rows, int) or max_bad_rows < 0:
        raise UserError(f"max_bad_rows is a whole number of rows, at least 0, not {max_bad_rows!r}")
    place = place_of(cache)
    if place.url is not None:
        others = None  # a URL means the same on all machines
    lasting = cache != "off" and plan.unkept is None
    if lasting:
        found = Prepared.open(
            place.home / plan.fingerprint, plan.encode_of, True, place.url and joined(place.url, plan.fingerprint)
        )
        if found is not None:
            check_bad_rows(found.index["bad_rows"], max_bad_rows)
            return _mended(replace(found, others=others), plan, map_work)
    try:
        with unfinished(place, plan.fingerprint, lasting) as made:
            folder = made.finish(_carry_out(plan, made, map_work, max_bad_rows))
            prepared = Prepared.open(folder, plan.encode_of, False, place.url and joined(place.url, folder.name))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left in {place.home}: `fastray cache clear` makes room, $FASTRAY_CACHE names another place"
        ) from error
    assert prepared is not None
    make_room(place.home)
    if others is None:
        return prepared
    return _mended(replace(prepared, others=others), plan, map_work)  # a machine may be gone, and what it had written


def _carry_out(plan: Plan, made: Unfinished, map_work: MapWork, max_bad_rows: int) -> dict[str, Any]:
    # Returns the index that describes the shards.
    began = time.perf_counter()
    fitted, moved = fit(plan, map_work)
    encode = plan.encode_with(fitted)
    shard_rows = _rows_per_shard(plan, encode)
    work = plan.work(shard_rows, moved)
    to_shards = partial(encode_to_shards, encode, made.where, made.name, shard_rows)
    reports = [report for table in map_work(to_shards, work) for report in table.to_pylist()]
    reports.sort(key=lambda report: report["file"])
    bad_rows = [bad for report in reports for bad in json.loads(report.pop("bad_rows"))]
    check_bad_rows(bad_rows, max_bad_rows)
    shards = [report for report in reports if report["rows"]]
    if not shards:
        raise DataError(f"none of the {plan.source.rows} rows could be read")
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
        "kind": plan.source.kind,
        "columns": json.loads(next(iter(kinds.values()))),
        "shards": shards,
        "shard_rows": shard_rows,
        "moved": sorted(moved),
        "fitted": fitted,
        "parts": parts,
        "bad_rows": bad_rows,
        "seconds": round(time.perf_counter() - began, 3),
    }


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
    made = made_again(found, plan, damaged, map_work)
    for i, name in zip(damaged, names, strict=True):
        if made[name]["rows"] != shards[i]["rows"]:
            raise DataError(
                f"the shard {name} of {found.folder} is damaged, and its rows can no longer be read as they were: bring their "
                f"files back, or start afresh with `fastray cache clear {found.fingerprint}`"
            )
        shards[i] |= {key: made[name][key] for key in ("bytes", "crc32")}
    put(found.url or found.folder, INDEX, json.dumps(found.index | {"shards": shards}, indent=1).encode())
    mended = Prepared.open(found.folder, plan.encode_of, found.reused, found.url)
    assert mended is not None
    return replace(mended, others=found.others)


def made_again(prepared: Prepared, plan: Plan, numbers: Sequence[int], map_work: MapWork = map_here) -> dict[str, Any]:
    """Write some shards again, from the rows they came from; returns what is in each, by the name of its file."""
    names = [PurePosixPath(prepared.index["shards"][number]["file"]) for number in numbers]
    rows = prepared.index["shard_rows"]
    pieces = plan.work(rows, frozenset(prepared.index["moved"]))
    positions = [int(name.stem) for name in names]
    work = [w for w in pieces if any(w.piece.first <= p < w.piece.first + w.piece.rows for p in positions)]
    # Below a URL there is a folder of the run that wrote them.
    where = joined(prepared.url, names[0].parent.name) if prepared.url else str(prepared.folder)
    again = partial(encode_to_shards, prepared.encode, where, prepared.folder.name, rows)
    return {report["file"]: report for table in map_work(again, work) for report in table.to_pylist()}


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


def encode_to_shards(encode: Encode, where: str, name: str, most: int, work: Work) -> pa.Table:
    """Encode the rows of one piece and write a shard for each `most` of them; returns a row a shard that says what is in it.

    where: a URL or a folder. On a machine whose disk has no such folder they are written to its own one called `name`.
    """
    if not is_url(where) and not Path(where).is_dir():
        folder = folder_here(Path(where).with_name(name))
        folder.mkdir(parents=True, exist_ok=True)
        where = str(folder)
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
