"""How long prepared data live, who may remove them, what a damaged file leads to, and what happens at a storage URL."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import blocks.cache
import blocks.prepared
from blocks import DataBlock, DataError, Prepared, prepare
from blocks.cache import (
    Hold,
    cache_folder,
    clear,
    in_use,
    kept_data,
    last_used,
    limit_for,
    make_room,
    place_of,
    remove,
    size_of,
    sweep,
)
from blocks.errors import UserError
from blocks.storage import delete, folders, get, joined, put

HOME = "prepared"

# A run of its own process: prepares the pictures below argv[1] with cache=argv[2], prints the folder, and waits for its input.
RUN = """
import sys
from blocks import CategoryBlock, DataBlock, ImageBlock, get_image_files, parent_label, prepare
block = DataBlock((ImageBlock(), CategoryBlock()), get_items=get_image_files, get_y=parent_label)
prepared = prepare(block.plan(sys.argv[1]), cache=sys.argv[2])
print(prepared.folder, prepared.reused, sum(t.num_rows for t in prepared.tables()), flush=True)
sys.stdin.read()
"""


def started(source: Path, cache: str = "disk") -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", RUN, str(source), cache], **pipes)


def said(run: subprocess.Popen[str]) -> tuple[Path, bool, int]:
    assert run.stdout is not None
    folder, reused, rows = run.stdout.readline().split()
    return Path(folder), reused == "True", int(rows)


def content(prepared: Prepared) -> list[dict[str, Any]]:
    return [row for table in prepared.tables() for row in table.to_pylist()]


def shard_file(prepared: Prepared, number: int = 0) -> Path:
    return prepared.folder / prepared.index["shards"][number]["file"]


def flip_a_byte(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(bytes(whole))


def data_set(home: Path, name: str, size: int, used: float) -> Path:
    """A folder of so many bytes, last used at a time."""
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "000000.arrow").write_bytes(bytes(size))
    (folder / "used").touch()
    os.utime(folder / "used", (used, used))
    return folder


# --- how long ----------------------------------------------------------------------------------------------------------


def test_off_is_gone_after_the_run_even_if_it_died(few_digits: Path, digits_block: DataBlock) -> None:
    """The next run finds what the dead one left, and leaves alone what a live one uses."""
    dying, living = started(few_digits, "off"), started(few_digits, "off")
    left, in_its_use = said(dying)[0], said(living)[0]
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    assert left.exists()
    kept = prepare(digits_block.plan(few_digits))
    assert not left.exists()
    assert in_its_use.exists()
    living.communicate("")
    assert living.returncode == 0
    assert [f.name for f in (cache_folder() / HOME).iterdir()] == [kept.fingerprint]


def test_off_takes_nothing_that_is_kept(few_digits: Path, digits_block: DataBlock) -> None:
    kept = prepare(digits_block.plan(few_digits))
    private = prepare(digits_block.plan(few_digits), cache="off")
    assert not private.reused
    assert private.folder != kept.folder
    assert private.fingerprint == kept.fingerprint
    assert content(private) == content(kept)


def test_memory(few_digits: Path, digits_block: DataBlock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(blocks.cache, "IN_MEMORY", memory)
    prepared = prepare(digits_block.plan(few_digits), cache="memory")
    assert prepared.folder.is_relative_to(memory)
    assert prepare(digits_block.plan(few_digits), cache="memory").reused
    assert not (cache_folder() / HOME).exists()


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.cache, "IN_MEMORY", tmp_path / "none")
    with pytest.raises(UserError, match=r'writable tmpfs at .*none.*cache="disk"'):
        place_of("memory")


def test_a_word_that_is_no_cache() -> None:
    with pytest.raises(UserError, match=r'"disk", "memory" or "off", not .ram.'):
        place_of("ram")


# --- room --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used in (("b", 2000.0), ("a", 1000.0), ("c", 3000.0)):
        data_set(tmp_path / HOME, name, 1000, used)
    monkeypatch.setenv("FASTRAY_CACHE_LIMIT", "2kB")
    make_room(tmp_path / HOME)
    assert sorted(f.name for f in (tmp_path / HOME).iterdir()) == ["b", "c"]


def test_what_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = data_set(tmp_path / HOME, "old", 1000, 1000.0)
    new = data_set(tmp_path / HOME, "new", 1000, 2000.0)
    held = Hold(old)
    os.utime(old / "used", (1000.0, 1000.0))
    monkeypatch.setenv("FASTRAY_CACHE_LIMIT", "500B")
    with pytest.warns(UserWarning, match=r"more than the limit .*FASTRAY_CACHE_LIMIT"):
        make_room(tmp_path / HOME)
    assert old.exists()
    assert not new.exists()
    del held
    make_room(tmp_path / HOME)
    assert not old.exists()


def test_to_use_is_to_have_used(few_digits: Path, digits_block: DataBlock) -> None:
    folder = prepare(digits_block.plan(few_digits)).folder
    os.utime(folder / "used", (1000.0, 1000.0))
    prepare(digits_block.plan(few_digits))
    assert time.time() - last_used(folder) < 60


@pytest.mark.parametrize(("text", "size"), [("50GB", 50e9), ("1.5 TB", 1.5e12), ("800MB", 8e8), ("10kB", 1e4), ("7B", 7)])
def test_limits(text: str, size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAY_CACHE_LIMIT", text)
    assert limit_for(tmp_path, 0) == size


@pytest.mark.parametrize("text", ["50", "GB", "fifty GB", "50 gigabytes", "-1GB"])
def test_a_limit_that_is_no_size(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAY_CACHE_LIMIT", text)
    with pytest.raises(UserError, match="a size such as 50GB"):
        limit_for(tmp_path, 0)


def test_without_a_limit_half_of_the_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRAY_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda home: type("Usage", (), {"free": 600}))
    assert limit_for(tmp_path, 400) == 500


def test_no_space_left_says_what_to_do(few_digits: Path, digits_block: DataBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["blocks.prepare"], "write_shard", full)
    with pytest.raises(UserError, match=r"no space is left .*`fastray cache clear`"):
        prepare(digits_block.plan(few_digits))
    assert not any((cache_folder() / HOME).iterdir())


# --- at once -----------------------------------------------------------------------------------------------------------


def test_two_processes_at_once(few_digits: Path) -> None:
    """They end with one folder, which stays as long as one of them lives."""
    runs = [started(few_digits) for _ in range(2)]
    (folder, _, rows), (other, _, as_many) = map(said, runs)
    assert folder == other
    assert rows == as_many == 120
    assert [f.name for f in (cache_folder() / HOME).iterdir()] == [folder.name]
    for run in runs:
        assert in_use(folder)
        assert not remove(folder)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert not in_use(folder)
    assert remove(folder)


# --- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a flipped byte", "cut short", "missing"])
def test_a_damaged_shard_is_made_again(how: str, few_digits: Path, digits_block: DataBlock) -> None:
    plan = digits_block.plan(few_digits)
    first = prepare(plan)
    before = [shard_file(first, n).read_bytes() for n in range(2)]
    untouched = shard_file(first, 0).stat().st_mtime_ns
    match how:
        case "a flipped byte":
            flip_a_byte(shard_file(first, 1))
        case "cut short":
            shard_file(first, 1).write_bytes(before[1][:-8])
        case "missing":
            shard_file(first, 1).unlink()
    with pytest.warns(UserWarning, match=r"1 of 2 shards .* damaged or missing and are made again"):
        again = prepare(plan)
    assert again.reused
    assert again.index == first.index
    assert [shard_file(again, n).read_bytes() for n in range(2)] == before
    assert shard_file(again, 0).stat().st_mtime_ns == untouched
    assert prepare(plan).reused  # and nothing is said any more


def test_a_shard_whose_rows_are_gone_cannot_be_made_again(few_digits: Path, digits_block: DataBlock, tmp_path: Path) -> None:
    """The file vanished between the listing and the reading."""
    source = Path(shutil.copytree(few_digits, tmp_path / "digits"))
    plan = digits_block.plan(source)
    flip_a_byte(shard_file(prepare(plan), 0))
    (source / "0" / "0000.png").unlink()
    with pytest.warns(UserWarning, match="made again"), pytest.raises(DataError, match="bring their files back"):
        prepare(plan)


def test_a_shard_damaged_while_in_use(few_digits: Path, digits_block: DataBlock) -> None:
    """Found at its first use by the process that reads it; the next run makes it again."""
    plan = digits_block.plan(few_digits)
    opened = prepare(plan)
    flip_a_byte(shard_file(opened, 1))
    opened.table(0)
    with pytest.raises(DataError, match=r"\d+\.arrow is damaged or missing: run the command again"):
        opened.table(1)
    with pytest.warns(UserWarning, match="made again"):
        assert len(content(prepare(plan))) == 120


def test_each_shard_is_checked_once(few_digits: Path, digits_block: DataBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = prepare(digits_block.plan(few_digits))
    checked = []
    crc32 = blocks.prepared.zlib.crc32
    monkeypatch.setattr(blocks.prepared.zlib, "crc32", lambda content: checked.append(1) or crc32(content))
    for _ in range(3):
        opened.tables()
        prepare(digits_block.plan(few_digits)).tables()
    assert len(checked) == 2


@pytest.mark.parametrize("text", ["", '{"format": 1, "shar', "[]", '{"format": 0}'])
def test_an_index_that_cannot_be_used(text: str, few_digits: Path, digits_block: DataBlock) -> None:
    plan = digits_block.plan(few_digits)
    first = prepare(plan)
    rows = content(first)
    (first.folder / "index.json").write_text(text)
    if text.endswith(("}", "]")):  # another version's, perhaps
        again = prepare(plan)
    else:
        with pytest.warns(UserWarning, match=r"index of .* is damaged: the data is prepared again"):
            again = prepare(plan)
    assert not again.reused
    assert again.folder == first.folder
    assert content(again) == rows == content(first)
    assert [f.name for f in first.folder.parent.iterdir()] == [first.folder.name]


@pytest.mark.parametrize("file", ["../other/000000.arrow", "/etc/hostname", "a/../../b"])
def test_an_index_that_names_a_file_outside(file: str, few_digits: Path, digits_block: DataBlock) -> None:
    plan = digits_block.plan(few_digits)
    prepared = prepare(plan)
    index = json.loads((prepared.folder / "index.json").read_text())
    index["shards"][0]["file"] = file
    (prepared.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="a file outside of it"):
        prepare(plan)


def test_a_folder_of_another_user(few_digits: Path, digits_block: DataBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be locked can be read all the same."""
    plan = digits_block.plan(few_digits)
    rows = content(prepare(plan))

    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(blocks.cache, "Hold", refused)
    assert content(prepare(plan)) == rows


