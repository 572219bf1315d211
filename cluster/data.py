"""A plan carried out by Ray Data: the functions of `blocks.prepare` mapped over blocks of the listing, on any node."""

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from blocks.dataloaders import DataLoaders, dataloaders_of
from blocks.prepare import prepare
from cluster.runtime import start_ray

if TYPE_CHECKING:
    from blocks.datablock import DataBlock


def dataloaders(
    block: "DataBlock", source: Any, *, batch_size: int = 64, seed: int = 0, max_bad_rows: int = 0, cache: str = "disk"
) -> DataLoaders:
    """`block.dataloaders(source)`, with the files read, decoded and encoded by Ray Data tasks; the result is the same.

    Tasks write the shards themselves and return a few words about each, so neither this process nor Ray's object store holds
    the data.
    """
    plan = block.plan(source)
    prepared = prepare(plan, map_work=map_on_ray, max_bad_rows=max_bad_rows, cache=cache)
    return dataloaders_of(plan, prepared, batch_size=batch_size, seed=seed)


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
            done, error = None, ray.cloudpickle.dumps(raised)
        result = None if done is None else pickle.dumps(done)
        return pa.table({"result": pa.array([result], pa.binary()), "error": pa.array([error], pa.binary())})

    tables = [pa.table({"work": pa.array([ray.cloudpickle.dumps(one)], pa.large_binary())}) for one in work]
    mapped = ray.data.from_arrow(tables).map_batches(guarded, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
    for rows in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in rows.to_pylist():
            if row["error"] is not None:
                raise ray.cloudpickle.loads(row["error"])
            yield pickle.loads(row["result"])  # noqa: S301  our own task's, of this run
