"""`get_data`: the paper's "get the data and untar it". What comes from elsewhere is checked, and unpacked as a stranger's.

An archive may name any path, link or size it likes, so each entry is looked at: only files, folders, and links that stay
inside, into a fresh folder, links last so that nothing is written through one, and not without bound.
"""

import calendar
import contextlib
import hashlib
import http.client
import lzma
import os
import posixpath
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from tqdm import tqdm

from blocks.cache import cache_folder
from blocks.errors import DataError, UserError
from blocks.storage import filesystem, is_url, shown

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
HASHES = ("sha256", "md5")

# An archive of more than this, and more than so many times its own size, is taken for a bomb: texts shrink 5 to 20 times.
BOMB_BYTES, BOMB_RATIO = 1_000_000_000, 100

CHUNK = 1 << 20
SECONDS = 60  # without a byte, after which a server counts as gone


def get_data(url: str | Path, hash: str | None = None, folder: str | Path | None = None) -> Path:  # noqa: A002
    """The local file or folder of the data at `url`: fetched once, checked, and unpacked when its name is an archive's.

    url: https, http, any URL of pyarrow.fs or fsspec (s3://, gs://, ...), file:// or a local path. A local folder or file
    that is no archive is used where it is. hash: "sha256:..." or "md5:..." of the file; without one, what comes over the
    network is not checked, and a warning says so, and what the hash was. folder: where to keep it; None: $FASTRAY_CACHE/data.

    Returns the file, or the unpacked folder (the only folder in it, where there is just one). What is there already is not
    fetched again, even when the server has something newer. UserError when it cannot be fetched; DataError when the hash is
    another, or the archive is damaged or not safe to unpack.
    """
    text = str(url)
    local = _local_path(text)
    if local is not None:
        if not local.exists():
            raise UserError(f"there is no {str(local)!r}: check the path")
        if local.is_dir():
            return local
    name = posixpath.basename(urllib.parse.urlsplit(text).path if local is None else local.as_posix()) or "data"
    ending = next((e for e in sorted(ARCHIVES, key=len, reverse=True) if name.lower().endswith(e)), None)
    if local is not None and ending is None:
        _check_hash(text, local, hash)
        return local
    home = Path(folder) if folder is not None else cache_folder() / "data"
    stem = name[: -len(ending)] if ending else name
    # A local archive is another one once it has changed.
    key = f"{text} {hash}" if local is None else f"{local.absolute()} {local.stat().st_size} {local.stat().st_mtime_ns} {hash}"
    place = home / f"{stem}-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    if not place.exists():
        with _fresh_folder(home) as fresh:
            file = local
            if file is None:
                file = fresh / "fetched"
                _fetch(text, file)
            found = _check_hash(text, file, hash)
            if hash is None and local is None:
                warnings.warn(f'{shown(text)} is not checked; give hash="{found}" to have it so', stacklevel=2)
            contents = fresh / "contents"
            contents.mkdir()
            if ending is None:
                file.rename(contents / name)
            else:
                _unpack(file, ending, contents)
            try:
                contents.rename(place)
            except OSError:  # another process was here first, and its result is as good
                if not place.exists():
                    raise
    entries = list(place.iterdir())
    return entries[0] if len(entries) == 1 and (ending is None or entries[0].is_dir()) else place


def _local_path(url: str) -> Path | None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return None if is_url(url) else Path(url).expanduser()


