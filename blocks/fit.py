"""Fitting: what transforms learn from the training part, by mergeable summaries; one pass over it for each depth.

Summaries of pieces are merged in the order of the rows, so that floats come out the same wherever the pieces were read.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from blocks.draws import sample_keys
from blocks.encode import column_values, finish_sample, naming
from blocks.errors import DataError, UnreadableRow
from blocks.fingerprint import NotFingerprintable, fingerprint
from blocks.gather import Shard, stored_sample
from blocks.plan import Encode, Fit, Plan, Work, empty_part
from blocks.prepared import Prepared
from blocks.rows import Rows
from blocks.splits import TRAIN, VALID
from blocks.storage import put
from blocks.transform import ColumnSummary, Pipeline, Transform, applies, transform_from_plain

MapWork = Callable[[Callable[[Any], pa.Table], Sequence[Any]], Iterable[pa.Table]]

FEWEST_ROWS = 64  # of a piece, where the data allows: below it, the price of a task outweighs its work
PIECES_AT_LEAST = 8  # so that a small data set still spreads over some cores
BLOCK_ROWS = 65_536


def spread(rows: int) -> int:
    """How many rows a piece has at most, so that a small data set is spread and a task still worth its price."""
    return max(FEWEST_ROWS, math.ceil(rows / PIECES_AT_LEAST))


def fit(plan: Plan, map_work: MapWork) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """The state of each fitted transform as plain data, and the ids of the validation rows that must train instead."""
    fitted: list[dict[str, Any]] = []
    moved: frozenset[str] = frozenset()
    for fits in plan.passes():
        encode = plan.encode_with(fitted)
        work = plan.work(min(BLOCK_ROWS, spread(plan.source.rows)), moved)
        seen, rows = _merged(map_work(partial(observe, encode, fits), list(enumerate(work))), encode, fits)
        if not rows[TRAIN]:  # of a table, this is known only now
            raise DataError(empty_part("training", f"the splitter put none of the {plan.source.rows} rows into it"))
        for number, one in enumerate(fits):
            fresh = replace(_transform(encode, one))
            summaries = (seen[number, part] for part in (TRAIN, VALID))
            moved |= {str(i) for i in fresh.setups(*summaries)}
            fitted.append({"column": one.column, "position": one.position, "transform": fresh.to_plain()})
    return fitted, moved


def _transform(encode: Encode, one: Fit) -> Any:
    return next(c for c in encode.columns if c.name == one.column).type_tfms.transforms[one.position]


def _summary(encode: Encode, one: Fit) -> Any:
    return _transform(encode, one).summary()


def _merged(
    tables: Iterable[pa.Table], encode: Encode, fits: Sequence[Fit]
) -> tuple[dict[tuple[int, int], Any], dict[int, int]]:
    # By fit and part the summary of all pieces, and by part how many rows there are.
    seen: dict[tuple[int, int], Any] = {}
    rows = {TRAIN: 0, VALID: 0}
    for table in _in_order(tables):
        for row in table.to_pylist():
            key = (row["fit"], row["part"])
            rows[row["part"]] += row["rows"] if row["fit"] == 0 else 0
            summary = type(_summary(encode, fits[row["fit"]])).from_plain(json.loads(row["summary"]))
            if key in seen:
                seen[key].merge(summary)
            else:
                seen[key] = summary
    return seen, rows


def _in_order(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: dict[int, pa.Table] = {}
    wanted = 0
    for table in tables:
        waiting[table["piece"][0].as_py()] = table
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted += 1


def observe(encode: Encode, fits: Sequence[Fit], numbered: tuple[int, Work]) -> pa.Table:
    """What the rows of a piece tell each transform to fit: one row a (fit, part), the summary as JSON."""
    piece, work = numbered
    summaries = {(number, part): _summary(encode, one) for number, one in enumerate(fits) for part in (TRAIN, VALID)}
    counts = {TRAIN: 0, VALID: 0}
    for rows, parts in work.blocks(BLOCK_ROWS):
        for part in counts:
            counts[part] += int((parts == part).sum())
        for number, one in enumerate(fits):
            _observe_rows(encode, one, rows, parts, [summaries[number, part] for part in (TRAIN, VALID)])
    found = [(n, p, json.dumps(s.to_plain())) for (n, p), s in summaries.items()]
    fit_numbers, fit_parts, texts = zip(*found, strict=True)
    of_part = [counts[part] for part in fit_parts]
    return pa.table({"piece": [piece] * len(found), "fit": fit_numbers, "part": fit_parts, "rows": of_part, "summary": texts})


def _observe_rows(encode: Encode, one: Fit, rows: Rows, parts: np.ndarray, summaries: Sequence[Any]) -> None:
    column = next(c for c in encode.columns if c.name == one.column)
    before = column.type_tfms.transforms[: one.position]
    if isinstance(summaries[0], ColumnSummary):
        with naming(rows.ids[0].as_py(), column.name):
            values = column_values(column, rows, before)
        if values is not None:
            values = pa.array(values) if isinstance(values, np.ndarray) else values
            for part, summary in zip((TRAIN, VALID), summaries, strict=True):
                chosen = pa.array(parts == part)
                summary.observe_column(values.filter(chosen), rows.ids.filter(chosen))
            return
    make = Pipeline(before)
    for row_id, part, item in zip(rows.ids.to_pylist(), parts.tolist(), rows.each(), strict=True):
        # What cannot be read is counted when it is encoded.
        with contextlib.suppress(UnreadableRow), naming(row_id, column.name):
            summaries[part].observe(make(column.getter(item)), row_id)


# --- the batch side ----------------------------------------------------------------------------------------------------


def fitted_batch_side(plan: Plan, prepared: Prepared) -> Pipeline:
    """The batch transforms, those with something to learn from the data fitted on the stored rows of the training part.

    What one learned is kept beside the shards, so that it is learned once. A transform observes the columns whose type one
    of its `encodes` is written for.
    """
    return Pipeline(tuple(t if t.summary is None or t.fitted else _fitted(t, prepared) for t in plan.batch_tfms.transforms))


def _fitted(t: Transform, prepared: Prepared) -> Transform:
    try:
        kept = prepared.folder / f"fitted-{fingerprint(t)}.json"
    except NotFingerprintable:  # it could not be told from another one: learned anew each time
        kept = None
    if kept is not None and kept.exists():
        return transform_from_plain(json.loads(kept.read_text()))
    assert t.summary is not None
    fresh, summaries = replace(t), {part: t.summary() for part in (TRAIN, VALID)}
    for shard in (Shard(prepared.table(number)) for number in range(len(prepared.index["shards"]))):
        for row in np.flatnonzero(shard.part == TRAIN).tolist():
            for value in _drawn_once(prepared.encode, shard, row):
                if applies(t, value):
                    summaries[TRAIN].observe(value, shard.id(row))
    fresh.setups(summaries[TRAIN], summaries[VALID])
    if not fresh.fitted:
        raise DataError(f"{type(t).__name__} finds nothing to learn from: no column of the data is of a type that it takes")
    if kept is not None:
        put(prepared.folder, kept.name, json.dumps(fresh.to_plain()).encode())
    return fresh


def _drawn_once(encode: Encode, shard: Shard, row: int) -> tuple[Any, ...]:
    # The columns of a row as a batch would hold them in one epoch.
    values = stored_sample(shard, row)
    return finish_sample(encode, values, sample_keys(0, 0, np.array([row])), TRAIN) if encode.each_epoch.transforms else values
