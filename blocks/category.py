"""Labels as blocks: a vocabulary fitted on the training part, indices or one number a class in the store, names when shown.

A label counts by its text (`str`); None and NaN are missing labels. Whole Arrow columns are counted and encoded by their
distinct values, so that Python sees each label once, not each row.
"""

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.tensors import TensorCategory, TensorMultiCategory
from blocks.transform import ItemTransform, Summary, Transform

NA = "#na#"
RowId = str | int


class Category(str):
    """The name of a class, as decoded."""


class MultiCategory(list[str]):
    """The names of the classes that apply, as decoded; shown as a;b."""

    def __str__(self) -> str:
        return ";".join(self)


# --- counting labels ---------------------------------------------------------------------------------------------------


@dataclass
class CategoryCounts:
    """How often each label occurs, and the smallest id of its rows. Mergeable, exact. Missing labels do not count."""

    counts: Counter[str] = field(default_factory=Counter)
    first_row: dict[str, Any] = field(default_factory=dict)

    def _add(self, label: str, n: int, row_id: RowId) -> None:
        self.counts[label] += n
        known = self.first_row.get(label)
        self.first_row[label] = row_id if known is None else min(known, row_id)

    def observe(self, value: Any, row_id: RowId) -> None:
        if not is_missing(value):
            self._add(str(value), 1, row_id)

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        codes, labels = coded(values)
        # By code, because Arrow groups numbers faster than texts; one thread, because the machine's are the tasks' own.
        rows = pa.table({"code": codes, "id": row_ids})
        groups = rows.group_by("code", use_threads=False).aggregate([("id", "count"), ("id", "min")])
        for group in groups.to_pylist():
            label = labels[group["code"]]
            if label is not None:
                self._add(label, group["id_count"], group["id_min"])

    def merge(self, other: Self) -> None:
        for label, n in other.counts.items():
            self._add(label, n, other.first_row[label])

    def to_plain(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "first_row": self.first_row}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(Counter(plain["counts"]), dict(plain["first_row"]))


@dataclass
class MultiCategoryCounts(CategoryCounts):
    """`CategoryCounts` of rows with any number of labels each; a label counts once a row."""

    def observe(self, value: Any, row_id: RowId) -> None:
        if not is_missing(value):
            for label in set(_labels(value)):
                if label is not None:
                    self._add(label, 1, row_id)

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        if not _of_lists(values):
            return
        each = pa.table({"row": pc.list_parent_indices(values), "label": pc.list_flatten(values)})
        once = each.group_by(["row", "label"], use_threads=False).aggregate([])
        super().observe_column(once["label"].combine_chunks(), row_ids.take(once["row"].combine_chunks()))


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA and NaT (by name: this file has no other use for pandas)."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")


def _labels(value: Any) -> list[str | None]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise DataError(
            f"{value!r:.200} ({type(value).__name__}) is not a list of labels; ColReader(column, label_delim=' ') makes one "
            "of a text"
        )
    return [None if is_missing(label) else str(label) for label in value]


def _of_lists(values: pa.Array) -> bool:
    # Whether a column holds lists; not when it is empty. DataError when it holds anything else, as of one such value.
    if pa.types.is_nested(values.type):
        return True
    for value in values.drop_null()[:1].to_pylist():
        _labels(value)
    return False


def coded(values: pa.Array, text: Callable[[Any], str] = str) -> tuple[np.ndarray, list[str | None]]:
    """A code a row, int64 (rows,), and the label of each code by `text`; code 0 is that of a null, missing ones are None."""
    found = values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(values)
    labels = [None if is_missing(v) else text(v) for v in found.dictionary.to_pylist()]
    return found.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False) + 1, [None, *labels]


# --- the vocabulary ----------------------------------------------------------------------------------------------------


