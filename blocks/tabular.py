"""Rows of a table as inputs: categories as codes, numbers filled and scaled, in two dense columns.

    TabularBlock(cat_names=("sex",), cont_names=("age", "fare"), procs=(Categorify(), FillMissing(), Normalize()))

What the three have to learn they learn in one pass over the training part: the mean of a column whose gaps are filled
follows from the mean of what is there and the number of gaps. Rows are worked on as whole Arrow columns, a single one, as in
prediction, as a table of one row: there is one way of encoding.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import torch

from blocks.category import NA, coded, is_missing
from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.items import cell
from blocks.pixels import Normalize
from blocks.rows import missing_column
from blocks.summaries import Moments, Quantiles
from blocks.tensors import TensorTabular
from blocks.transform import ItemTransform

FillStrategy = Literal["median", "mode", "constant"]
GAP_VOCAB = (NA, "False", "True")  # the categories of a column that says where another one had gaps
UNFILLED = "add FillMissing() to the procs, or leave such rows out"
NAMED_ROWS = 3  # in an error

# --- what a person says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Categorify:
    """Each category becomes its place among those of the training part; "#na#", before them, is for gaps and unknown ones."""


@dataclass(frozen=True)
class FillMissing:
    """Gaps in numbers are filled with the column's median or mode in the training part, or with a constant.

    fill_vals: the constants by column, 0 for a column that has none. add_col: for a column that has gaps in the training part,
    a category more, `<column>_na`, that says where they were.
    """

    fill_strategy: FillStrategy = "median"
    fill_vals: Mapping[str, float] = field(default_factory=dict)
    add_col: bool = True

    def __post_init__(self) -> None:
        if self.fill_strategy not in get_args(FillStrategy):
            raise ValueError(f"fill_strategy is one of {', '.join(get_args(FillStrategy))}, not {self.fill_strategy!r}")
        if self.fill_vals and self.fill_strategy != "constant":
            raise ValueError(f"fill_vals are for fill_strategy='constant', not {self.fill_strategy!r}")


Proc = Categorify | FillMissing | Normalize


def TabularBlock(  # noqa: N802  named as fastai's blocks are
    cat_names: Sequence[str] = (),
    cont_names: Sequence[str] = (),
    procs: Sequence[Proc | type[Proc]] = (Categorify(), FillMissing(), Normalize()),
) -> TransformBlock:
    """A block of the columns `cat_names`, as codes, and `cont_names`, as numbers, of a table's rows.

    Its `get_x` is `RowReader((*cat_names, *cont_names))`, or any function that gives a mapping by column. Encoded: int64
    codes (categories,) and float32 numbers (numbers,), a part without columns being left out.
    """
    given = {type(p): p for p in (p() if isinstance(p, type) else p for p in procs)}
    if len(given) < len(procs) or not given.keys() <= {Categorify, FillMissing, Normalize}:
        raise ValueError(f"procs are Categorify, FillMissing and Normalize, each once at most, not {list(procs)!r}")
    if cat_names and Categorify not in given:
        raise ValueError("categories need Categorify among the procs: a model takes their codes")
    if Normalize in given and given[Normalize] != Normalize():
        raise ValueError("Normalize of a table learns a mean and a deviation a column: write Normalize() without any")
    fill = given.get(FillMissing)
    assert fill is None or isinstance(fill, FillMissing)
    for name in () if fill is None else fill.fill_vals:
        if name not in cont_names:
            raise ValueError(missing_column(name, cont_names) + " (fill_vals are for cont_names)")
    return TransformBlock(
        type_tfms=(
            EncodeTable(
                tuple(cat_names),
                tuple(cont_names),
                fill_strategy=None if fill is None else fill.fill_strategy,
                add_col=fill is not None and fill.add_col,
                scale=Normalize in given,
                fills=() if fill is None else tuple(float(fill.fill_vals.get(name, 0.0)) for name in cont_names),
            ),
        )
    )


@dataclass(frozen=True)
class RowReader:
    """A row of a table as it is, of which only the columns `cols` are needed."""

    cols: tuple[str, ...]

    def __call__(self, row: Any) -> Any:
        return row

    def has_column(self, schema: pa.Schema) -> bool:
        """Whether `column` serves for tables of this schema: it always does. DataError when they lack one of the columns."""
        for name in self.cols:
            if name not in schema.names:
                raise DataError(missing_column(name, schema.names))
        return True

    def column(self, table: pa.Table) -> pa.Array:
        """The columns as one Arrow column of structures."""
        return _structures([table[name].combine_chunks() for name in self.cols], self.cols)


class TabularRow(dict[str, Any]):
    """A decoded row: the values by column, None for a gap."""


# --- what the training part tells --------------------------------------------------------------------------------------


@dataclass
class TableSummary:
    """What is seen of each column: how often each category occurs; the numbers' moments, and what they are filled by.

    The numbers' quantiles are kept for a median, their counts for a mode. DataError for what is no number, by column and row.
    """

    categories: dict[str, Counter[str]]
    moments: dict[str, Moments]
    quantiles: dict[str, Quantiles] = field(default_factory=dict)
    counts: dict[str, Counter[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, cat_names: Sequence[str], cont_names: Sequence[str], fill_strategy: str | None) -> Self:
        """One that has seen nothing."""
        return cls(
            {name: Counter() for name in cat_names},
            {name: Moments() for name in cont_names},
            {name: Quantiles() for name in cont_names if fill_strategy == "median"},
            {name: Counter() for name in cont_names if fill_strategy == "mode"},
        )

    def observe(self, value: Any, row_id: Any) -> None:
        self.observe_column(_one_row(value, (*self.categories, *self.moments)), pa.array([row_id]))

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        columns = _columns(values)
        for name, counter in self.categories.items():
            codes, labels = coded(columns[name], _label)
            for label, n in zip(labels, np.bincount(codes, minlength=len(labels)).tolist(), strict=True):
                if label is not None and n:
                    counter[label] += n
        for name, moments in self.moments.items():
            numbers = _numbers(name, columns[name], row_ids)
            moments.observe_column(pa.array(numbers), row_ids)
            if name in self.quantiles:
                self.quantiles[name].observe_column(pa.array(numbers), row_ids)
            if name in self.counts:
                self.counts[name].update(numbers[~np.isnan(numbers)].tolist())

    def merge(self, other: Self) -> None:
        for name, counter in other.categories.items():
            self.categories[name].update(counter)
        for name, moments in other.moments.items():
            self.moments[name].merge(moments)
        for name, quantiles in other.quantiles.items():
            self.quantiles[name].merge(quantiles)
        for name, numbers in other.counts.items():
            self.counts[name].update(numbers)

    def to_plain(self) -> dict[str, Any]:
        return {
            "categories": {name: dict(c) for name, c in self.categories.items()},
            "moments": {name: m.to_plain() for name, m in self.moments.items()},
            "quantiles": {name: q.to_plain() for name, q in self.quantiles.items()},
            "counts": {name: sorted(c.items()) for name, c in self.counts.items()},
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(
            {name: Counter(c) for name, c in plain["categories"].items()},
            {name: Moments.from_plain(m) for name, m in plain["moments"].items()},
            {name: Quantiles.from_plain(q) for name, q in plain["quantiles"].items()},
            {name: Counter(dict(c)) for name, c in plain["counts"].items()},
        )

    def fill_of(self, name: str) -> float:
        """What the gaps of a column are filled with. DataError when it has gaps only."""
        if not self.moments[name].n:
            raise DataError(
                f"the column {name!r} has no number in the training part: leave it out of cont_names, or fill it by "
                "FillMissing('constant')"
            )
        if name in self.quantiles:
            return self.quantiles[name].median
        most = max(self.counts[name].values())
        return min(number for number, n in self.counts[name].items() if n == most)


# --- encoding ----------------------------------------------------------------------------------------------------------


@dataclass
class EncodeTable(ItemTransform):
    """The rows of a table as codes and numbers; what `TabularBlock` is made of.

    fill_strategy, add_col, scale: what was asked for. Learned: vocabs, a vocabulary for each of `cat_names` and then for each
    of `gap_names`, the numbers whose gaps are marked; fills, means and stds, one for each of `cont_names`.
    """

    cat_names: tuple[str, ...]
    cont_names: tuple[str, ...]
    fill_strategy: str | None = "median"
    add_col: bool = True
    scale: bool = True
    fills: tuple[float, ...] = ()
    learned: bool = False
    gap_names: tuple[str, ...] = ()
    vocabs: tuple[tuple[str, ...], ...] = ()
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [*self.cat_names, *self.cont_names]
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))}: a column is a category or a number, and named once")
        if not names:
            raise ValueError("a table's block needs columns: name some in cat_names or cont_names")
        self._codes = [{label: code for code, label in enumerate(vocab)} for vocab in self.vocabs]

    def summary(self) -> TableSummary:  # of these columns: a method, where other transforms name a class
        return TableSummary.of(self.cat_names, self.cont_names, self.fill_strategy)

    @property
    def fitted(self) -> bool:
        return self.learned

    def setups(self, train: TableSummary, valid: TableSummary) -> set[Any]:
        vocabs = [(NA, *sorted(train.categories[name])) for name in self.cat_names]
        gaps = [name for name in self.cont_names if self.add_col and train.moments[name].missing]
        if self.fill_strategy in ("median", "mode"):
            self.fills = tuple(train.fill_of(name) for name in self.cont_names)
        self._check_gaps(train, valid)
        fills = self.fills or [0.0] * len(self.cont_names)
        moments = [_filled(m, fill) for m, fill in zip(train.moments.values(), fills, strict=True)]
        self.means = tuple(m.mean if self.scale else 0.0 for m in moments)
        self.stds = tuple((m.std or 1.0) if self.scale else 1.0 for m in moments)  # a constant column becomes zeros
        self.gap_names, self.vocabs, self.learned = tuple(gaps), (*vocabs, *(GAP_VOCAB for _ in gaps)), True
        self.__post_init__()
        return set()

    def _check_gaps(self, *summaries: TableSummary) -> None:
        if self.fill_strategy is not None:
            return
        for name in self.cont_names:
            missing = sum(s.moments[name].missing for s in summaries)
            if missing:
                raise DataError(
                    f"the column {name!r} has {missing} gaps: add FillMissing() to the procs, or leave such rows out"
                )

    def encodes(self, x: object) -> tuple[TensorTabular, ...]:
        row = _one_row(x, (*self.cat_names, *self.cont_names))
        return tuple(torch.from_numpy(part[0]).as_subclass(TensorTabular) for part in self.encodes_column(row))

    def encodes_column(self, values: pa.Array) -> tuple[np.ndarray, ...]:
        columns = _columns(values)
        codes = [_codes_of(columns[name], known) for name, known in zip(self.cat_names, self._codes, strict=False)]
        numbers = np.empty((len(values), len(self.cont_names)), np.float32)
        for i, name in enumerate(self.cont_names):
            found = _numbers(name, columns[name], None)
            gaps = np.isnan(found)
            if name in self.gap_names:
                codes.append(1 + gaps.astype(np.int64))
            if gaps.any():
                if not self.fills:
                    raise DataError(
                        f"the column {name!r} has no value, and gaps are not filled: add FillMissing() to the procs"
                    )
                found[gaps] = self.fills[i]
            numbers[:, i] = (found - self.means[i]) / self.stds[i]
        parts = [np.stack(codes, axis=1)] if codes else []
        return tuple([*parts, numbers] if self.cont_names else parts)

    def decodes(self, x: tuple[TensorTabular, ...]) -> TabularRow:
        parts = list(x)
        codes = parts.pop(0).tolist() if self.vocabs else []
        numbers = parts.pop(0).tolist() if self.cont_names else []
        row = TabularRow()
        for name, vocab, code in zip(self.cat_names, self.vocabs, codes, strict=False):
            row[name] = vocab[code] if code else None
        marks = codes[len(self.cat_names) :]
        gaps = {name for name, code in zip(self.gap_names, marks, strict=True) if GAP_VOCAB[code] == "True"}
        for name, number, mean, std in zip(self.cont_names, numbers, self.means, self.stds, strict=True):
            row[name] = None if name in gaps else float(f"{number * std + mean:.6g}")  # as many digits as float32 holds
        return row


def _filled(seen: Moments, fill: float) -> Moments:
    # The moments of a column once each gap holds `fill`.
    whole = replace(seen, missing=0)
    whole.merge(Moments(seen.missing, fill))
    return whole


# --- Arrow columns -----------------------------------------------------------------------------------------------------


def _structures(arrays: Sequence[pa.Array], names: Sequence[str]) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(arrays), names=list(names))


def _columns(values: pa.StructArray) -> dict[str, pa.Array]:
    return dict(zip((f.name for f in values.type), values.flatten(), strict=True))


def _one_row(row: Any, names: Sequence[str]) -> pa.StructArray:
    arrays = []
    for name in names:
        value = cell(row, name)
        try:
            arrays.append(pa.array([None if is_missing(value) else value]))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"the column {name!r} holds {value!r:.200} ({type(value).__name__}), no text and no number"
            ) from error
    return _structures(arrays, names)


def _label(value: Any) -> str:
    # A column of whole numbers with a gap in it is one of floats to pandas: 3.0 is the category 3.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _codes_of(values: pa.Array, known: Mapping[str, int]) -> np.ndarray:
    codes, labels = coded(values, _label)
    return np.array([0 if label is None else known.get(label, 0) for label in labels], np.int64)[codes]


def _numbers(name: str, values: pa.Array, row_ids: pa.Array | None) -> np.ndarray:
    # As float64 of our own, NaN for a gap. DataError for what is no finite number.
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if not (pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind) or _is_number(kind)):
        odd = next((i for i, v in enumerate(values.to_pylist()) if not _reads_as_number(v)), 0)
        raise DataError(
            f"the column {name!r} holds {kind}, such as {values[odd].as_py()!r:.80}{_in_rows(row_ids, [odd])}: a number is "
            "wanted. Name it in cat_names, or convert it"
        )
    if pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    found = np.array(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    infinite = np.flatnonzero(np.isinf(found))
    if len(infinite):
        raise DataError(
            f"the column {name!r} has {len(infinite)} infinite values{_in_rows(row_ids, infinite)}: make them gaps, or leave "
            "such rows out"
        )
    return found


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _reads_as_number(value: Any) -> bool:
    try:
        float(0 if value is None else value)
    except (TypeError, ValueError):
        return False
    return True


def _in_rows(row_ids: pa.Array | None, positions: Sequence[int] | np.ndarray) -> str:
    if row_ids is None:
        return ""
    named = ", ".join(str(row_ids[int(i)].as_py()) for i in positions[:NAMED_ROWS])
    return f" (row {named}{', ...' if len(positions) > NAMED_ROWS else ''})"
