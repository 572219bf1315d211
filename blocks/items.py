"""Where items come from and what they are called: listing files, and reading a label from a path."""

import os
from collections.abc import Iterator
from pathlib import Path

from blocks.errors import DataError

# What PIL opens. Fixed here, because the machine's own table of types differs from one to the next.
IMAGE_EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "dib", "gif", "ico", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


def get_image_files(source: str | Path) -> list[Path]:
    """All image files below `source`, in sorted order. DataError when there is no such folder."""
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}: check the path")
    return sorted(_files(root, IMAGE_EXTENSIONS))


def _files(root: Path, extensions: frozenset[str]) -> Iterator[Path]:
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and not _again(os.path.join(folder, s), seen)]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield Path(folder, name)


def _again(folder: str, seen: set[str]) -> bool:
    # A link may lead back up; each real folder is listed once.
    real = os.path.realpath(folder)
    if real in seen:
        return True
    seen.add(real)
    return False


def parent_label(item: str | Path) -> str:
    """The name of the folder an item lies in."""
    return Path(item).parent.name
