"""Where rows come from. The driver knows a source by its pieces, small values that say where some rows are; a task reads one.

    a list of files or of anything   pieces are slices of the listing: one short row an item
    CSV, Parquet, DataFrame, Table   pieces are byte ranges, row groups, slices: never a row in the driver

So what the driver needs does not grow with the rows of a table.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from blocks.errors import DataError
from blocks.files import describe_files, filesystem_of, list_files, named, reading, stat_of, under
from blocks.rows import Rows
from blocks.storage import is_url, shown

TABLE_ENDINGS = (".parquet", ".csv", ".tsv")
RANGE_BYTES = 4_000_000  # of CSV
SPAN_ROWS = 65_536  # of a table in memory, or of a list


class Piece(Protocol):
    """Where some rows of a source are: the first one's position among all, and how many."""

    @property
    def first(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def blocks(self, most: int) -> Iterator[Rows]:
        """The rows in order, at most `most` at a time."""


class Source(Protocol):
    """What a plan reads. name: for the person; nbytes: what its files or tables hold."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """What a row is: files, items or rows."""

    @property
    def rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def identity(self) -> Any:
        """What of it has to be the same for the prepared data to be the same (`blocks.fingerprint`)."""

    def pieces(self, rows: int) -> list[Piece]:
        """All of it, in pieces of about `rows` rows."""


@dataclass(frozen=True)
class SourceItems(Sequence[Any]):
    """All items of a source, read piece by piece whenever they are asked for: what a splitter of all rows is given."""

    source: Source

    def __len__(self) -> int:
        return self.source.rows

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        position = range(len(self))[i]
        piece = next(p for p in self._pieces if p.first <= position < p.first + p.rows)
        return next(item for at, item in enumerate(_each(piece), piece.first) if at == position)

    def __iter__(self) -> Iterator[Any]:
        return (item for piece in self._pieces for item in _each(piece))

    @cached_property
    def _pieces(self) -> list[Piece]:
        return self.source.pieces(1024)


def _each(piece: Piece) -> Iterator[Any]:
    return (item for rows in piece.blocks(1024) for item in rows.each())


# --- lists -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListPiece:
    """A slice of a listing."""

    listing: pa.Table
    first: int
    pickled: bool

    @property
    def rows(self) -> int:
        return self.listing.num_rows

    def blocks(self, most: int) -> Iterator[Rows]:
        for start in range(0, self.rows, most):
            part = self.listing.slice(start, most)
            items = [self._item(i) for i in part["item"].to_pylist()]
            yield Rows(part["id"].combine_chunks(), items, self.first + start)

    def _item(self, item: Any) -> Any:
        if self.pickled:
            return pickle.loads(item)  # noqa: S301  the driver's own, of this run
        return item if is_url(item) else Path(item)

    def __reduce__(self) -> Any:
        return ListPiece._of, (as_ipc(self.listing), self.first, self.pickled)

    @staticmethod
    def _of(listing: bytes, first: int, pickled: bool) -> "ListPiece":
        return ListPiece(of_ipc(listing), first, pickled)


@dataclass(frozen=True, eq=False)
class ListSource:
    """A list of files, or of anything: one row of `listing` an item (id, item, size, mtime_ns)."""

    name: str
    listing: pa.Table
    pickled: bool

    @property
    def kind(self) -> str:
        return "items" if self.pickled else "files"

    @property
    def rows(self) -> int:
        return self.listing.num_rows

    @property
    def nbytes(self) -> int:
        return int(np.asarray(self.listing["size"]).sum())

    @property
    def identity(self) -> Any:
        # A file's content counts by its size and time, another item's by itself.
        items = [pickle.loads(i) for i in self.listing["item"].to_pylist()] if self.pickled else None  # noqa: S301  ours
        return self.listing.drop_columns(["item"]), items

    def pieces(self, rows: int) -> list[Piece]:
        return [ListPiece(self.listing.slice(i, rows), i, self.pickled) for i in range(0, self.rows, rows)]


def list_source(items: Sequence[Any], root: str | Path | None) -> ListSource:
    """Items as a source; those that are files (a Path, or text that is a URL) are called by their path relative to `root`."""
    files = bool(items) and all(isinstance(item, Path) or _named_by_url(item) for item in items)
    base = "" if root is None else str(root) if is_url(str(root)) else str(Path(root).absolute())
    known = {under(base, path): (size, time) for path, size, time in list_files(base)} if files and is_url(base) else {}
    # A stretch at a time, so that the driver holds little more of a file than its row of the listing.
    stretches = [range(start, min(start + SPAN_ROWS, len(items))) for start in range(0, max(1, len(items)), SPAN_ROWS)]
    listing = pa.concat_tables([_listed(items, of, base, known, files) for of in stretches]).combine_chunks()
    return ListSource(_shown(base) or "a list", listing, pickled=not files)


def _listed(items: Sequence[Any], of: range, base: str, known: dict[str, tuple[int, int]], files: bool) -> pa.Table:
    some = items[of.start : of.stop]
    stats = [known[item] if isinstance(item, str) and item in known else stat_of(item) for item in some]
    try:
        ids = pa.array([_relative(item, base) for item in some] if files else of, pa.string() if files else pa.int64())
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8: rename the file") from error
    return pa.table(
        {
            "id": ids,
            # Anything else travels as it is, from the driver to the tasks of the same run.
            "item": pa.array([str(i) for i in some], pa.string()) if files else pa.array(map(pickle.dumps, some), pa.binary()),
            "size": pa.array([size for size, _ in stats], pa.int64()),
            "mtime_ns": pa.array([mtime for _, mtime in stats], pa.int64()),
        }
    )


def _named_by_url(item: Any) -> bool:
    return isinstance(item, str) and len(item) < 4096 and "\n" not in item and is_url(item)


def _relative(file: str | Path, root: str) -> str:
    if isinstance(file, Path):
        whole = file.absolute()
        return whole.relative_to(root).as_posix() if root and whole.is_relative_to(root) else file.as_posix()
    start = root.partition("?")[0].rstrip("/") + "/"
    return file.removeprefix(start).partition("?")[0]


# --- tables ------------------------------------------------------------------------------------------------------------


class Span(Protocol):
    """Neighbouring rows of a table, where they lie."""

    @property
    def rows(self) -> int: ...

    def tables(self, most: int) -> Iterator[pa.Table]:
        """The rows in order, in tables of any size, none much larger than `most` rows where that can be helped."""


@dataclass(frozen=True)
class TablePiece:
    """Neighbouring spans of a table."""

    spans: tuple[Span, ...]
    first: int

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.spans)

    def blocks(self, most: int) -> Iterator[Rows]:
        start = self.first
        for table in _rechunked((t for s in self.spans for t in s.tables(most)), most):
            yield Rows(pa.array(np.arange(start, start + table.num_rows)), table, start)
            start += table.num_rows


@dataclass(frozen=True, eq=False)
class TableSource:
    """A table: its spans in order, and what identifies it (asked for when a fingerprint is wanted)."""

    name: str
    columns: tuple[str, ...]
    spans: tuple[Span, ...]
    nbytes: int
    identify: Callable[[], Any]
    kind: str = "rows"

    def __post_init__(self) -> None:
        _check_told_apart(self.name, self.columns)

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.spans)

    @property
    def identity(self) -> Any:
        return self.identify()

    def pieces(self, rows: int) -> list[Piece]:
        pieces: list[Piece] = []
        spans: list[Span] = []
        first = 0
        for span in self.spans:
            if spans and sum(s.rows for s in spans) + span.rows > rows:
                pieces.append(TablePiece(tuple(spans), first))
                first, spans = first + pieces[-1].rows, []
            spans.append(span)
        return [*pieces, TablePiece(tuple(spans), first)] if spans else pieces


def _rechunked(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    # Blocks end at the same rows wherever the tables do.
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += table.num_rows
        if held >= rows:
            joined = pa.concat_tables(waiting)
            whole = held // rows * rows
            yield from (joined.slice(start, rows).combine_chunks() for start in range(0, whole, rows))
            waiting, held = [joined.slice(whole)], held - whole
    if held:
        yield pa.concat_tables(waiting).combine_chunks()


@dataclass(frozen=True)
class ArrowSpan:
    """A slice of a table in memory."""

    table: pa.Table

    @property
    def rows(self) -> int:
        return self.table.num_rows

    def tables(self, most: int) -> Iterator[pa.Table]:
        yield self.table

    def __reduce__(self) -> Any:  # pickled as it is, a slice would take the whole table along
        return ArrowSpan._of, (as_ipc(self.table),)

    @staticmethod
    def _of(table: bytes) -> "ArrowSpan":
        return ArrowSpan(of_ipc(table))


def table_source(table: pa.Table, name: str) -> TableSource:
    """A table in memory."""
    rows = max(64, min(SPAN_ROWS, -(-table.num_rows // 8)))
    spans = tuple(ArrowSpan(table.slice(start, rows)) for start in range(0, table.num_rows, rows))
    return TableSource(name, tuple(table.column_names), spans, table.nbytes, lambda: table)


def _check_told_apart(name: str, columns: Sequence[str]) -> None:
    twice = sorted(column for column, n in Counter(columns).items() if n > 1)
    if twice:
        raise DataError(f"{name} has several columns called {', '.join(map(repr, twice))}: give each a name of its own")


def _mixed(frame: Any) -> str | None:
    # The first column of values of several types, and the rows of those that are few.
    for name in frame.columns:
        there = frame[name].reset_index(drop=True).dropna()
        kinds = there.map(lambda v: type(v).__name__)
        if there.dtype == object and kinds.nunique() > 1:
            most = kinds.mode()[0]
            odd = there[kinds != most]
            rows = ", ".join(map(str, odd.index[:3])) + (", ..." if len(odd) > 3 else "")
            return (
                f"the column {name!r} holds values of several types: {most}, and {len(odd)} other, such as {odd.iloc[0]!r:.80} "
                f"(row {rows}): give it values of one type"
            )
    return None


def frame_source(frame: Any) -> TableSource:
    """A pandas DataFrame; its index is left out. DataError for columns of one name, or of values of several types."""
    _check_told_apart("DataFrame", list(map(str, frame.columns)))
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except pa.ArrowException as error:
        raise DataError(f"{_mixed(frame) or f'the DataFrame cannot become an Arrow table: {error}'}") from error
    return table_source(table.replace_schema_metadata(None), "DataFrame")


@dataclass(frozen=True)
class ParquetSpan:
    """A row group of a Parquet file."""

    file: str
    group: int
    rows: int

    def tables(self, most: int) -> Iterator[pa.Table]:
        filesystem, path = filesystem_of(self.file)
        with reading(self.file), filesystem.open_input_file(path) as opened:
            parquet = pq.ParquetFile(opened)
            for batch in parquet.iter_batches(batch_size=min(most, SPAN_ROWS), row_groups=[self.group]):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def parquet_source(files: Sequence[str], name: str) -> TableSource:
    """Parquet files one after the other. DataError when one cannot be read or has other columns than the first."""
    spans: list[ParquetSpan] = []
    described = describe_files(files)
    schema: pa.Schema = None
    for file in files:
        filesystem, path = filesystem_of(file)
        with reading(file), filesystem.open_input_file(path) as opened:
            parquet = pq.ParquetFile(opened)
            metadata, found = parquet.metadata, parquet.schema_arrow.remove_metadata()
        schema = schema or found
        if found != schema:
            raise DataError(f"{named(file)} has other columns than {named(files[0])}: {_difference(found, schema)}")
        spans += [ParquetSpan(file, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
    listed = [(Path(f).name, *d) for f, d in zip(files, described, strict=True)]
    filled = tuple(s for s in spans if s.rows)
    return TableSource(name, tuple(schema.names), filled, sum(size for size, _ in described), lambda: listed)


def _difference(found: pa.Schema, wanted: pa.Schema) -> str:
    here, there = ({f.name: str(f.type) for f in schema} for schema in (found, wanted))
    odd = [
        *(f"{n!r} is missing" for n in there if n not in here),
        *(f"{n!r} is {here[n]}, not {there[n]}" for n in there if here.get(n, there[n]) != there[n]),
        *(f"{n!r} is new" for n in here if n not in there),
    ]
    return ", ".join(odd[:5]) or "they stand in another order"


@dataclass(frozen=True)
class CsvSpan:
    """Whole lines of a CSV file, by their byte range."""

    file: str
    start: int
    stop: int
    rows: int
    separator: str
    schema: pa.Schema

    def tables(self, most: int) -> Iterator[pa.Table]:
        filesystem, path = filesystem_of(self.file)
        with reading(self.file), filesystem.open_input_file(path) as opened:
            opened.seek(self.start)
            yield _parsed(opened.read(self.stop - self.start), self.separator, self.schema.names, self.schema)


def csv_source(files: Sequence[str], name: str) -> TableSource:
    """CSV files (a first line of names; empty cells are missing) one after the other; a column has one type in all of them.

    Each file is read through once, a range at a time, to find where rows begin and of which type the columns are.
    """
    described = describe_files(files)
    ranges: list[tuple[str, int, int, int, str]] = []
    schema: pa.Schema = None
    for file in files:
        separator = "\t" if _ending(file) == ".tsv" else ","
        filesystem, path = filesystem_of(file)
        with reading(file), filesystem.open_input_stream(path, compression=None) as opened:
            names: list[str] | None = None
            for start, stop, data in _whole_lines(opened):
                if names is None:
                    cut = _first_line(data)
                    names = pacsv.read_csv(pa.BufferReader(data[:cut]), parse_options=_lines(separator)).column_names
                    start, data = start + cut, data[cut:]
                found = _parsed(data, separator, names)
                if schema is not None and found.schema.names != schema.names:
                    raise DataError(
                        f"{named(file)} has other columns than {named(files[0])}: {_difference(found.schema, schema)}"
                    )
                schema = found.schema if schema is None else _common(schema, found.schema)
                if found.num_rows:
                    ranges.append((file, start, stop, found.num_rows, separator))
    if schema is None:
        raise DataError(f"{name!r} holds no rows")
    spans = tuple(CsvSpan(*r, schema) for r in ranges)
    listed = [(Path(f).name, *d) for f, d in zip(files, described, strict=True)]
    return TableSource(name, tuple(schema.names), spans, sum(size for size, _ in described), lambda: listed)


def _whole_lines(opened: Any) -> Iterator[tuple[int, int, bytes]]:
    # A newline ends a row when the number of quotes before it is even.
    start, held = 0, b""
    while read := opened.read(RANGE_BYTES):
        held += read
        data = np.frombuffer(held, np.uint8)
        ends = np.flatnonzero((data == ord("\n")) & (np.cumsum(data == ord('"')) % 2 == 0))
        if len(ends):
            cut = int(ends[-1]) + 1
            yield start, start + cut, held[:cut]
            start, held = start + cut, held[cut:]
    if held.strip():
        yield start, start + len(held), held + b"\n"


def _first_line(data: bytes) -> int:
    # Where the first line ends that is not empty.
    blank = len(data) - len(data.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n"))
    found = np.frombuffer(data, np.uint8)[blank:]
    ends = np.flatnonzero((found == ord("\n")) & (np.cumsum(found == ord('"')) % 2 == 0))
    return blank + int(ends[0]) + 1 if len(ends) else len(data)


def _lines(separator: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter=separator, newlines_in_values=True)


def _parsed(data: bytes, separator: str, names: list[str], schema: pa.Schema = None) -> pa.Table:
    if not data.strip(b"\r\n"):  # what Arrow takes for no CSV at all
        return pa.Table.from_arrays([pa.nulls(0)] * len(names), names)
    try:
        return pacsv.read_csv(
            pa.BufferReader(data),
            pacsv.ReadOptions(column_names=names, block_size=max(len(data), 1)),
            _lines(separator),
            pacsv.ConvertOptions(strings_can_be_null=True, column_types=schema),
        )
    except pa.ArrowInvalid as error:
        line = next((line for line in data.splitlines() if not _is_utf8(line)), None)
        if line is None:
            raise
        raise pa.ArrowInvalid(
            f"the line {line[:80]!r} is not UTF-8: convert the file, as in iconv -f latin1 -t utf-8"
        ) from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _common(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(a.name, _common_type(a.type, b.type)) for a, b in zip(one, other, strict=True)])


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


# --- which one ---------------------------------------------------------------------------------------------------------


def source_of(given: Any, root: Any) -> Source:
    """What `get_items` gave of the source `root`, as a source: a table, files of tables, or a list.

    DataError when it is a path without a table, or a kind of thing that holds no rows.
    """
    if isinstance(given, str | Path):
        return _table_files(given)
    if isinstance(given, pa.Table):
        return table_source(given.replace_schema_metadata(None), "Table")
    if type(given).__module__.partition(".")[0] == "pandas" and hasattr(given, "columns"):
        return frame_source(given)
    if hasattr(given, "pieces"):
        source: Source = given
        return source
    try:
        items = list(given)
    except TypeError as error:
        raise DataError(f"{type(given).__name__} holds no items: give a folder with get_items, files, or a table") from error
    if items and all(isinstance(i, str | Path) and _ending(i) in TABLE_ENDINGS for i in items):
        return _of_tables([str(i) for i in items], f"{len(items)} files")
    return list_source(items, root if isinstance(root, str | Path) else None)


def _shown(name: str) -> str:
    return shown(name) if is_url(name) else name


def _ending(file: str | Path) -> str:
    return Path(str(file).partition("?")[0]).suffix.lower()


def _table_files(path: str | Path) -> TableSource:
    if _ending(path) in TABLE_ENDINGS and (is_url(str(path)) or not Path(path).is_dir()):
        return _of_tables([str(path)], _shown(str(path)))
    found = [under(path, file) for file, _, _ in list_files(path) if _ending(file) in TABLE_ENDINGS]
    if not found:
        raise DataError(
            f"{named(path)} holds no table ({', '.join(TABLE_ENDINGS)}): name one, or say which files are the items with "
            "get_items, as in get_items=get_image_files"
        )
    return _of_tables(found, _shown(str(path)))


def _of_tables(files: list[str], name: str) -> TableSource:
    files = [f if is_url(f) else str(Path(f).absolute()) for f in files]
    kinds = {_ending(f) for f in files}
    if kinds == {".parquet"}:
        return parquet_source(files, name)
    if ".parquet" in kinds:
        raise DataError(f"{name!r} mixes {' and '.join(sorted(kinds))} files: give those of one kind")
    return csv_source(files, name)


def as_ipc(table: pa.Table) -> bytes:
    """A table as bytes; of a slice, only its rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def of_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
