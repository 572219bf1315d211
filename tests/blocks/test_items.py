"""Listing files, and getting inputs and labels out of items."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch

from blocks import (
    AttrGetter,
    ColReader,
    DataBlock,
    DataError,
    FileGetter,
    GrandparentSplitter,
    ImageGetter,
    ItemGetter,
    RegexLabeller,
    get_files,
    get_image_files,
    get_text_files,
    parent_label,
)
from blocks.fingerprint import fingerprint


def touched(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def listed(root: Path) -> list[str]:
    return [f.relative_to(root).as_posix() for f in get_image_files(root)]


def test_files_are_sorted_and_found_in_subfolders(tmp_path: Path) -> None:
    names = ["b/2.png", "a/x/3.jpeg", "c.JPG", "a/1.png", "b/10.png", "a/z.tiff"]
    assert listed(touched(tmp_path, *names)) == ["a/1.png", "a/x/3.jpeg", "a/z.tiff", "b/10.png", "b/2.png", "c.JPG"]


def test_web_pictures_are_pictures(tmp_path: Path) -> None:
    assert listed(touched(tmp_path, "a.webp", "b.png")) == ["a.webp", "b.png"]


def test_what_is_a_picture_does_not_depend_on_the_machine() -> None:
    """Another library's call of mimetypes.init reads the machine's own tables."""
    show = "from blocks.items import IMAGE_EXTENSIONS as e; print(sorted(e))"
    first, second = (
        subprocess.run([sys.executable, "-c", before + show], capture_output=True, text=True, check=True).stdout
        for before in ("", "import mimetypes; mimetypes.init(); mimetypes.add_type('image/x-mine', '.mine'); ")
    )
    assert first == second


def test_what_is_no_picture_or_hidden_is_skipped(tmp_path: Path) -> None:
    root = touched(tmp_path / ".seen", "a.png", ".b.png", ".git/c.png", "d/.e/f/g.png", "h.txt", "png", "i.png.bak")
    assert listed(root) == ["a.png"]


def test_a_text_path_serves_as_well(tmp_path: Path) -> None:
    touched(tmp_path, "a.png")
    assert get_image_files(str(tmp_path)) == [tmp_path / "a.png"]


@pytest.mark.parametrize("name", ["gone", "file.png"])
def test_missing_folder(name: str, tmp_path: Path) -> None:
    touched(tmp_path, "file.png")
    with pytest.raises(DataError, match=f"no folder .*{name}"):
        get_image_files(tmp_path / name)


def test_parent_label() -> None:
    assert parent_label(Path("pets/cat/1.png")) == parent_label("pets/cat/1.png") == "cat"


def names(files: list[Path], root: Path) -> list[str]:
    return [f.relative_to(root).as_posix() for f in files]


def test_which_files(tmp_path: Path) -> None:
    touched(tmp_path, "a.TXT", "b.png", "train/c.txt", "train/x/d.txt", "test/e.txt", "test/train/f.png")
    assert names(get_files(tmp_path), tmp_path) == [
        *("a.TXT", "b.png", "test/e.txt", "test/train/f.png", "train/c.txt", "train/x/d.txt")
    ]
    assert names(get_text_files(tmp_path), tmp_path) == ["a.TXT", "test/e.txt", "train/c.txt", "train/x/d.txt"]
    assert names(get_files(tmp_path, {".PNG"}, recurse=False), tmp_path) == ["b.png"]
    assert names(get_text_files(tmp_path, folders=["train"]), tmp_path) == ["train/c.txt", "train/x/d.txt"]
    assert names(get_files(tmp_path, folders=["test", "."]), tmp_path) == ["a.TXT", "b.png", "test/e.txt", "test/train/f.png"]
    assert names(FileGetter("train", (".txt",), recurse=False)(tmp_path), tmp_path) == ["train/c.txt"]
    assert names(ImageGetter(folders=("test",))(tmp_path), tmp_path) == ["test/train/f.png"]


@pytest.fixture
def bucket(few_digits: Path) -> str:
    """The URL of some digits in a storage of this process's own."""
    import fsspec

    storage = fsspec.filesystem("memory")
    for file in few_digits.rglob("*.png"):
        storage.pipe(f"/pets/{file.relative_to(few_digits)}", file.read_bytes())
    storage.pipe("/pets/.hidden/0.png", b"")
    storage.pipe("/pets/notes.txt", b"")
    return "memory://pets"


