"""Which rows train and which validate.

A splitter sees some `Rows` and gives each its part. Most decide row by row, so they run wherever the rows are, and a row's
part depends on nothing else: not on the order, the number or the partitioning of the rows. Those that must see all rows at
once say so (`needs_all`). A function of the user's, from all items to two lists of positions, is a splitter as well.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blocks.draws import sample_keys
from blocks.errors import DataError
from blocks.items import path_of
from blocks.rows import Rows

TRAIN, VALID = 0, 1
LEFT_OUT = 2  # in neither part: counted and said, never stored


class Splitter:
    """Gives each row a part: TRAIN, VALID or LEFT_OUT. Called as in fastai, with all items, it gives two lists of positions."""

    @property
    def needs_all(self) -> bool:
        """Whether `parts` must see all rows of the source at once."""
        return False

    def parts(self, rows: Rows) -> np.ndarray:
        """The part of each row, uint8 (rows,)."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = [f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __call__(self, items: Sequence[Any]) -> tuple[list[int], list[int]]:
        """The positions of the items that train, and of those that validate. A text or a path is its own row id."""
        named = all(isinstance(item, str | PurePath) for item in items)
        parts = self.parts(Rows([str(i) for i in items] if named else range(len(items)), items))
        return np.flatnonzero(parts == TRAIN).tolist(), np.flatnonzero(parts == VALID).tolist()


def _short(value: Any) -> str:
    # For `explain()`: a function by its name, without its address; not every position.
    if isinstance(value, tuple) and len(value) > 5:
        return f"<{len(value)} values>"
    return getattr(value, "__name__", None) or repr(value)


@dataclass(frozen=True, repr=False)
class SplitBy(Splitter):
    """A function from all items to two lists of positions, as in fastai; rows in neither list are left out."""

    function: Callable[[Sequence[Any]], tuple[Sequence[int], Sequence[int]]]

    @property
    def needs_all(self) -> bool:
        return True

    def parts(self, rows: Rows) -> np.ndarray:
        train, valid = (np.asarray(part, np.int64).reshape(-1) for part in self.function(list(rows.each())))
        both = np.concatenate([train, valid])
        if len(np.unique(both)) < len(both) or (len(both) and not 0 <= both.min() <= both.max() < len(rows)):
            raise DataError(
                f"the splitter must put each of the {len(rows)} rows into at most one part, but gave {len(train)} training "
                f"and {len(valid)} validation rows, some twice or beyond the end"
            )
        parts = np.full(len(rows), LEFT_OUT, np.uint8)
        parts[train], parts[valid] = TRAIN, VALID
        return parts


def as_splitter(splitter: Any) -> Splitter:
    """A splitter as it is, a function of all items wrapped. TypeError for anything else."""
    if isinstance(splitter, Splitter):
        return splitter
    if isinstance(splitter, type) or not callable(splitter):
        raise TypeError(f"a splitter is one such as RandomSplitter(0.2), or a function of all items, not {splitter!r}")
    return SplitBy(splitter)


# --- by chance ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RandomSplitter(Splitter):
    """A share `valid_pct` of the rows, drawn by a hash of (seed, row id), validates.

    The share holds within sampling error: about 1.96 * sqrt(p * (1 - p) / n). With `stratify`, a function from item to class
    (`parent_label`, `ColReader("species")`), it holds to the row within each class, whose last row never validates.
    """

    valid_pct: float = 0.2
    seed: int = 42
    stratify: Callable[[Any], Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_share("valid_pct", self.valid_pct)

    @property
    def needs_all(self) -> bool:
        return self.stratify is not None

    def parts(self, rows: Rows) -> np.ndarray:
        hashes = _hashes(rows.ids, self.seed)
        if self.stratify is None:
            return (hashes < _below(self.valid_pct)).astype(np.uint8)
        return _lowest_of_each(hashes, [self.stratify(item) for item in rows.each()], self.valid_pct)


@dataclass(frozen=True, repr=False)
class TrainTestSplitter(Splitter):
    """Exactly the share `test_size` of the rows (or so many, when it is a whole number) validates; scikit-learn's words.

    stratify: a function from item to class; the share then holds in each class. The rows are those with the lowest hashes of
    (random_state, row id), so a row's part depends on the other rows, but not on their order.
    """

    test_size: float | int = 0.2
    random_state: int = 42
    stratify: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.test_size, int) and self.test_size > 0:
            return
        _check_share("test_size", self.test_size)

    @property
    def needs_all(self) -> bool:
        return True

    def parts(self, rows: Rows) -> np.ndarray:
        share = self.test_size if isinstance(self.test_size, float) else min(self.test_size / max(1, len(rows)), 1.0)
        classes = [None] * len(rows) if self.stratify is None else [self.stratify(item) for item in rows.each()]
        return _lowest_of_each(_hashes(rows.ids, self.random_state), classes, share)


