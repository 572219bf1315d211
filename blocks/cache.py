"""Where prepared data are kept, and for how long: folders by fingerprint, the least recently used removed first.

A process that uses a folder holds a shared lock on a file in it. The system releases that lock when the process ends, however
it ends, so a folder nobody holds is one that may go, and what a dead run left unfinished is known by the same sign.
"""

import atexit
import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from blocks.errors import DataError, UserError
from blocks.storage import delete, folders, get, is_url, joined, put, shown

Cache = Literal["disk", "memory", "off"]

INDEX, USED, REMOTE = "index.json", "used", "remote"
FORMAT = 1  # of the index; data of another one is prepared again
IN_MEMORY = Path("/dev/shm")  # a tmpfs on every Linux


def cache_folder() -> Path:
    """This machine's folder for prepared and example data: $FASTRAY_CACHE when that is a folder, else ~/.cache/fastray."""
    place = os.environ.get("FASTRAY_CACHE") or ""
    return Path("~/.cache/fastray" if is_url(place) or not place else place).expanduser().absolute()


def cache_url() -> str | None:
    """The storage that keeps prepared data for all nodes: $FASTRAY_CACHE when that is a URL."""
    place = os.environ.get("FASTRAY_CACHE") or ""
    return place if is_url(place) else None


@dataclass(frozen=True)
class Place:
    """home: the folder of this machine that holds a folder for each prepared data set, or its copies from `url`."""

    home: Path
    url: str | None = None


def place_of(cache: str) -> Place:
    """Where `cache` ("disk", "memory" or "off") keeps things. UserError for another word, or without a folder in memory."""
    if cache not in ("disk", "memory", "off"):
        raise UserError(f'cache is "disk", "memory" or "off", not {cache!r}')
    url = cache_url()
    home = cache_folder() if cache != "memory" else memory_folder()
    return Place(home / "prepared", url and joined(url, "prepared"))


def folder_here(folder: Path) -> Path:
    """What stands on this machine for a folder of prepared data: itself, or on another machine's disk its namesake."""
    if folder.is_dir():
        return folder
    home = memory_folder() if folder.is_relative_to(IN_MEMORY) else cache_folder()
    return home / "prepared" / folder.name


def memory_folder() -> Path:
    """This user's folder in memory. UserError when there is none that can be written."""
    if not os.access(IN_MEMORY, os.W_OK):
        raise UserError(f'cache="memory" needs a writable tmpfs at {IN_MEMORY}, which is not there: use cache="disk"')
    return IN_MEMORY / f"fastray-{os.getuid()}"


# --- holding -----------------------------------------------------------------------------------------------------------


class Hold:
    """While it lives, the folder is in use and stays. FileNotFoundError when it is gone already."""

    def __init__(self, folder: Path):
        path = folder / USED
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, number)
        fcntl.flock(number, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(number), path.stat()):  # removed while we waited
            raise FileNotFoundError(path)
        os.utime(number)


def hold(folder: Path) -> Hold | None:
    """A hold on a folder; None where nothing can be written or locked, because then nobody removes it either."""
    try:
        return Hold(folder)
    except FileNotFoundError:
        raise
    except OSError:
        return None


