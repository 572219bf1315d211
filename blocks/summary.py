"""`DataBlock.summary`: one sample walked through every step, saying what each made of it; then a few as a batch."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blocks.draws import sample_keys
from blocks.encode import encode_sample, finish_sample
from blocks.errors import DataError
from blocks.fit import fit
from blocks.gather import collate
from blocks.plan import Encode, Plan
from blocks.shards import described
from blocks.splits import TRAIN
from blocks.transform import Pipeline, Transform

if TYPE_CHECKING:
    from blocks.datablock import DataBlock

FEW = 4  # samples of the batch


def summary_lines(block: "DataBlock", source: Any) -> Iterator[str]:
    """What each step makes of the first training row of `source`, line by line as it is found out.

    DataError at the step that fails: the transform, the item, and the error.
    """
    plan = block.plan(source)
    yield f"{plan.source.rows} {plan.source.kind} of {plan.source.name}"
    fitted, moved = fit(plan, map)
    encode = plan.encode_with(fitted)
    rows = list(islice(_training_rows(plan, moved), FEW))
    if not rows:
        raise DataError("the training part is empty: give the splitter another seed or fraction, or more rows")
    (row_id, item), key = rows[0], sample_keys(0, 0, np.arange(1))
    yield f"\nOne sample, the row {row_id!r}: {said(item)}"
    values = []
    for column in encode.columns:
        with _failing(column.getter, row_id, item):
            value = column.getter(item)
        yield f"  {column.name}: {_name(column.getter)} gives {said(value)}"
        for t in column.type_tfms.transforms:
            value = _step(t, value, row_id)
            yield f"    {t} gives {said(value)}"
        values.append(value)
    sample = tuple(values)
    for name, tfms in (("once", encode.item_tfms), ("each epoch", encode.each_epoch)):
        for t in tfms.transforms:
            sample = _step(t, sample, row_id, key)
            yield f"  {t}, {name}, gives {said(sample)}"
    batch = _batch(encode, rows)
    yield f"\nA batch of {len(rows)}: {said(batch)}"
    keys = sample_keys(0, 0, np.arange(len(rows)))
    for t in plan.batch_tfms.transforms:
        if not t.fitted:
            yield f"  {t} learns from the whole training part, when it is prepared"
            return
        batch = _step(t, batch, f"first {len(rows)}", keys)
        yield f"  {t} gives {said(batch)}"


def _training_rows(plan: Plan, moved: frozenset[str]) -> Iterator[tuple[Any, Any]]:
    for work in plan.work(FEW, moved):
        for rows, parts in work.blocks(1024):
            trains = zip(rows.ids.to_pylist(), rows.each(), parts == TRAIN, strict=True)
            yield from ((row_id, item) for row_id, item, train in trains if train)


def _batch(encode: Encode, rows: list[tuple[Any, Any]]) -> tuple[Any, ...]:
    samples = []
    for (row_id, item), key in zip(rows, sample_keys(0, 0, np.arange(len(rows))), strict=True):
        stored = tuple(encode.flat(encode_sample(encode, row_id, item, TRAIN)).values())
        finished = finish_sample(encode, stored, key[None], TRAIN) if encode.each_epoch.transforms else stored
        odd = next((v for v in finished if not isinstance(v, torch.Tensor)), None)
        if odd is not None:
            raise DataError(f"the row {row_id!r} ends up with {said(odd)}, not with tensors: give its block a transform")
        samples.append(finished)
    names = [f"column {i}" for i in range(len(samples[0]))]
    return tuple(collate(names, samples, {}))


def _step(t: Transform, value: Any, row_id: Any, keys: torch.Tensor | None = None) -> Any:
    with _failing(t, row_id, value):
        return Pipeline((t,))(value, split_idx=TRAIN, keys=keys)


@contextlib.contextmanager
def _failing(step: Any, row_id: Any, value: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{_name(step)} fails on the row {row_id!r}, given {said(value)}: {type(error).__name__}: {error}"
        ) from error


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)


def said(value: Any) -> str:
    """A value for a person: its type, with shape and dtype, size, or what it is."""
    kind = type(value).__name__
    match value:
        case torch.Tensor():
            number = f" = {value.item():.6g}" if value.ndim == 0 else ""
            return f"{kind}, {described(value)}{number}"
        case tuple():
            return f"({'; '.join(map(said, value))})"
        case bytes():
            return f"{len(value)} bytes"
    size = getattr(value, "size", None)
    if isinstance(size, tuple):  # of a PIL image
        return f"{kind}, {size[0]} wide, {size[1]} high"
    return f"{value!r:.80} ({kind})"