# --- at a URL ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage URL as the place of prepared data; what this machine copies lies below HOME."""
    place = f"file://{tmp_path}/shared" if request.param == "file" else joined(request.getfixturevalue("bucket"), "cache")
    monkeypatch.setenv("FASTRAY_CACHE", place)
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    return joined(place, HOME)


def names_of(prepared: Prepared) -> list[str]:
    return [Path(shard["file"]).name for shard in prepared.index["shards"]]


def copies(prepared: Prepared) -> list[str]:
    return sorted(f.name for f in prepared.folder.rglob("*.arrow"))


def test_prepared_at_a_url(
    url: str, few_digits: Path, digits_block: DataBlock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written there once; another node finds it and fetches each shard once; damage is made again; clear removes it."""
    plan = digits_block.plan(few_digits)
    first = prepare(plan)
    assert folders(url) == [plan.fingerprint]
    assert first.folder == tmp_path / "node/.cache/fastray/prepared" / plan.fingerprint
    assert copies(first) == []
    rows = content(first)
    assert len(rows) == 120
    assert copies(first) == names_of(first)

    monkeypatch.setenv("HOME", str(tmp_path / "other node"))
    second = prepare(plan)
    assert second.reused
    assert second.folder != first.folder
    fetched = []
    monkeypatch.setattr(blocks.prepared, "get", lambda where, name: fetched.append(name) or get(where, name))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(content, [second, copy.copy(second)] * 2)) == [rows] * 4
    assert sorted(fetched) == [shard["file"] for shard in first.index["shards"]]
    second.drop(0)
    assert copies(second) == names_of(second)[1:]
    assert content(second) == rows

    flip_a_byte(shard_file(second, 0))  # this node's copy is fetched again
    assert content(second) == rows
    delete(second.url or "", second.index["shards"][1]["file"])
    with pytest.warns(UserWarning, match=rf"1 of 2 shards .* made again: {names_of(second)[1]}"):
        third = prepare(plan)
    third.drop(1)
    assert content(third) == rows

    del third, second
    (here, there) = kept_data()
    assert (here.rows, there.rows, there.where) == (120, 120, joined(url, plan.fingerprint))
    assert clear()[0] == [here]  # what other machines may use goes only by its name
    assert clear(plan.fingerprint)[0] == [there]
    assert folders(url) == []
    assert not any(first.folder.parent.parent.glob("prepared/.*"))


def test_copies_make_room_for_others(
    few_digits: Path, digits_block: DataBlock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/shared")
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    prepared = prepare(digits_block.plan(few_digits))
    old = data_set(prepared.folder.parent, "old", 100_000, 1000.0)
    monkeypatch.setenv("FASTRAY_CACHE_LIMIT", "90kB")
    prepare(digits_block.plan(few_digits)).table(0)
    assert not old.exists()


def test_damage_at_a_url_is_noticed_by_who_fetches(few_digits: Path, digits_block: DataBlock, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/shared")
        patch.setenv("HOME", str(tmp_path / "node"))
        plan = digits_block.plan(few_digits)
        prepared = prepare(plan)
        flip_a_byte(tmp_path / "shared/prepared" / plan.fingerprint / prepared.index["shards"][0]["file"])
        with pytest.raises(DataError, match=r"000000\.arrow at file://.* is damaged: run the command again"):
            prepared.table(0)
        with pytest.warns(UserWarning, match="made again"):
            assert len(content(prepare(plan))) == 120


@pytest.mark.slow
def test_off_at_a_url(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/shared")
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    run = started(few_digits, "off")
    folder, _, rows = said(run)
    assert rows == 120
    assert len(folders(f"file://{tmp_path}/shared/prepared")) == 1
    run.send_signal(signal.SIGKILL)
    run.communicate()
    sweep(folder.parent)
    assert folders(f"file://{tmp_path}/shared/prepared") == []


def test_what_cannot_be_removed_now_stands_in_nobodys_way(tmp_path: Path) -> None:
    """A run that ended left something at a storage that this process cannot reach: another one may, later."""
    left = tmp_path / "home" / ".unfinished"
    left.mkdir(parents=True)
    (left / "remote").write_text("nowhere://bucket/prepared/x")
    assert not remove(left)
    sweep(tmp_path / "home")
    (stays,) = (tmp_path / "home").iterdir()
    assert (stays / "remote").read_text() == "nowhere://bucket/prepared/x"


def test_another_run_finished_first_at_a_url(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_block: DataBlock
) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/shared")
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    plan = digits_block.plan(few_digits)
    firsts: list[Prepared] = []

    def overtaken(function: Any, work: Any) -> Any:
        if not firsts:
            firsts.append(prepare(plan))
        return map(function, work)

    second = prepare(plan, map_work=overtaken)
    assert second.index == firsts[0].index
    assert len(content(second)) == 120
    assert len(folders(f"file://{tmp_path}/shared/prepared/{plan.fingerprint}")) == 1


# --- for the person ----------------------------------------------------------------------------------------------------


def test_what_is_kept(few_digits: Path, digits_block: DataBlock) -> None:
    prepared = prepare(digits_block.plan(few_digits))
    (kept,) = kept_data()
    assert kept.fingerprint == prepared.fingerprint
    assert kept.source == str(few_digits)
    assert (kept.rows, kept.size, kept.in_use) == (120, size_of(prepared.folder), True)
    assert clear() == ([], [kept])
    del prepared
    assert clear(older_than_days=1) == ([], [])
    (kept,) = kept_data()
    assert not kept.in_use
    assert clear() == ([kept], [])
    assert kept_data() == []


def test_to_clear_what_is_not_there() -> None:
    with pytest.raises(UserError, match="no prepared data 'abc'"):
        clear("abc")


def test_put_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a", b"old")

    def interrupted(path: Path, to: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, "a", b"new")
    assert get(tmp_path, "a") == b"old"
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["a"]
