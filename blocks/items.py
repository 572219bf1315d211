"""Where items come from and what they are called: listing files, and reading a label from a path."""

import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path

from blocks.errors import DataError

IMAGE_EXTENSIONS = frozenset(ext for ext, kind in mimetypes.types_map.items() if kind.startswith("image/"))


def get_image_files(source: str | Path) -> list[Path]:
    """All image files below `source`, in sorted order. DataError when there is no such folder."""
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}: check the path")
    return sorted(_files(root, IMAGE_EXTENSIONS))


def _files(root: Path, extensions: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield Path(folder, name)


def parent_label(item: str | Path) -> str:
    """The name of the folder an item lies in."""
    return Path(item).parent.name
