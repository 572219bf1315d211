"""`Prepared`: a plan carried out, as any process on any node opens it.

Shards lie in a folder of this machine, at a URL, or on the disks of the nodes that wrote them; from there each node fetches
each shard once. A process checks a shard against its checksum when it first maps it.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from blocks.cache import INDEX, Hold, folder_here, hold, kept_index, make_room
from blocks.errors import DataError
from blocks.plan import Encode
from blocks.shards import map_shard
from blocks.storage import delete, get, put, shown, sizes

_CHECKED: set[tuple[str, int, int]] = set()  # the files that this process found intact: path, size, time


class Others(Protocol):
    """The other machines of a cluster, on whose disks shards may lie."""

    def held(self, prepared: "Prepared") -> set[str]:
        """The files of those shards that another machine has."""
        ...

    def bring(self, prepared: "Prepared", number: int) -> None:
        """Write the file of a shard into this machine's folder: another one's copy, or made again where nobody has one."""
        ...


@dataclass(frozen=True)
class Prepared:
    """Shards, and an index that says what is in them.

    folder: of this machine: the shards, or its copies of those at `url` or of `others`.
    encode: the item side, with what its transforms learned from the data.
    reused: found under its fingerprint, nothing was decoded.
    """

    folder: Path
    index: dict[str, Any]
    encode: Encode
    reused: bool
    url: str | None = None
    others: Others | None = None

    @classmethod
    def open(
        cls, folder: Path, encode: Callable[[dict[str, Any]], Encode], reused: bool, url: str | None = None
    ) -> "Prepared | None":
        """The prepared data in a folder or at a URL; None when it is not there, or its index is damaged.

        encode: index -> the item side: `Plan.encode_of` of the plan that was carried out.
        """
        index = kept_index(url or folder)
        if index is None:
            return None
        if url is not None and kept_index(folder) != index:
            folder.mkdir(parents=True, exist_ok=True)
            put(folder, "index.json", get(url, "index.json"))
        prepared = cls(folder, index, encode(index), reused, url)
        try:
            prepared._held  # noqa: B018
        except FileNotFoundError:  # removed meanwhile
            return None
        return prepared

    @property
    def fingerprint(self) -> str:
        return self.index["fingerprint"]

    @property
    def rows(self) -> int:
        return sum(s["rows"] for s in self.index["shards"])

    @property
    def nbytes(self) -> int:
        """The size of all shards."""
        return sum(s["bytes"] for s in self.index["shards"])

    @property
    def fits_in_memory(self) -> bool:
        """Whether all its pages can stay in this machine's memory, so that its rows may be read in any order."""
        return self.nbytes <= memory()

    @property
    def where(self) -> str:
        """Where the shards are kept, for the person: a folder, or a URL without its keys."""
        return shown(self.url) if self.url else str(self.folder)

    def table(self, number: int) -> pa.Table:
        """One shard, memory-mapped; fetched first where this machine has no copy.

        DataError when it is damaged or missing: what is damaged is removed, so that the next run makes it again.
        """
        self._held  # noqa: B018  from the first shard on, this process uses the folder
        shard = self.index["shards"][number]
        path = self._path(shard)
        if (self.url is not None or self.others is not None) and not intact(path, shard):
            self._fetch(number)
        if not intact(path, shard):
            path.unlink(missing_ok=True)
            raise DataError(f"the shard {path} is damaged or missing: run the command again, and it is made again")
        return map_shard(path)

    def tables(self) -> list[pa.Table]:
        """The shards in order, memory-mapped."""
        return [self.table(number) for number in range(len(self.index["shards"]))]

    def drop(self, number: int) -> None:
        """This machine needs its copy of a shard no longer. Nothing happens where the shard itself is here."""
        if self.url is not None:
            self._path(self.index["shards"][number]).unlink(missing_ok=True)

    def damaged(self) -> list[int]:
        """The numbers of the shards that are missing or not what was written; at a URL, of those with another size.

        What is not as it should be here, but held by another machine, is not among them.
        """
        shards = self.index["shards"]
        if self.url is not None:
            found = sizes(self.url, [shard["file"] for shard in shards])
            return [i for i, (shard, size) in enumerate(zip(shards, found, strict=True)) if size != shard["bytes"]]
        with ThreadPoolExecutor(4) as pool:  # the checksum leaves Python's lock
            found_intact = pool.map(lambda shard: intact(self._path(shard), shard), shards)
            bad = [i for i, fine in enumerate(found_intact) if not fine]
        held = self.others.held(self) if bad and self.others is not None else set()
        return [i for i in bad if shards[i]["file"] not in held]

    def described(self) -> str:
        """Rows, bytes, shards and bad rows in one line."""
        bad = f", {len(self.index['bad_rows'])} bad rows left out" if self.index["bad_rows"] else ""
        return f"{self.rows} rows, {self.nbytes / 1e6:.1f} MB in {len(self.index['shards'])} Arrow shards{bad}, {self.where}"

    def _path(self, shard: dict[str, Any]) -> Path:
        return self.folder / shard["file"]

    def _fetch(self, number: int) -> None:
        shard = self.index["shards"][number]
        path = self._path(shard)
        path.parent.mkdir(exist_ok=True)
        lock = path.with_suffix(".lock")
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process of this machine may be fetching it
            if not intact(path, shard) and self.others is not None:
                self.others.bring(self, number)
            elif not intact(path, shard):
                put(path.parent, path.name, self._intact_content(shard))
            lock.unlink(missing_ok=True)  # who waited for it finds the shard

    def _intact_content(self, shard: dict[str, Any]) -> bytes:
        assert self.url is not None
        for _ in range(2):  # the line may be at fault
            content = get(self.url, shard["file"])
            if zlib.crc32(content) == shard["crc32"]:
                return content
        delete(self.url, shard["file"])
        raise DataError(
            f"the shard {shard['file']} at {shown(self.url)} is damaged: run the command again, and it is made again"
        )

    @cached_property
    def _held(self) -> Hold | None:
        held = hold(self.folder)
        if self.url is not None and held is not None:
            make_room(self.folder.parent)  # copies of other data may have to go
        return held

    def __getstate__(self) -> dict[str, Any]:
        # Another process takes its own hold, and another node has a folder of its own.
        return {k: v for k, v in self.__dict__.items() if k != "_held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if (self.url is not None or self.others is not None) and not self.folder.is_dir():
            self.__dict__["folder"] = folder_here(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            put(self.folder, INDEX, json.dumps(self.index, indent=1).encode())  # so that this node, too, is asked for them


def memory() -> int:
    """The bytes of memory that this machine has, or its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def intact(path: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is there and as its index says; read once a process, as long as the file does not change."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    if stat.st_size != shard["bytes"]:
        return False
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _CHECKED and stat.st_size:
        with pa.memory_map(str(path)) as content:
            if zlib.crc32(content.read_buffer()) != shard["crc32"]:
                return False
        _CHECKED.add(key)
    return True
