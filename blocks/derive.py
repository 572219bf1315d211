"""Prepared data made of prepared data: a function of each shard, carried out once and kept under a fingerprint of its own.

Each shard becomes a shard of as many rows, so both stores are fed in the same order.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from blocks.cache import Place, cache_url, discard, make_room, unfinished
from blocks.errors import UserError
from blocks.fit import MapWork
from blocks.plan import Column, Encode, the_item
from blocks.prepare import map_here
from blocks.prepared import Prepared
from blocks.shards import write_shard
from blocks.storage import is_url, joined
from blocks.transform import Pipeline


def derive(
    prepared: Prepared, fingerprint: str, make: Callable[[pa.Table], pa.Table], *, map_work: MapWork = map_here
) -> Prepared:
    """What `make` gives for each shard of `prepared`, or found made already under `fingerprint`.

    make: a shard -> the columns id and part as they are, then the new ones, the first being the input; run by `map_work`.
    Kept where `prepared` is, for as long. Of several processes of a machine that want the same, one makes it, others wait.
    """
    url = cache_url() if prepared.url is not None else None
    place = Place(prepared.folder.parent, url and joined(url, "prepared"))
    lasting = not prepared.folder.name.startswith(".")  # else it is there for one run
    where = place.url and joined(place.url, fingerprint)
    with _alone(place.home.parent / f"{fingerprint}.lock"):
        found = Prepared.open(place.home / fingerprint, _encode, True, where) if lasting else None
        if found is not None and not found.damaged():
            return found
        if found is not None:
            discard(found.folder)
        with unfinished(place, fingerprint, lasting) as made:
            folder = made.finish(_carry_out(prepared, made.where, make, map_work))
            new = Prepared.open(folder, _encode, False, place.url and joined(place.url, folder.name))
    assert new is not None
    make_room(place.home)
    return new


def _carry_out(prepared: Prepared, where: str, make: Callable[[pa.Table], pa.Table], map_work: MapWork) -> dict[str, Any]:
    began = time.perf_counter()
    numbers = range(len(prepared.index["shards"]))
    reports = [r for t in map_work(partial(_shard, prepared, make, where), numbers) for r in t.to_pylist()]
    shards = [json.loads(r["shard"]) for r in sorted(reports, key=lambda r: r["number"])]
    _check_written_here(where, shards)
    of_rows = {name: prepared.index[name] for name in ("source", "kind", "shard_rows", "moved", "parts", "bad_rows")}
    seconds = round(time.perf_counter() - began, 3)
    return of_rows | {"columns": reports[0]["columns"], "shards": shards, "fitted": [], "seconds": seconds}


def _check_written_here(where: str, shards: Sequence[dict[str, Any]]) -> None:
    # Tasks on another node would write to that node's own disk.
    away = [] if is_url(where) else [shard["file"] for shard in shards if not Path(where, shard["file"]).exists()]
    if away:
        raise UserError(
            f"{len(away)} of {len(shards)} shards were written on other nodes, whose disks this one does not see: set "
            "$FASTRAY_CACHE to a folder that all nodes share, or to a storage URL such as s3://bucket/path"
        )


def _shard(prepared: Prepared, make: Callable[[pa.Table], pa.Table], where: str, number: int) -> pa.Table:
    table = make(prepared.table(number))
    written = write_shard(where, PurePosixPath(prepared.index["shards"][number]["file"]).name, table)
    return pa.Table.from_pylist([{"number": number, "shard": json.dumps(written), "columns": table.column_names[2:]}])


def _encode(index: dict[str, Any]) -> Encode:
    # Nothing is encoded into such a store; this only names its columns.
    blocks = dict.fromkeys(name.partition(".")[0] for name in index["columns"])
    columns = tuple(Column(name, the_item, Pipeline()) for name in blocks)
    return Encode(columns, Pipeline(), layout=tuple(index["columns"]))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waited for it finds what was made
