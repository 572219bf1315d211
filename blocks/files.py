"""Files by path or URL: listed, described and read through pyarrow's file systems, or fsspec's where pyarrow has none."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, PyFileSystem

from blocks.errors import DataError
from blocks.storage import filesystem, is_url, shown

BUCKETS = ("s3", "gs", "gcs")


def filesystem_of(source: str | Path) -> tuple[FileSystem, str]:
    """The file system of a path or URL, and the path in it."""
    if not (isinstance(source, str) and is_url(source)):
        return LocalFileSystem(), str(Path(source).expanduser().absolute())
    url = urlsplit(source)
    if url.scheme not in BUCKETS:
        return filesystem(source)
    # Connecting to a bucket costs requests: once for all its files. The path is the text between server and query.
    return _bucket(f"{url.scheme}://{url.netloc}/?{url.query}".rstrip("?")), source.partition("://")[2].partition("?")[0]


@lru_cache(maxsize=32)
def _bucket(url: str) -> FileSystem:
    return filesystem(url)[0]


def under(root: str | Path, path: str) -> str:
    """The URL or path of what lies below `root` at `path`."""
    if not is_url(str(root)):
        return str(Path(root, path))
    base, mark, query = str(root).partition("?")
    return f"{base.rstrip('/')}/{path}{mark}{query}"


def list_files(root: str | Path, recursive: bool = True) -> list[tuple[str, int, int]]:
    """(path relative to `root`, bytes, time of change in ns) of each file below it, sorted. DataError when it is not there."""
    filesystem, path = filesystem_of(root)
    try:
        found = filesystem.get_file_info(FileSelector(path, recursive=recursive))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{named(root)} cannot be listed: {error}") from error
    files = (f for f in found if f.type == FileType.File)
    return sorted((str(PurePosixPath(f.path).relative_to(path)), f.size or 0, _changed(filesystem, f)) for f in files)


def describe_files(files: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, time of change in ns) of each path or URL; DataError when one is no file."""
    described = []
    for file in files:
        filesystem, path = filesystem_of(file)
        with reading(file):
            info = filesystem.get_file_info(path)
        if info.type != FileType.File:
            raise DataError(f"there is no file {named(file)}: check the path")
        described.append((info.size or 0, _changed(filesystem, info)))
    return described


def _changed(filesystem: FileSystem, info: FileInfo) -> int:
    # The time of change in ns. Of fsspec's file systems pyarrow learns none: a number by all that they know of the file.
    if info.mtime_ns is not None or not isinstance(filesystem, PyFileSystem):
        return info.mtime_ns or 0
    key = str(filesystem.handler.fs.ukey(info.path))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")


def named(file: str | Path) -> str:
    """A path or URL for an error message, without the keys that a URL may carry."""
    return repr(shown(str(file)) if is_url(str(file)) else str(file))


def read_bytes(file: str | Path) -> bytes:
    """The whole content of a path or URL. OSError when it cannot be read."""
    if not is_url(str(file)):
        return Path(file).read_bytes()
    filesystem, path = filesystem_of(file)
    with filesystem.open_input_stream(path, compression=None) as opened:
        return opened.read()


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except (OSError, pa.ArrowException, EOFError) as error:
        raise DataError(f"{named(file)} cannot be read: {error}") from error


def stat_of(item: Any, longest: int = 4096) -> tuple[int, int]:
    """(bytes, time of change in ns) of a local file. Zeros for one that is not there, which is found out when it is read."""
    if isinstance(item, Path) or (isinstance(item, str) and len(item) < longest):
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(item)
            return found.st_size, found.st_mtime_ns
    return 0, 0