def test_files_of_a_storage_are_urls(bucket: str, few_digits: Path) -> None:
    below = [f.relative_to(few_digits).as_posix() for f in get_image_files(few_digits)]
    assert get_image_files(bucket) == [f"{bucket}/{name}" for name in below]
    assert get_image_files(f"{bucket}/", folders=["1"]) == [f"{bucket}/{name}" for name in below if name.startswith("1/")]
    assert get_files(bucket, recurse=False) == [f"{bucket}/notes.txt"]
    assert ImageGetter(folders=("gone",))(bucket) == []
    assert FileGetter("1", (".png",))(bucket) == [f"{bucket}/{name}" for name in below if name.startswith("1/")]
    with pytest.raises(DataError, match="gone"):
        get_image_files("memory://gone")


def test_labels_do_not_see_the_query_of_a_url() -> None:
    url = "s3://bucket/train/cat/great_dane_12.jpg?region=eu/west"
    assert parent_label(url) == "cat"
    assert RegexLabeller(r"([^/]+)_\d+.jpg$")(url) == "great_dane"
    assert GrandparentSplitter()([url]) == ([0], [])


def test_a_storage_prepares_as_a_folder_does(bucket: str, few_digits: Path, digits_block: DataBlock) -> None:
    here, there = digits_block.dataloaders(few_digits), digits_block.dataloaders(bucket)
    for one, other in zip(here.valid, there.valid, strict=True):
        assert one.ids == other.ids
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("item", ["pets/great_dane_12.jpg", Path("pets/great_dane_12.jpg")])
def test_regex_labeller(item: Any) -> None:
    assert RegexLabeller(r"([^/]+)_\d+.jpg$")(item) == "great_dane"
    assert RegexLabeller(r"(\w+)/", match=True)(item) == "pets"
    with pytest.raises(DataError, match=r"'\(dane\)' is not found in 'pets/great_dane_12\.jpg'"):
        RegexLabeller("(dane)", match=True)(item)
    with pytest.raises(ValueError, match="has no group"):
        RegexLabeller("dane")


def test_item_and_attr_getter() -> None:
    assert ItemGetter(1)(("a", "b")) == "b"
    assert ItemGetter("k")({"k": 3}) == 3
    assert AttrGetter("stem")(Path("a/b.png")) == "b"
    assert AttrGetter("gone", default=0)(3) == 0


TABLE = pa.table(
    {
        "file": ["a", "b c", ""],
        "tags": ["x|y", "", None],
        "n": [1, 2, None],
        "wide": [0.5, float("nan"), None],
    }
)
READERS = [
    *(ColReader("file"), ColReader("n"), ColReader(1), ColReader("wide"), ColReader("file", pref="in/", suff=".png")),
    *(ColReader("file", pref=Path("in/x")), ColReader("tags", label_delim="|"), ColReader("file", suff=" d", label_delim=" ")),
]


@pytest.mark.parametrize("reader", READERS, ids=repr)
def test_a_column_is_what_its_rows_are_read_as(reader: ColReader) -> None:
    rows = TABLE.to_pylist()
    by_row = [reader(row) for row in rows]
    assert reader.column(TABLE).to_pylist() == by_row
    assert reader.column(TABLE.slice(1)).to_pylist() == by_row[1:]
    assert reader.column(pa.concat_tables([TABLE, TABLE])).to_pylist() == by_row * 2
    Row = namedtuple("Row", TABLE.column_names)
    assert [reader(Row(**row)) for row in rows] == by_row


def test_what_a_column_reader_makes_of_a_cell() -> None:
    row = {"file": "a", "tags": "x|y", "n": 3, "none": None}
    assert ColReader(["file", "n"])(row) == ("a", 3)
    assert ColReader("n", pref="id")(row) == "id3"
    assert ColReader("file", pref=Path("in"))(row) == "in/a"
    assert ColReader("tags", label_delim="|")(row) == ["x", "y"]
    assert ColReader("none", pref="a")(row) is None
    assert ColReader("none", label_delim="|")(row) == []
    assert ColReader("file")(pd.Series(row)) == "a"
    assert not ColReader(["file", "n"]).has_column(TABLE.schema)
    assert not ColReader("n", pref="id").has_column(TABLE.schema)
    assert ColReader(["file"]) != ColReader("file")
    assert fingerprint(ColReader("file")) != fingerprint(ColReader("n"))


def test_a_missing_column() -> None:
    with pytest.raises(DataError, match="no column 'gone'; there are file, tags, n, wide"):
        ColReader("gone").column(TABLE)
    with pytest.raises(DataError, match="has no column 'gone'; there are a"):
        ColReader("gone")({"a": 1})
    with pytest.raises(DataError, match="has no column 'gone'; there are a"):
        ColReader("gone")(namedtuple("Row", "a")(1))
    with pytest.raises(ValueError, match="label_delim"):
        ColReader("a", label_delim="")