@dataclass(frozen=True, repr=False)
class RandomSubsetSplitter(Splitter):
    """The shares `train_sz` and `valid_sz` of the rows, drawn by a hash of (seed, row id); the rest is left out."""

    train_sz: float
    valid_sz: float
    seed: int = 42

    def __post_init__(self) -> None:
        _check_share("train_sz", self.train_sz)
        _check_share("valid_sz", self.valid_sz)
        if self.train_sz + self.valid_sz > 1:
            raise ValueError(f"train_sz + valid_sz is at most 1, not {self.train_sz} + {self.valid_sz}")

    def parts(self, rows: Rows) -> np.ndarray:
        # The rows that validate are RandomSplitter(valid_sz)'s: a larger training share only adds rows.
        hashes = _hashes(rows.ids, self.seed)
        parts = np.full(len(rows), LEFT_OUT, np.uint8)
        parts[hashes < _below(self.train_sz + self.valid_sz)] = TRAIN
        parts[hashes < _below(self.valid_sz)] = VALID
        return parts


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} is a share between 0 and 1, not {share!r}")


def _below(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2**64), 2**64 - 1))


def _hashes(ids: Any, seed: int) -> np.ndarray:
    # uint64 (rows,), of numbers in one go, of texts one by one.
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = ids.to_numpy() if pa.types.is_integer(ids.type) else ids.to_pylist()
    if len(ids) and isinstance(ids[0], int | np.integer):
        return sample_keys(seed, -1, np.array(ids, np.int64)).numpy().view(np.uint64)  # -1: no epoch of the feed's
    key = seed.to_bytes(16, "little", signed=True)
    return np.fromiter((_hash(i, key) for i in ids), np.uint64, len(ids))


def _hash(row_id: str, key: bytes) -> int:
    encoded = row_id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, key=key, digest_size=8).digest(), "little")


def _lowest_of_each(hashes: np.ndarray, classes: Sequence[Any], share: float) -> np.ndarray:
    # In each class the rows with the lowest hashes validate, but never its only one.
    parts = np.zeros(len(hashes), np.uint8)
    of_class: dict[Any, list[int]] = {}
    for position, label in enumerate(classes):
        of_class.setdefault(label, []).append(position)
    for members in of_class.values():
        validating = min(round(share * len(members)), len(members) - 1)
        order = np.asarray(members)[np.argsort(hashes[members], kind="stable")]
        parts[order[:validating]] = VALID
    return parts


# --- by position -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class IndexSplitter(Splitter):
    """The rows at the positions `valid_idx` validate."""

    valid_idx: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "valid_idx", tuple(int(i) for i in self.valid_idx))

    def parts(self, rows: Rows) -> np.ndarray:
        total = len(rows) if rows.total is None else rows.total
        outside = [i for i in self.valid_idx if not 0 <= i < total]
        if outside:
            raise DataError(f"IndexSplitter names the position {outside[0]}, but the source has {total} rows, from 0 on")
        return np.isin(rows.positions, self.valid_idx).astype(np.uint8)


@dataclass(frozen=True, repr=False)
class EndSplitter(Splitter):
    """The last share `valid_pct` of the rows validates, the first when `valid_last` is False: for what is in order of time."""

    valid_pct: float = 0.2
    valid_last: bool = True

    def __post_init__(self) -> None:
        _check_share("valid_pct", self.valid_pct)

    def parts(self, rows: Rows) -> np.ndarray:
        total = len(rows) if rows.total is None else rows.total
        validating = int(self.valid_pct * total)
        valid = rows.positions >= total - validating if self.valid_last else rows.positions < validating
        return valid.astype(np.uint8)


