"""A plan carried out by Ray Data: the functions of `blocks.prepare` mapped over blocks of the listing, on any node."""

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from blocks.dataloaders import DataLoaders, dataloaders_of
from blocks.fingerprint import NotFingerprintable
from blocks.prepare import prepare
from blocks.sources import TableSource
from cluster.failures import as_bytes
from cluster.runtime import start_ray
from cluster.shards import find_elsewhere, nodes_for, tell_elsewhere

if TYPE_CHECKING:
    from blocks.datablock import DataBlock


def dataloaders(
    block: "DataBlock", source: Any, *, batch_size: int = 64, seed: int = 0, max_bad_rows: int = 0, cache: str = "disk"
) -> DataLoaders:
    """`block.dataloaders(source)`, with the source read, decoded and encoded by Ray Data tasks; the result is the same.

    source: as there, or a `ray.data.Dataset`, whose rows are the items. Tasks write the shards themselves and return a few
    words about each, so neither this process nor Ray's object store holds the data.
    """
    plan = block.plan(dataset_source(source) if type(source).__module__.startswith("ray.data") else source)
    find_elsewhere(plan, cache)
    prepared = prepare(plan, map_work=map_on_ray, max_bad_rows=max_bad_rows, cache=cache, others=nodes_for(plan))
    tell_elsewhere(prepared)
    return dataloaders_of(plan, prepared, batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class RefSpan:
    """A block of a `ray.data.Dataset` in the object store."""

    block: Any  # ray.ObjectRef of a pa.Table
    rows: int

    def tables(self, most: int) -> Iterator[pa.Table]:
        import ray

        yield ray.get(self.block).replace_schema_metadata(None)


def dataset_source(dataset: Any) -> TableSource:
    """A `ray.data.Dataset` as a source: its blocks, in their order, where they are. The driver holds none of its rows.

    It has no identity that lasts, so what is prepared of it is not found again by a later run.
    """
    start_ray()
    import ray

    dataset.context.execution_options.preserve_order = True
    blocks = dataset.to_arrow_refs()
    described = ray.remote(lambda block: (block.num_rows, block.nbytes, tuple(block.column_names)))
    found = ray.get([described.remote(block) for block in blocks])
    spans = tuple(RefSpan(block, rows) for block, (rows, _, _) in zip(blocks, found, strict=True) if rows)
    columns = next((names for rows, _, names in found if rows), ())

    def unknown() -> Any:
        raise NotFingerprintable("a ray.data.Dataset has no lasting identity: write it to Parquet and name the files")

    return TableSource("ray.data.Dataset", columns, spans, sum(size for _, size, _ in found), unknown)


def map_on_ray(function: Callable[[Any], pa.Table], work: Sequence[Any]) -> Iterator[pa.Table]:
    """`function` of each piece of work in Ray Data tasks, one a task, in whatever order they end.

    An exception of `function` is raised here as itself, with the worker's traceback as a note.
    """
    start_ray()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.op_resource_reservation_enabled = False  # with it a map of few blocks begins with one task at a time

    def guarded(table: pa.Table) -> pa.Table:
        # An error travels as a value: raised inside a task, Ray Data would wrap it and print its own trace first.
        try:
            done, error = function(pickle.loads(table["work"][0].as_py())), None  # noqa: S301  the driver's own, of this run
        except Exception as raised:  # noqa: BLE001  carried to the driver and raised there
            raised.add_note(traceback.format_exc())
            done, error = None, as_bytes(raised)
        result = None if done is None else pickle.dumps(done)
        return pa.table({"result": pa.array([result], pa.binary()), "error": pa.array([error], pa.binary())})

    tables = [pa.table({"work": pa.array([ray.cloudpickle.dumps(one)], pa.large_binary())}) for one in work]
    mapped = ray.data.from_arrow(tables).map_batches(guarded, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
    for rows in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in rows.to_pylist():
            if row["error"] is not None:
                raise ray.cloudpickle.loads(row["error"])
            yield pickle.loads(row["result"])  # noqa: S301  our own task's, of this run