@contextlib.contextmanager
def _fresh_folder(home: Path) -> Iterator[Path]:
    fresh = home / f".{uuid.uuid4().hex}"
    fresh.mkdir(parents=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_hash(url: str, file: Path, wanted: str | None) -> str:
    # The hash of the file by the algorithm wanted, as "sha256:...".
    algorithm, _, digits = (wanted or "sha256:").partition(":")
    if algorithm not in HASHES or (wanted is not None and not digits):
        raise UserError(f"hash is written {' or '.join(f'{h}:<hex digits>' for h in HASHES)}, not {wanted!r}")
    with file.open("rb") as opened:
        found = f"{algorithm}:{hashlib.file_digest(opened, algorithm).hexdigest()}"
    if wanted is not None and found != f"{algorithm}:{digits.lower()}":
        raise DataError(f"{shown(url)} has the hash {found}, not {wanted}: it is damaged, or another version; nothing is kept")
    return found


# --- fetching ----------------------------------------------------------------------------------------------------------


def _fetch(url: str, file: Path) -> None:
    if urllib.parse.urlsplit(url).scheme in ("http", "https"):
        _fetch_http(url, file)
        return
    try:
        system, path = filesystem(url)
        with system.open_input_stream(path) as source, file.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{shown(url)} cannot be read: {error}".replace(url, shown(url))) from error


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address, but not from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and not newurl.startswith("https:"):
            raise UserError(f"{shown(req.full_url)} leads to {shown(newurl)}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch_http(url: str, file: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "fastray"})
    try:
        with urllib.request.build_opener(_NoDowngrade).open(request, timeout=SECONDS) as answer, file.open("wb") as sink:
            length = answer.headers.get("Content-Length")
            wanted = int(length) if length is not None and length.isdigit() else None
            with tqdm(total=wanted, unit="B", unit_scale=True, desc=Path(shown(url)).name, disable=None) as bar:
                while chunk := answer.read(CHUNK):
                    sink.write(chunk)
                    bar.update(len(chunk))
                got = sink.tell()
    except urllib.error.HTTPError as error:
        raise UserError(f"{shown(url)}: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(f"{shown(url)} cannot be fetched: {getattr(error, 'reason', error)}") from error
    if wanted is not None and got != wanted:
        raise UserError(f"{shown(url)} broke off after {got} of {wanted} bytes: try again")


# --- unpacking ---------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, ending: str, folder: Path) -> None:
    try:
        if ending == ".zip":
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, ending, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(f"{archive.name} is not a whole {ending} archive: {error}") from error
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise DataError(f"the archive has a file and a folder of one name: {error.filename}") from error
    except OSError as error:
        if error.errno is None:  # no word of the system's, as of a full disk, but of a decompressor
            raise DataError(f"{archive.name} is not a whole {ending} archive: {error}") from error
        raise


class _Budget:
    """How many bytes may still come out of an archive."""

    def __init__(self, archive: Path):
        self.left = max(BOMB_BYTES, BOMB_RATIO * archive.stat().st_size)

    def copy(self, source: IO[bytes], to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("wb") as sink:
            while chunk := source.read(CHUNK):
                self.left -= len(chunk)
                if self.left < 0:
                    raise DataError("the archive holds more than any honest one of its size would: it is not unpacked")
                sink.write(chunk)


def _inside(folder: Path, name: str) -> Path:
    # The place of an entry; DataError when it would lie outside.
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name or name[1:2] == ":":
        raise DataError(f"the archive has an entry {name!r} outside of its folder: it is not unpacked")
    return folder / name


def _unpack_zip(archive: Path, folder: Path) -> None:
    budget = _Budget(archive)
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            place = _inside(folder, entry.filename)
            if entry.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            if entry.external_attr >> 28 not in (0, 0o10):  # the Unix type of a regular file, or none
                raise DataError(f"the archive's entry {entry.filename!r} is a link or a device: it is not unpacked")
            if entry.flag_bits & 1:
                raise DataError(f"the archive's entry {entry.filename!r} is encrypted")
            with opened.open(entry) as source:
                budget.copy(source, place)
            _keep_time(place, calendar.timegm(entry.date_time))


def _unpack_tar(archive: Path, ending: str, folder: Path) -> None:
    budget = _Budget(archive)
    links: list[tuple[Path, str]] = []
    with contextlib.ExitStack() as stack:
        if ending == ".tar.zst":  # Python reads it from 3.14 on
            stream = stack.enter_context(pa.CompressedInputStream(pa.OSFile(str(archive)), "zstd"))
            opened = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        else:
            opened = stack.enter_context(tarfile.open(archive))
        for entry in opened:
            place = _inside(folder, entry.name)
            if entry.isdir():
                place.mkdir(parents=True, exist_ok=True)
            elif entry.isreg():
                source = opened.extractfile(entry)
                assert source is not None
                budget.copy(source, place)
                _keep_time(place, entry.mtime)
            elif entry.issym():
                links.append((place, entry.linkname))
            elif entry.islnk():
                links.append((place, os.path.relpath(_inside(folder, entry.linkname), place.parent)))
            else:
                raise DataError(f"the archive's entry {entry.name!r} is a device or a pipe: it is not unpacked")
    real = os.path.realpath(folder)

    def check_inside(reached: Path, place: Path, target: str) -> None:
        if not os.path.join(os.path.realpath(reached), "").startswith(os.path.join(real, "")):
            raise DataError(
                f"the archive's link {place.relative_to(folder)} -> {target} leads outside of its folder: not unpacked"
            )

    for place, target in links:  # a hard link becomes a symbolic one, which says the same
        check_inside(place.parent, place, target)  # a link made before may stand in its path, and lead out
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    for place, target in links:  # only now: a link may lead through another
        check_inside(place, place, target)


def _keep_time(place: Path, seconds: float) -> None:
    # The archive's own, so that a fingerprint of the files is the same wherever it was unpacked.
    os.utime(place, (seconds, seconds))
