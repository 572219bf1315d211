"""Storage by URL: what `s3://bucket/path`, `file:///path` or `memory://path` means, through pyarrow.fs, else through fsspec."""

import contextlib
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from blocks.errors import UserError


def is_url(address: str) -> bool:
    """Whether `address` names a storage rather than a path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", address) is not None


def filesystem(url: str) -> tuple[FileSystem, str]:
    """The file system of a URL, and the path in it. UserError when no installed library knows its scheme.

    What a file system needs to know (`region`, `endpoint_override`, ...) stands in the URL's query, as pyarrow reads it.
    """
    import fsspec
    import pyarrow as pa

    try:
        return FileSystem.from_uri(url)
    except pa.ArrowInvalid as refused:
        if "Unrecognized filesystem type" not in str(refused):
            reason = str(refused).replace(url, shown(url))
            raise UserError(f"{shown(url)} is not a URL that can be used: {reason}") from None
    try:
        found, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as unknown:
        raise UserError(f"nothing installed can reach {shown(url)}: {unknown}") from unknown
    return PyFileSystem(FSSpecHandler(found)), path


def shown(url: str) -> str:
    """A URL without what it carries before the @ (keys) and after the ? (settings)."""
    return re.sub(r"//[^/@]*@", "//***@", url).partition("?")[0]


def joined(url: str, *names: str) -> str:
    """The URL of something below `url`."""
    base, question, query = url.partition("?")
    return "/".join([base.rstrip("/"), *names]) + question + query


def put(where: str | Path, name: str, content: Any) -> None:
    """Write bytes under a name in a folder or at a URL, where they appear only when they are whole."""
    with writing(where, name) as out:
        out.write(content)


@contextlib.contextmanager
def writing(where: str | Path, name: str) -> Iterator[Any]:
    """A file to write bytes to, under a name in a folder or at a URL, where it appears only when it is whole."""
    if not is_url(str(where)):
        path = Path(where, name)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb") as out:
                yield out
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    fs, base = filesystem(str(where))
    path_in = f"{base}/{name}"
    objects = fs.type_name in ("s3", "gcs", "abfs")  # there, what is written appears when it is closed; to move is to copy
    written = path_in if objects else f"{path_in}.{uuid.uuid4().hex}.partial"
    if not objects:
        fs.create_dir(path_in.rpartition("/")[0], recursive=True)
    with fs.open_output_stream(written) as out:
        yield out
    if not objects:
        fs.move(written, path_in)


def get(where: str | Path, name: str) -> bytes:
    """The content of a file in a folder or at a URL. FileNotFoundError when it is not there."""
    if not is_url(str(where)):
        return Path(where, name).read_bytes()
    fs, base = filesystem(str(where))
    with fs.open_input_stream(f"{base}/{name}") as source:
        return source.read()


def sizes(url: str, names: Sequence[str]) -> list[int | None]:
    """The size in bytes of each of some files at a URL, None where there is none."""
    fs, base = filesystem(url)
    infos = fs.get_file_info([f"{base}/{name}" for name in names])
    return [info.size if info.type == FileType.File else None for info in infos]


def folders(url: str) -> list[str]:
    """The names of the folders at a URL."""
    fs, base = filesystem(url)
    infos = fs.get_file_info(FileSelector(base, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == FileType.Directory)


def delete(url: str, name: str | None = None) -> None:
    """Delete the folder at a URL, or one file in it. Nothing happens when it is not there."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        if name is None:
            fs.delete_dir(path)
        else:
            fs.delete_file(f"{path}/{name}")
