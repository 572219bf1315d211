"""Storage by URL: what `s3://bucket/path`, `file:///path` or `memory://path` means, through pyarrow.fs, else through fsspec."""

import re

from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

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