@dataclass(frozen=True, repr=False)
class MaskSplitter(Splitter):
    """The rows for which `mask` is true validate; it has one value a row."""

    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", tuple(bool(m) for m in self.mask))

    def parts(self, rows: Rows) -> np.ndarray:
        total = len(rows) if rows.total is None else rows.total
        if len(self.mask) != total:
            raise DataError(f"MaskSplitter has {len(self.mask)} values, but the source has {total} rows: one for each")
        return np.asarray(self.mask[rows.first : rows.first + len(rows)], np.uint8)


# --- by what the item is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class GrandparentSplitter(Splitter):
    """The folder above an item's folder says its part, as in train/cat/1.png; items of other folders are left out.

    train_name, valid_name: the folder's name, or several.
    """

    train_name: str | tuple[str, ...] = "train"
    valid_name: str | tuple[str, ...] = "valid"

    def parts(self, rows: Rows) -> np.ndarray:
        named: dict[str, int] = {}
        for names, part in ((self.train_name, TRAIN), (self.valid_name, VALID)):
            named |= dict.fromkeys((names,) if isinstance(names, str) else names, part)
        folders = (path_of(item).parent.parent.name for item in rows.each())
        return np.fromiter((named.get(folder, LEFT_OUT) for folder in folders), np.uint8, len(rows))


@dataclass(frozen=True, repr=False)
class FuncSplitter(Splitter):
    """The items for which `func` is true validate."""

    func: Callable[[Any], Any]

    def parts(self, rows: Rows) -> np.ndarray:
        return np.fromiter((bool(self.func(item)) for item in rows.each()), np.uint8, len(rows))


@dataclass(frozen=True, repr=False)
class FileSplitter(Splitter):
    """The files whose names are listed in the text file `fname`, one a line, validate. It is read once, here."""

    fname: str | Path
    names: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lines = Path(self.fname).read_text(encoding="utf-8").splitlines()
        object.__setattr__(self, "names", frozenset(filter(None, map(str.strip, lines))))

    def parts(self, rows: Rows) -> np.ndarray:
        return np.fromiter((path_of(item).name in self.names for item in rows.each()), np.uint8, len(rows))


@dataclass(frozen=True, repr=False)
class ColSplitter(Splitter):
    """The rows whose column `col` is true validate; with `on`, those where it has that value, or one of those values."""

    col: str = "is_valid"
    on: Any = None

    def parts(self, rows: Rows) -> np.ndarray:
        column = rows.column(self.col)
        if not len(column):
            return np.zeros(0, np.uint8)
        if pa.types.is_dictionary(column.type):  # a pandas Categorical
            column = column.dictionary_decode()
        if column.null_count:
            raise DataError(f"the column {self.col!r}, which splits the rows, is empty in {column.null_count} of them")
        if self.on is None:
            if not (pa.types.is_boolean(column.type) or pa.types.is_integer(column.type)):
                raise DataError(f"the column {self.col!r} holds {column.type}, not true and false: name the values with on=")
            return np.asarray(pc.cast(column, pa.bool_()).to_numpy(zero_copy_only=False), np.uint8)
        wanted = self.on if isinstance(self.on, list | tuple | set | frozenset) else (self.on,)
        try:
            values = pa.array(list(wanted), column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"the column {self.col!r} holds {column.type}, so on={self.on!r} is none of its values") from error
        chosen = pc.is_in(column, value_set=values)
        return np.asarray(chosen.to_numpy(zero_copy_only=False), np.uint8)


@dataclass(frozen=True, repr=False)
class TimeSplitter(Splitter):
    """The latest share `valid_pct` of the rows, by the column `col`, validates: nothing is learned from what came later.

    Rows of one time stay together, in the validation part where they reach into it. DataError for a row without a time.
    """

    col: str
    valid_pct: float = 0.2

    def __post_init__(self) -> None:
        _check_share("valid_pct", self.valid_pct)

    @property
    def needs_all(self) -> bool:
        return True

    def parts(self, rows: Rows) -> np.ndarray:
        times = rows.column(self.col)
        if times.null_count:
            raise DataError(f"the column {self.col!r}, which splits the rows by time, is empty in {times.null_count} of them")
        if not len(times):
            return np.zeros(0, np.uint8)
        latest = pc.sort_indices(times, sort_keys=[("", "descending")])[max(0, int(self.valid_pct * len(times)) - 1)]
        return pc.greater_equal(times, times[latest.as_py()]).to_numpy(zero_copy_only=False).astype(np.uint8)
