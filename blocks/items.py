"""Where items come from and what they are called: listing files, and getting an input or a label out of an item.

Getters and labellers are values with plain fields, so that they print, compare and count in a fingerprint.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blocks.errors import DataError
from blocks.files import list_files, under
from blocks.storage import is_url

# What PIL opens. Fixed here, because the machine's own table of types differs from one to the next.
IMAGE_EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "dib", "gif", "ico", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
TEXT_EXTENSIONS = frozenset({".txt"})


# --- files -------------------------------------------------------------------------------------------------------------


def get_files(
    source: str | Path,
    extensions: Collection[str] | None = None,
    *,
    recurse: bool = True,
    folders: Collection[str] | None = None,
) -> list[Path] | list[str]:
    """The files in the folder or at the URL `source` and below, in sorted order: paths, of a URL URLs. Hidden ones are skipped.

    extensions: the endings wanted, as in {".txt"}, in any case; None: all. recurse: in subfolders too; links are followed.
    folders: only in these subfolders of `source`, "." being `source` itself. DataError when there is no such folder.
    """
    wanted = None if extensions is None else frozenset(e.lower() for e in extensions)
    if is_url(str(source)):
        found = (path for path, _, _ in list_files(str(source), recursive=recurse))
        return [under(str(source), path) for path in found if _is_wanted(path, wanted, folders)]
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}: check the path")
    return sorted(_files(root, wanted, recurse, folders))


def get_image_files(
    source: str | Path, *, recurse: bool = True, folders: Collection[str] | None = None
) -> list[Path] | list[str]:
    """The image files in `source` and below, as `get_files`."""
    return get_files(source, IMAGE_EXTENSIONS, recurse=recurse, folders=folders)


def get_text_files(
    source: str | Path, *, recurse: bool = True, folders: Collection[str] | None = None
) -> list[Path] | list[str]:
    """The .txt files in `source` and below, as `get_files`."""
    return get_files(source, TEXT_EXTENSIONS, recurse=recurse, folders=folders)


@dataclass(frozen=True)
class FileGetter:
    """`get_files` with its settings, for `get_items`; `suf` is a subfolder of the source to look in."""

    suf: str = ""
    extensions: tuple[str, ...] | None = None
    recurse: bool = True
    folders: tuple[str, ...] | None = None

    def __call__(self, source: str | Path) -> list[Path] | list[str]:
        return get_files(under(source, self.suf), self.extensions, recurse=self.recurse, folders=self.folders)


@dataclass(frozen=True)
class ImageGetter:
    """`get_image_files` with its settings, for `get_items`; `suf` is a subfolder of the source to look in."""

    suf: str = ""
    recurse: bool = True
    folders: tuple[str, ...] | None = None

    def __call__(self, source: str | Path) -> list[Path] | list[str]:
        return get_image_files(under(source, self.suf), recurse=self.recurse, folders=self.folders)


def _files(root: Path, extensions: frozenset[str] | None, recurse: bool, folders: Collection[str] | None) -> Iterator[Path]:
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        within = PurePath(folder).relative_to(root)
        below = [s for s in subfolders if not s.startswith(".") and not _again(os.path.join(folder, s), seen)]
        subfolders[:] = below if recurse else []
        yield from (Path(folder, n) for n in names if _is_wanted(str(within / n), extensions, folders))


def _is_wanted(path: str, extensions: frozenset[str] | None, folders: Collection[str] | None) -> bool:
    # By its path below the source.
    parts = PurePath(path).parts
    at = parts[0] if len(parts) > 1 else "."
    hidden = any(part.startswith(".") for part in parts)
    ending = os.path.splitext(path)[1].lower()
    return not hidden and (extensions is None or ending in extensions) and (folders is None or at in folders)


def _again(folder: str, seen: set[str]) -> bool:
    # A link may lead back up; each real folder is listed once.
    real = os.path.realpath(folder)
    if real in seen:
        return True
    seen.add(real)
    return False


# --- labels of files ---------------------------------------------------------------------------------------------------


def path_of(item: str | PurePath) -> PurePath:
    """The path of a file; of a URL without the query, which may hold settings of the storage."""
    return PurePath(item.partition("?")[0] if isinstance(item, str) and is_url(item) else item)


def parent_label(item: str | PurePath) -> str:
    """The name of the folder an item lies in."""
    return path_of(item).parent.name


@dataclass(frozen=True)
class RegexLabeller:
    """What the first group of the pattern `pat` holds in an item's path, written with "/"; DataError when it is not found.

    match: only at the beginning of the path.
    """

    pat: str
    match: bool = False

    def __post_init__(self) -> None:
        if re.compile(self.pat).groups < 1:
            raise ValueError(f"the pattern {self.pat!r} has no group: put what is the label in parentheses")

    def __call__(self, item: str | PurePath) -> str:
        text = path_of(item).as_posix()
        found = (re.match if self.match else re.search)(self.pat, text)
        if found is None:
            raise DataError(f"the pattern {self.pat!r} is not found in {text!r}")
        return found.group(1)


# --- fields of rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemGetter:
    """Element `i` of an item: `item[i]`."""

    i: Any

    def __call__(self, item: Any) -> Any:
        return item[self.i]


@dataclass(frozen=True)
class AttrGetter:
    """The attribute `nm` of an item, or `default` where it has none."""

    nm: str
    default: Any = None

    def __call__(self, item: Any) -> Any:
        return getattr(item, self.nm, self.default)


@dataclass(frozen=True)
class ColReader:
    """The column `cols` of a row of a table, a tuple of several when `cols` names several.

    pref, suff: put before and after each value as text; a folder as `pref` is joined with "/". label_delim: the text is
    split at it into a list of labels, none when it is empty. An empty cell (None, NaN) stays None, and has no labels.
    """

    cols: str | int | tuple[str | int, ...]
    pref: str | PurePath = ""
    suff: str = ""
    label_delim: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cols, list):
            object.__setattr__(self, "cols", tuple(self.cols))
        if self.label_delim == "":
            raise ValueError("label_delim is what stands between two labels, so it cannot be empty; None: no labels to split")

    def __call__(self, row: Any) -> Any:
        if isinstance(self.cols, tuple):
            return tuple(self._read(row, c) for c in self.cols)
        return self._read(row, self.cols)

    def _read(self, row: Any, col: str | int) -> Any:
        value = cell(row, col)
        if value is None or (not hasattr(value, "__len__") and value != value):  # NaN
            return None if self.label_delim is None else []
        if self.pref or self.suff:
            value = f"{self._prefix}{value}{self.suff}"
        if self.label_delim is None:
            return value
        return str(value).split(self.label_delim) if str(value) else []

    @property
    def _prefix(self) -> str:
        return f"{self.pref.as_posix()}/" if isinstance(self.pref, PurePath) else self.pref

    def column(self, table: pa.Table) -> pa.Array:
        """What a call gives for each row of `table`, as one Arrow column, for one column of text or plain values.

        DataError when there is no such column; TypeError where only a call will do (several columns, numbers to be text).
        """
        if not self.has_column(table.schema):
            raise TypeError(f"{self} reads row by row only")
        values = table[self.cols].combine_chunks()
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if self.pref or self.suff:
            values = pc.binary_join_element_wise(self._prefix, values, self.suff, "")
        if self.label_delim is None:
            return values
        split = pc.split_pattern(values, self.label_delim)
        none = pa.scalar([], split.type)
        return pc.if_else(pc.fill_null(pc.equal(values, ""), True), none, split)

    def has_column(self, schema: pa.Schema) -> bool:
        """Whether `column` serves for tables of this schema. DataError when they have no such column."""
        if isinstance(self.cols, tuple):
            return False
        if isinstance(self.cols, str) and self.cols not in schema.names:
            raise DataError(f"there is no column {self.cols!r}; there are {', '.join(schema.names)}")
        kind = schema.field(self.cols).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return text or not (self.pref or self.suff or self.label_delim)


def cell(row: Any, col: str | int) -> Any:
    """The value of a row (a mapping, named tuple, sequence or object) in a column. DataError when it has none."""
    try:
        if isinstance(col, int) and isinstance(row, Mapping):
            return list(row.values())[col]
        if isinstance(col, str) and (isinstance(row, tuple) or not hasattr(row, "__getitem__")):
            return getattr(row, col)
        return row[col]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        names = getattr(row, "_fields", None) or (list(row.keys()) if hasattr(row, "keys") else None)
        there = f"; there are {', '.join(map(str, names))}" if names is not None else ""
        raise DataError(f"the row {row!r:.200} has no column {col!r}{there}") from error