def in_use(folder: Path) -> bool:
    """Whether a live process holds `folder`, or nobody can tell."""
    try:
        number = os.open(folder / USED, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(number)
    return False


def remove(folder: Path) -> bool:
    """Remove a folder of prepared data unless a live process uses it, or its storage cannot be reached; whether it is gone."""
    number = None
    try:
        with contextlib.suppress(FileNotFoundError):
            number = os.open(folder / USED, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(folder)
    except (OSError, UserError):
        return False
    finally:
        if number is not None:
            os.close(number)
    return True


def discard(folder: Path) -> None:
    """Remove a folder and what it stands for at a URL, whoever uses it."""
    gone = folder.with_name(f".gone-{uuid.uuid4().hex}")  # from here on nobody finds it half removed
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    with contextlib.suppress(FileNotFoundError):
        delete((gone / REMOTE).read_text())
    shutil.rmtree(gone, ignore_errors=True)


def sweep(home: Path) -> None:
    """Remove what runs that have ended left behind: unfinished work, and what was to live as long as its run."""
    for folder in home.glob(".*"):
        remove(folder)


# --- making ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfinished:
    """Where the shards of a plan that is being carried out are written.

    where: the folder or URL. folder: this machine's, held for as long as this lives. lasting: whether a later run may find it.
    """

    place: Place
    fingerprint: str
    lasting: bool
    folder: Path
    where: str
    held: Hold

    @property
    def name(self) -> str:
        """What the folder is called once it is finished."""
        return self.fingerprint if self.lasting else self.folder.name

    def finish(self, index: dict[str, Any]) -> Path:
        """Keep what was written, described by `index`: the folder of this machine that now stands for it.

        The same data finished by another run in the meantime is as good, and stays.
        """
        index = {"format": FORMAT, "fingerprint": self.fingerprint, **index}
        if self.place.url is not None:
            home, run = joined(self.place.url, self.name), self.folder.name
            index["shards"] = [s | {"file": f"{run}/{s['file']}"} for s in index["shards"]]
            if self.lasting:
                (self.folder / REMOTE).unlink()
            there = kept_index(home) if self.lasting else None
            if there is None:
                put(home, INDEX, json.dumps(index).encode())
            else:
                delete(self.where)
                index = there
        put(self.folder, INDEX, json.dumps(index, indent=1).encode())
        if not self.lasting:
            atexit.register(discard, self.folder)
            return self.folder
        return self._stand_under_its_name()

    def _stand_under_its_name(self) -> Path:
        final = self.place.home / self.fingerprint
        try:
            self.folder.rename(final)
        except OSError:  # there is one of that name
            if self.place.url is not None or kept_index(final) is None:  # not what it should be: ours in its stead
                for file in sorted(self.folder.iterdir(), key=lambda f: f.name == INDEX):
                    if file.name not in (USED, REMOTE):
                        file.replace(final / file.name)
        return final


@contextlib.contextmanager
def unfinished(place: Place, fingerprint: str, lasting: bool) -> Iterator[Unfinished]:
    """A place to carry out a plan in; what is not finished when the block ends, or its process, is removed."""
    place.home.mkdir(parents=True, exist_ok=True)
    sweep(place.home)
    new = place.home / f"new-{uuid.uuid4().hex}"
    new.mkdir()
    held = Hold(new)
    folder = new.rename(place.home / f".{fingerprint}-{uuid.uuid4().hex[:8]}")  # held before a sweep can see it
    where = str(folder)
    if place.url is not None:
        name = fingerprint if lasting else folder.name
        where = joined(place.url, name, folder.name)
        (folder / REMOTE).touch(mode=0o600)  # a URL may carry keys
        (folder / REMOTE).write_text(where if lasting else joined(place.url, name))
    made = Unfinished(place, fingerprint, lasting, folder, where, held)
    try:
        yield made
    finally:
        if lasting or not (folder / INDEX).exists():
            discard(folder)


def kept_index(where: str | Path) -> dict[str, Any] | None:
    """The index of the prepared data in a folder or at a URL; None when there is none, or none that can be used.

    DataError when it names a file outside its folder.
    """
    try:
        index = json.loads(get(where, INDEX))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        warnings.warn(f"the index of {shown(str(where))} is damaged: the data is prepared again", stacklevel=2)
        return None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return None
    for shard in index["shards"]:
        path = PurePosixPath(shard["file"])
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"the index of {shown(str(where))} names {shard['file']!r}, a file outside of it: it is not one of ours. "
                "Remove that folder"
            )
    return index


# --- room --------------------------------------------------------------------------------------------------------------


def make_room(home: Path) -> None:
    """Remove the least recently used data that nobody uses, until what is left fits the limit ($FASTRAY_CACHE_LIMIT).

    Without the variable the limit is half of what the disk could give: its free space and what is here already.
    """
    sizes_here = {folder: size_of(folder) for folder in home.iterdir()}
    total = sum(sizes_here.values())
    limit = limit_for(home, total)
    for folder in sorted(sizes_here, key=last_used):
        if total <= limit:
            return
        if remove(folder):
            total -= sizes_here[folder]
    if total > limit:
        warnings.warn(
            f"prepared data in use takes {total / 1e9:.1f} GB in {home}, more than the limit of {limit / 1e9:.1f} GB: "
            "set $FASTRAY_CACHE_LIMIT to allow more",
            stacklevel=2,
        )


def limit_for(home: Path, used: int) -> int:
    """How many bytes prepared data may take in `home`. UserError when $FASTRAY_CACHE_LIMIT is no size."""
    text = os.environ.get("FASTRAY_CACHE_LIMIT", "")
    if not text:
        return (shutil.disk_usage(home).free + used) // 2
    read = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B", text.strip())
    if read is None:
        raise UserError(f"$FASTRAY_CACHE_LIMIT is a size such as 50GB or 800MB, not {text!r}")
    return int(float(read[1]) * 1000 ** " kMGT".index(read[2] or " "))


def size_of(folder: Path) -> int:
    """The bytes of the files in a folder and its subfolders; another process may be removing it."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def last_used(folder: Path) -> float:
    """When a process last took hold of `folder`, in seconds since 1970."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / USED).stat().st_mtime
    with contextlib.suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


# --- for the person ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """One prepared data set that is kept. size: in bytes. used: when it was last used. in_use: None where nobody can tell."""

    fingerprint: str
    where: str
    source: str
    rows: int
    size: int
    used: float | None
    in_use: bool | None


def kept_data() -> list[Kept]:
    """What is kept on this machine's disk and in its memory, and at the URL of $FASTRAY_CACHE."""
    found = []
    for home in (cache_folder() / "prepared", IN_MEMORY / f"fastray-{os.getuid()}" / "prepared"):
        for folder in sorted(home.iterdir()) if home.is_dir() else []:
            index = kept_index(folder)
            if index is not None:
                found.append(_kept(index, str(folder), size_of(folder), last_used(folder), in_use(folder)))
    url = cache_url()
    shared = [joined(url, "prepared", name) for name in folders(joined(url, "prepared"))] if url else []
    for where in shared:
        index = kept_index(where)
        if index is not None:
            found.append(_kept(index, where, sum(s["bytes"] for s in index["shards"]), None, None))
    return found


def _kept(index: dict[str, Any], where: str, size: int, used: float | None, busy: bool | None) -> Kept:
    rows = sum(shard["rows"] for shard in index["shards"])
    return Kept(index["fingerprint"], where, index["source"], rows, size, used, busy)


def clear(fingerprint: str | None = None, older_than_days: float | None = None) -> tuple[list[Kept], list[Kept]]:
    """Remove kept data: all that nobody uses, one fingerprint, or what was not used for so many days.

    Returns what was removed, and what was asked for but stays. What is kept at a URL goes only by its fingerprint: other
    machines may be using it. UserError when there is nothing of that fingerprint.
    """
    all_kept = kept_data()
    asked = [k for k in all_kept if fingerprint in (None, k.fingerprint)]
    if fingerprint is not None and not asked:
        raise UserError(f"no prepared data {fingerprint!r} is kept: `fastray cache ls` lists what is")
    if older_than_days is not None:
        asked = [k for k in asked if k.used is not None and time.time() - k.used > older_than_days * 86400]
    removed = []
    for kept in asked:
        if not is_url(kept.where):
            gone = remove(Path(kept.where))
        else:
            gone = fingerprint is not None
            if gone:
                delete(kept.where)
        if gone:
            removed.append(kept)
    return removed, [k for k in asked if k not in removed]