def _fitted_vocab(train: CategoryCounts, valid: CategoryCounts, sort: bool, add_na: bool) -> tuple[list[str], set[RowId]]:
    # The labels of the training part, and the validation rows that must train.
    # A class with one item, drawn into validation, could never be learned: it trains instead, and that is said.
    lone = {label: valid.first_row[label] for label, n in valid.counts.items() if n == 1 and label not in train.counts}
    if lone and not add_na:
        warnings.warn(
            f"{len(lone)} classes have one item each, which is moved to the training part: {_listed(sorted(lone))}",
            stacklevel=3,
        )
    known = dict(train.first_row) | ({} if add_na else lone)
    unseen = sorted(set(valid.counts) - set(known))
    if unseen and not add_na:
        raise DataError(
            f"{_listed(unseen)}: only in the validation part ({sum(valid.counts[c] for c in unseen)} rows), so the "
            "model could never learn it. Change the splitter's seed or fraction, add items of that class, name the classes "
            f"in CategoryBlock(vocab=...), or make what is not known one class, {NA!r}, by add_na=True"
        )
    return sorted(known) if sort else sorted(known, key=lambda label: (known[label], label)), set() if add_na else {
        *lone.values()
    }


@dataclass
class _Vocabulary:
    """What `Categorize` and `MultiCategorize` share: fastai's CategoryMap."""

    vocab: tuple[str, ...] = ()
    sort: bool = True
    add_na: bool = False

    def __post_init__(self) -> None:
        self.vocab = tuple(str(v) for v in self.vocab)
        if self.vocab and self.add_na and NA not in self.vocab:
            self.vocab = (NA, *self.vocab)
        self._index: dict[str | None, int] = {label: i for i, label in enumerate(self.vocab)}
        if len(self._index) != len(self.vocab):
            twice = [label for label, n in Counter(self.vocab).items() if n > 1]
            raise ValueError(f"the vocabulary names {', '.join(map(repr, twice))} more than once")

    @property
    def fitted(self) -> bool:
        return bool(self.vocab)

    def index_of(self, label: str | None) -> int:
        """The position of a label in the vocabulary; None is a missing one. DataError when it is not there."""
        index = self._index.get(label)
        if index is not None:
            return index
        if self.add_na:
            return self._index[NA]
        if label is None:
            raise DataError(f"a row has no label: leave such rows out, or make them the class {NA!r} by add_na=True")
        nearest = difflib.get_close_matches(label, self.vocab, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(f"the label {label!r} is not in the vocabulary {_listed(self.vocab)}{hint}")

    def indices_of(self, values: pa.Array) -> np.ndarray:
        """`index_of` of each value of a column, int64 (rows,)."""
        codes, labels = coded(values)
        by_code = np.zeros(len(labels), np.int64)
        for code in np.flatnonzero(np.bincount(codes)):
            by_code[code] = self.index_of(labels[code])
        return by_code[codes]


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


# --- one label a row ---------------------------------------------------------------------------------------------------


@dataclass
class Categorize(_Vocabulary, Transform):
    """A label becomes its index in the vocabulary; the vocabulary is that of the training part unless given.

    sort: in order of the labels, else of the smallest row ids. A given vocabulary keeps its order. add_na: the class "#na#",
    before all others, for labels that are missing or not known.
    """

    summary: ClassVar[type[Summary] | None] = CategoryCounts

    def setups(self, train: CategoryCounts, valid: CategoryCounts) -> set[RowId]:
        vocab, moved = _fitted_vocab(train, valid, self.sort, self.add_na)
        if len(vocab) < 2:
            raise DataError(
                f"a classifier needs at least two classes in the training part, found {_listed(vocab) or 'none'}: "
                "check that get_y names the class (parent_label: the folder an item lies in)"
            )
        self.vocab = tuple(vocab)
        self.__post_init__()
        return moved

    def encodes(self, x: object) -> TensorCategory:
        index = self.index_of(None if is_missing(x) else str(x))
        return torch.tensor(index).as_subclass(TensorCategory)

    def encodes_column(self, values: pa.Array) -> np.ndarray:
        return self.indices_of(values)

    def decodes(self, x: TensorCategory) -> Any:
        return Category(self.vocab[int(x)]) if x.ndim == 0 else [Category(self.vocab[int(i)]) for i in x]


def CategoryBlock(vocab: Sequence[str] = (), sort: bool = True, add_na: bool = False) -> TransformBlock:  # noqa: N802
    """A block of single labels; `vocab` fixes the classes and their order, else the training part does."""
    return TransformBlock(type_tfms=(Categorize(tuple(vocab), sort, add_na),))


# --- any number of labels a row ----------------------------------------------------------------------------------------


@dataclass
class LabelLists(_Vocabulary, ItemTransform, registered=False):
    """What transforms of lists of labels share: the vocabulary of all that occur."""

    summary: ClassVar[type[Summary] | None] = MultiCategoryCounts

    def setups(self, train: CategoryCounts, valid: CategoryCounts) -> set[RowId]:
        vocab, moved = _fitted_vocab(train, valid, self.sort, self.add_na)
        if not vocab:
            raise DataError("no row of the training part has a label: check what get_y makes of an item")
        self.vocab = tuple(vocab)
        self.__post_init__()
        return moved

    def indices_in(self, labels: Any) -> list[int]:
        """The position of each label of a row's list. DataError when it is no list, or one is not in the vocabulary."""
        if is_missing(labels):
            raise DataError("a row has no list of labels; an empty list says that no class applies")
        return [self.index_of(label) for label in _labels(labels)]


@dataclass
class MultiCategorize(LabelLists):
    """A list of labels becomes one number a class, 1 where it applies; fields as in `Categorize`.

    fastai's OneHotEncode is its second half: how many numbers there are is known once the vocabulary is.
    """

    def encodes(self, x: object) -> TensorMultiCategory:
        return _one_hot(self.indices_in(x), len(self.vocab))

    def encodes_column(self, values: pa.Array) -> np.ndarray:
        if values.null_count:
            raise DataError(f"{values.null_count} rows have no list of labels; an empty list says that no class applies")
        encoded = np.zeros((len(values), len(self.vocab)), np.float32)
        if not _of_lists(values):
            return encoded
        rows = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
        encoded[rows, self.indices_of(pc.list_flatten(values))] = 1
        return encoded

    def decodes(self, x: TensorMultiCategory) -> MultiCategory:
        return MultiCategory(self.vocab[int(i)] for i in (x > 0.5).nonzero().flatten())


@dataclass
class EncodedMultiCategorize(ItemTransform):
    """Labels that are one number a class already, 0 or 1, in the order of `vocab`."""

    vocab: tuple[str, ...]

    def __post_init__(self) -> None:
        self.vocab = tuple(str(v) for v in self.vocab)

    def encodes(self, x: object) -> TensorMultiCategory:
        try:
            numbers = np.array(x, np.float32)
        except (TypeError, ValueError):
            numbers = np.zeros(0, np.float32)
        if numbers.shape != (len(self.vocab),):
            raise DataError(f"{x!r:.200} is not one number for each of the {len(self.vocab)} classes {_listed(self.vocab)}")
        return torch.from_numpy(numbers).as_subclass(TensorMultiCategory)

    def decodes(self, x: TensorMultiCategory) -> MultiCategory:
        return MultiCategory(self.vocab[int(i)] for i in (x > 0.5).nonzero().flatten())


@dataclass
class OneHotEncode(Transform):
    """Indices, a `TensorCategory`, become one number a class of `c` classes; for pipelines of your own."""

    c: int

    def encodes(self, x: TensorCategory) -> TensorMultiCategory:
        return _one_hot(x.flatten().tolist(), self.c)

    def decodes(self, x: TensorMultiCategory) -> TensorCategory:
        return (x > 0.5).nonzero().flatten().as_subclass(TensorCategory)


def _one_hot(indices: Sequence[int], classes: int) -> TensorMultiCategory:
    encoded = torch.zeros(classes)
    encoded[list(indices)] = 1
    return encoded.as_subclass(TensorMultiCategory)


def MultiCategoryBlock(  # noqa: N802  fastai's name
    encoded: bool = False, vocab: Sequence[str] = (), sort: bool = True, add_na: bool = False
) -> TransformBlock:
    """A block of any number of labels a row: lists of names, or with `encoded` one 0 or 1 for each class of `vocab`."""
    if not encoded:
        return TransformBlock(type_tfms=(MultiCategorize(tuple(vocab), sort, add_na),))
    if not vocab:
        raise ValueError("encoded labels are numbers: name their classes, in order, with vocab=")
    return TransformBlock(type_tfms=(EncodedMultiCategorize(tuple(vocab)),))
