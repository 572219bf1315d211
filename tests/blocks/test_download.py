"""get_data against a real server on loopback and real archives, honest and malicious."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from blocks import DataError, UserError, get_data
from blocks import download as module

Entry = tuple[str, bytes | str, bytes]  # name, contents or target of a link, type as tarfile says it
FILES = {"pets/cat/1.txt": b"miau", "pets/dog/2.txt": b"wau"}


def entries(files: dict[str, bytes]) -> list[Entry]:
    return [(name, data, tarfile.REGTYPE) for name, data in files.items()]


def tar(path: Path, members: list[Entry], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = kind, 1_000_000_000
            if isinstance(data, str):
                info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes], attributes: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return path


def zstd(path: Path, members: list[Entry]) -> Path:
    plain = tar(path.with_suffix(""), members, "w").read_bytes()
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as sink:
        sink.write(plain)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """The address of a server, the folder it serves, and the paths asked for."""
    root = tmp_path / "served"
    root.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", self.path.replace("/moved", ""))
                self.end_headers()
            elif self.path.startswith("/short"):
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"only this")
            else:
                super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", root, asked
        server.shutdown()
        thread.join()


def sha256(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


# --- fetching ----------------------------------------------------------------------------------------------------------


def test_over_http_once(served: tuple[str, Path, list[str]]) -> None:
    url, root, asked = served
    archive = tar(root / "pets.tgz", entries(FILES))
    folder = get_data(f"{url}/pets.tgz", sha256(archive))
    assert folder.name == "pets"  # the only folder in the archive
    assert files_in(folder.parent) == FILES
    assert get_data(f"{url}/pets.tgz", sha256(archive)) == folder
    assert asked == ["/pets.tgz"]


def test_a_file_without_a_hash_is_warned_of(served: tuple[str, Path, list[str]], kept: Path) -> None:
    url, root, _ = served
    (root / "table.csv").write_text("a,b\n1,2\n")
    with pytest.warns(UserWarning, match=f'table.csv is not checked; give hash="{sha256(root / "table.csv")}"'):
        file = get_data(f"{url}/moved/table.csv", folder=kept)
    assert file.name == "table.csv"
    assert file.read_text() == "a,b\n1,2\n"
    assert file.is_relative_to(kept)


def test_a_wrong_hash_keeps_nothing(served: tuple[str, Path, list[str]], kept: Path) -> None:
    url, root, _ = served
    archive = zipped(root / "pets.zip", FILES)
    with pytest.raises(DataError, match=f"has the hash {sha256(archive)}, not sha256:00"):
        get_data(f"{url}/pets.zip", "sha256:00", kept)
    assert list(kept.iterdir()) == []
    with pytest.raises(UserError, match=r"hash is written sha256:<hex digits> or md5:<hex digits>, not 'abc'"):
        get_data(f"{url}/pets.zip", "abc", kept)


def test_what_a_server_cannot_give(served: tuple[str, Path, list[str]], kept: Path) -> None:
    url, _, _ = served
    with pytest.raises(UserError, match=r"gone\.zip: the server answers 404 File not found"):
        get_data(f"{url}/gone.zip?key=secret", folder=kept)
    with pytest.raises(UserError, match="broke off after 9 of 100 bytes"):
        get_data(f"{url}/short.zip", folder=kept)
    assert list(kept.iterdir()) == []


def test_an_address_without_a_name(served: tuple[str, Path, list[str]], kept: Path) -> None:
    url, root, _ = served
    (root / "index.html").write_bytes(b"hello")
    file = get_data(f"{url}/", sha256(root / "index.html"), kept)
    assert (file.name, file.read_bytes()) == ("data", b"hello")


def test_a_server_that_is_not_there(kept: Path) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/a.zip cannot be fetched: .*refused"):
        get_data("http://127.0.0.1:9/a.zip?key=secret", folder=kept)


def test_https_does_not_lead_to_http() -> None:
    request = module.urllib.request.Request("https://a.org/x")
    with pytest.raises(UserError, match=r"https://a.org/x leads to http://a.org/x, which is not encrypted"):
        module._NoDowngrade().redirect_request(request, None, 302, "", {}, "http://a.org/x")


def test_another_storage(kept: Path) -> None:
    import fsspec

    with fsspec.open("memory://data/table.csv", "wb") as file:
        file.write(b"a\n1\n")
    digest = f"md5:{hashlib.md5(b'a' + bytes([10]) + b'1' + bytes([10])).hexdigest()}"
    assert get_data("memory://data/table.csv", digest, kept).read_bytes() == b"a\n1\n"
    with pytest.raises(UserError, match=r"memory://data/gone.csv cannot be read"):
        get_data("memory://data/gone.csv", digest, kept)
    with pytest.raises(UserError, match="nothing installed can reach nowhere://x/y"):
        get_data("nowhere://x/y", digest, kept)


def test_local_data_is_used_where_it_is(tmp_path: Path, kept: Path) -> None:
    (tmp_path / "a b.csv").write_text("a")
    assert get_data(tmp_path) == tmp_path
    assert get_data(tmp_path / "a b.csv", sha256(tmp_path / "a b.csv")) == tmp_path / "a b.csv"
    assert get_data(f"file://{tmp_path}/a%20b.csv") == tmp_path / "a b.csv"
    with pytest.raises(DataError, match="has the hash"):
        get_data(tmp_path / "a b.csv", "sha256:00")
    with pytest.raises(UserError, match=r"there is no .*gone"):
        get_data(tmp_path / "gone")


def test_a_local_archive_that_changed_is_unpacked_again(tmp_path: Path, kept: Path) -> None:
    tar(tmp_path / "x.tar.gz", entries(FILES))
    before = get_data(tmp_path / "x.tar.gz", folder=kept)
    tar(tmp_path / "x.tar.gz", entries({"pets/cat/1.txt": b"another"}))
    after = get_data(tmp_path / "x.tar.gz", folder=kept)
    assert before != after
    assert files_in(after) == {"cat/1.txt": b"another"}


# --- unpacking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.tar", lambda path: tar(path, entries(FILES), "w")),
        ("a.TGZ", lambda path: tar(path, entries(FILES))),
        ("a.tar.bz2", lambda path: tar(path, entries(FILES), "w:bz2")),
        ("a.tar.xz", lambda path: tar(path, entries(FILES), "w:xz")),
        ("a.tar.zst", lambda path: zstd(path, entries(FILES))),
        ("a.zip", lambda path: zipped(path, FILES)),
    ],
)
def test_archives(name: str, make: Callable[[Path], Path], tmp_path: Path, kept: Path) -> None:
    folder = get_data(make(tmp_path / name), folder=kept)
    assert files_in(folder.parent) == FILES
    stamp = (folder / "cat" / "1.txt").stat().st_mtime
    assert stamp == (315532800 if name == "a.zip" else 1_000_000_000)  # the archive's, for the fingerprint of the files
    assert len(list(kept.iterdir())) == 1


def test_several_entries_at_the_top(tmp_path: Path, kept: Path) -> None:
    folder = get_data(tar(tmp_path / "a.tgz", entries({"a.txt": b"1", "b/c.txt": b"2", "./d.txt": b"3"})), folder=kept)
    assert files_in(folder) == {"a.txt": b"1", "b/c.txt": b"2", "d.txt": b"3"}


def test_links_inside_are_kept(tmp_path: Path, kept: Path) -> None:
    links: list[Entry] = [("p/b/link.txt", "../a.txt", tarfile.SYMTYPE), ("p/hard.txt", "p/a.txt", tarfile.LNKTYPE)]
    folder = get_data(tar(tmp_path / "a.tgz", [*entries({"p/a.txt": b"1"}), *links]), folder=kept)
    assert files_in(folder) == {"a.txt": b"1", "b/link.txt": b"1", "hard.txt": b"1"}


SYMLINK, HARDLINK = tarfile.SYMTYPE, tarfile.LNKTYPE
MALICIOUS: dict[str, list[Entry]] = {
    "above": entries({"../evil.txt": b"x"}),
    "above, deep": entries({"a/b/../../../evil.txt": b"x"}),
    "absolute": entries({"/tmp/evil.txt": b"x"}),
    "backslash": entries({"..\\evil.txt": b"x"}),
    "drive": entries({"C:evil.txt": b"x"}),
    "link above": [("a/link", "../../../home", SYMLINK)],
    "absolute link": [("link", "/etc/passwd", SYMLINK)],
    "hard link above": [("link", "../../../etc/passwd", HARDLINK)],
    "file through a link": [("link", "..", SYMLINK), *entries({"link/evil.txt": b"x"})],
    "links through links": [("x/y/z/up", "../../..", SYMLINK), ("out", "x/y/z/up/../..", SYMLINK)],
    "link through a link": [("out", "../../..", SYMLINK), ("out/evil", "x", SYMLINK), ("out/new/evil", "x", SYMLINK)],
    "device": [("null", "", tarfile.CHRTYPE)],
    "pipe": [("pipe", "", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("members", MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_archive_leaves_nothing(members: list[Entry], tmp_path: Path, kept: Path) -> None:
    archive = tar(tmp_path / "a.tgz", [*entries({"good.txt": b"1"}), *members])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"outside|leads|device|one name"):
        get_data(archive, folder=kept)
    assert list(kept.iterdir()) == []
    assert sorted(p for p in tmp_path.rglob("*") if p != kept) == before


@pytest.mark.parametrize(
    ("files", "attributes", "message"),
    [
        ({"../evil.txt": b"x"}, 0, "outside"),
        ({"/tmp/evil.txt": b"x"}, 0, "outside"),
        ({"link": b"/etc/passwd"}, 0o120777, "link or a device"),
        ({"a": b"1", "a/b": b"2"}, 0, "of one name"),
    ],
)
def test_a_malicious_zip(files: dict[str, bytes], attributes: int, message: str, tmp_path: Path, kept: Path) -> None:
    with pytest.raises(DataError, match=message):
        get_data(zipped(tmp_path / "a.zip", files, attributes), folder=kept)
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_bomb(name: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BOMB_BYTES", 100_000)
    monkeypatch.setattr(module, "CHUNK", 10_000)
    zeros = {"zeros": bytes(1_000_000)}
    path = tmp_path / name
    with pytest.raises(DataError, match="more than any honest one"):
        get_data(zipped(path, zeros) if name == "a.zip" else tar(path, entries(zeros)), folder=kept)
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.zst"])
@pytest.mark.parametrize("broken", [b"", b"no archive at all" * 100])
def test_what_is_no_archive(name: str, broken: bytes, tmp_path: Path, kept: Path) -> None:
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(DataError, match="is not a whole"):
        get_data(tmp_path / name, folder=kept)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.zst"])
def test_a_truncated_archive(name: str, tmp_path: Path, kept: Path) -> None:
    path, noise = tmp_path / name, {"a": bytes(range(256)) * 40, "b": hashlib.sha256(b"b").digest() * 300}
    whole = (
        zipped(path, noise)
        if name == "a.zip"
        else zstd(path, entries(noise))
        if name == "a.tar.zst"
        else tar(path, entries(noise))
    )
    path.write_bytes(whole.read_bytes()[:-60])
    with pytest.raises(DataError, match="is not a whole"):
        get_data(path, folder=kept)
    assert list(kept.iterdir()) == []
