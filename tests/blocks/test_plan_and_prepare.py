"""A plan, carried out in this process: its shards, its index, its reuse, and each way it can fail."""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from blocks import (
    CategoryBlock,
    DataBlock,
    DataError,
    ImageBlock,
    PILImage,
    Prepared,
    RandomSplitter,
    RandomSubsetSplitter,
    Resize,
    Transform,
    TransformBlock,
    UnreadableRow,
    prepare,
)
from blocks.cache import cache_folder
from blocks.shards import as_array, map_shard


@pytest.fixture
def digits(few_digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits, to be damaged."""
    return Path(shutil.copytree(few_digits, tmp_path / "digits"))


def files_of(root: Path) -> list[str]:
    return sorted(f.relative_to(root).as_posix() for f in root.rglob("*.png"))


def left_behind() -> list[str]:
    home = cache_folder() / "prepared"
    return [f.name for f in home.iterdir()] if home.exists() else []


def stored(prepared: Prepared) -> dict[str, tuple[int, np.ndarray, int]]:
    """Row id -> part, pixels, code."""
    return {
        row_id: (part, x, y)
        for t in prepared.tables()
        for row_id, part, x, y in zip(
            t["id"].to_pylist(), t["part"].to_pylist(), as_array(t, "x"), t["y"].to_pylist(), strict=True
        )
    }


# --- the way it goes well ----------------------------------------------------------------------------------------------


def test_every_row_is_stored_as_its_file_says(digits_block: DataBlock, few_digits: Path) -> None:
    prepared = prepare(digits_block.plan(few_digits))
    rows = stored(prepared)
    assert prepared.rows == 120
    assert not prepared.reused
    assert list(rows) == files_of(few_digits)
    valid = RandomSplitter(0.25, seed=1)(list(rows))[1]
    for position, (row_id, (part, x, y)) in enumerate(rows.items()):
        expected = np.asarray(Resize(16)(PILImage.create(few_digits / row_id))).transpose(2, 0, 1)
        assert x.dtype == np.uint8
        assert np.array_equal(x, expected)
        assert str(y) == row_id.partition("/")[0]
        assert part == (position in valid)


def test_the_index_describes_the_shards(digits_block: DataBlock, few_digits: Path) -> None:
    prepared = prepare(digits_block.plan(few_digits))
    index = json.loads((prepared.folder / "index.json").read_text())
    assert index["bad_rows"] == []
    assert index["source"] == str(few_digits)
    for shard in index["shards"]:
        assert map_shard(prepared.folder / shard["file"]).num_rows == shard["rows"]
        assert (prepared.folder / shard["file"]).stat().st_size == shard["bytes"]
    names = {f.name for f in prepared.folder.iterdir()}
    assert names == {"index.json", "used"} | {shard["file"] for shard in index["shards"]}
    assert len(index["shards"]) == 2  # 64 rows, and the rest
    assert prepared.folder == cache_folder() / "prepared" / digits_block.plan(few_digits).fingerprint


def test_explain_names_every_stage(digits_block: DataBlock, few_digits: Path) -> None:
    plan = digits_block.plan(few_digits)
    lines = plan.explain().splitlines()
    assert lines[0] == f"plan {plan.fingerprint}"
    assert [line.split()[0] for line in lines[1:]] == ["read", "split", "fit", "encode", "encode", "encode", "batch"]
    assert "120 files, 14.6 kB" in lines[1]
    assert f"get_image_files of {few_digits}" in lines[1]
    assert "RandomSplitter(valid_pct=0.25, seed=1, stratify=None): " in lines[2]
    assert "y: Categorize on the training part" in lines[3]
    assert "x: the_item -> OpenImage(mode='RGB')" in lines[4]
    assert "y: parent_label -> Categorize(vocab=(), sort=True, add_na=False)" in lines[5]
    assert "sample: Resize(size=(16, 16), method='crop', pad_mode='reflection') -> ToTensor()" in lines[6]
    assert lines[7].endswith("device  IntToFloatTensor(div_mask=1) -> Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))")


def test_explain_says_what_came_of_it(digits_block: DataBlock, few_digits: Path) -> None:
    plan = digits_block.plan(few_digits)
    prepared = prepare(plan)
    text = plan.explain(prepared)
    assert "3 values (0, 1, 2)" in text
    assert f"120 rows, 0.1 MB in 2 Arrow shards, {prepared.folder}" in text
    assert digits_block.dataloaders(few_digits).plan_text == text


def test_prepared_once(digits_block: DataBlock, few_digits: Path) -> None:
    first = prepare(digits_block.plan(few_digits))
    times = {f: f.stat().st_mtime_ns for f in first.folder.glob("*.*")}
    second = prepare(digits_block.plan(few_digits))
    assert second.reused
    assert second.index == first.index
    assert second.encode == first.encode
    assert {f: f.stat().st_mtime_ns for f in first.folder.glob("*.*")} == times
    assert left_behind() == [first.fingerprint]


def test_another_cache_gets_the_same_bytes(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(digits_block.plan(few_digits))
    monkeypatch.setenv("FASTRAY_CACHE", str(tmp_path / "another"))
    second = prepare(digits_block.plan(few_digits))
    assert not second.reused
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    assert len(first.index["shards"]) > 1
    for shard in first.index["shards"]:
        assert (first.folder / shard["file"]).read_bytes() == (second.folder / shard["file"]).read_bytes()


def test_who_runs_the_work_does_not_change_the_bytes(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables come back in any order, as from Ray Data's tasks."""

    def backwards(function: Callable[[pa.Table], pa.Table], tables: Sequence[pa.Table]) -> list[pa.Table]:
        return [function(t) for t in reversed(tables)]

    plan = digits_block.plan(few_digits)
    first = prepare(plan)
    monkeypatch.setenv("FASTRAY_CACHE", str(tmp_path / "another"))
    second = prepare(plan, map_work=backwards)
    assert {**second.index, "seconds": 0} == {**first.index, "seconds": 0}
    for shard in first.index["shards"]:
        assert (first.folder / shard["file"]).read_bytes() == (second.folder / shard["file"]).read_bytes()


def test_two_preparations_at_once(digits_block: DataBlock, few_digits: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare(digits_block.plan(few_digits)), range(2))
    assert first.folder == second.folder
    assert list(stored(first)) == list(stored(second)) == files_of(few_digits)
    assert left_behind() == [first.fingerprint]


def test_one_finished_while_the_other_worked(digits_block: DataBlock, few_digits: Path) -> None:
    """The second comes to a folder that is there already, and takes it."""
    plan = digits_block.plan(few_digits)

    def overtaken(function: Callable[[pa.Table], pa.Table], tables: Sequence[pa.Table]) -> list[pa.Table]:
        prepare(plan)
        return [function(t) for t in tables]

    assert prepare(plan, map_work=overtaken).rows == 120
    assert left_behind() == [plan.fingerprint]


def test_a_given_vocabulary_is_not_fitted(digits_block: DataBlock, few_digits: Path) -> None:
    block = replace(digits_block, blocks=(ImageBlock(), CategoryBlock(vocab=("2", "1", "0"))))
    plan = block.plan(few_digits)
    assert plan.passes() == []
    assert "fit" not in plan.explain()
    for row_id, (_, _, y) in stored(prepare(plan)).items():
        assert y == 2 - int(row_id[0])


def test_a_class_with_one_item_trains(digits_block: DataBlock, digits: Path) -> None:
    lone = digits / "lone" / "0.png"
    lone.parent.mkdir()
    shutil.copy(digits / "0" / "0000.png", lone)
    splitter = next(
        s for i in range(99) if RandomSplitter(0.25, seed=i)(["lone/0.png"])[1] for s in [RandomSplitter(0.25, seed=i)]
    )
    plan = replace(digits_block, splitter=splitter).plan(digits)
    with pytest.warns(UserWarning, match="'lone'"):
        prepared = prepare(plan)
    rows = stored(prepared)
    assert rows["lone/0.png"][0] == 0
    assert sum(part for part, _, _ in rows.values()) == int((plan.parts == 1).sum()) - 1


# --- what fails --------------------------------------------------------------------------------------------------------


def test_an_empty_folder(digits_block: DataBlock, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no items in .*get_image_files found nothing"):
        digits_block.dataloaders(tmp_path)


def test_a_missing_folder(digits_block: DataBlock, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        digits_block.dataloaders(tmp_path / "gone")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_an_empty_part(part: str, digits_block: DataBlock, few_digits: Path) -> None:
    def lopsided(items: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        everything = range(len(items))
        return ([], everything) if part == "training" else (everything, [])

    with pytest.raises(DataError, match=f"the {part} part is empty"):
        replace(digits_block, splitter=lopsided).plan(few_digits)


@pytest.mark.parametrize(
    ("train", "valid"),
    [(range(100), range(99, 120)), (range(100), range(100, 121)), ([-1, *range(119)], [5])],
    ids=["twice", "beyond the end", "negative"],
)
def test_a_splitter_that_miscounts(
    train: Sequence[int], valid: Sequence[int], digits_block: DataBlock, few_digits: Path
) -> None:
    with pytest.raises(DataError, match="each of the 120 rows into at most one part"):
        replace(digits_block, splitter=lambda items: (train, valid)).plan(few_digits)


def test_rows_in_neither_part_are_left_out_and_counted(digits_block: DataBlock, few_digits: Path) -> None:
    plan = replace(digits_block, splitter=RandomSubsetSplitter(0.4, 0.2, seed=1)).plan(few_digits)
    prepared = prepare(plan)
    assert 0 < prepared.rows < 120
    assert f"validation rows, {120 - prepared.rows} rows left out" in plan.explain(prepared)


def test_a_splitter_of_the_users_is_given_the_items(digits_block: DataBlock, few_digits: Path) -> None:
    def by_number(items: Sequence[Path]) -> tuple[list[int], list[int]]:
        parts: tuple[list[int], list[int]] = ([], [])
        for i, item in enumerate(items):
            parts[int(item.stem) % 4 == 0].append(i)
        return parts

    rows = stored(prepare(replace(digits_block, splitter=by_number).plan(few_digits)))
    assert {row_id: part for row_id, (part, _, _) in rows.items()} == {i: int(Path(i).stem) % 4 == 0 for i in rows}


def test_a_corrupt_file(digits_block: DataBlock, digits: Path) -> None:
    (digits / "1" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 rows cannot be read, 0 are allowed:\n  1/0001\.png: not a readable") as caught:
        digits_block.dataloaders(digits)
    assert "max_bad_rows=1" in str(caught.value)
    assert left_behind() == []


def test_a_link_to_nothing_is_a_bad_row(digits_block: DataBlock, digits: Path) -> None:
    (digits / "1" / "link.png").symlink_to(digits / "gone.png")
    prepared = prepare(digits_block.plan(digits), max_bad_rows=1)
    assert [bad["id"] for bad in prepared.index["bad_rows"]] == ["1/link.png"]


def test_many_corrupt_files_are_named_in_part(digits_block: DataBlock, digits: Path) -> None:
    for file in sorted((digits / "1").iterdir())[:7]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"7 rows cannot be read, 3 are allowed:(\n  1/\d+\.png: [^\n]*){5}\n  and 2 more"):
        prepare(digits_block.plan(digits), max_bad_rows=3)


def test_a_corrupt_file_can_be_left_out(digits_block: DataBlock, digits: Path) -> None:
    (digits / "1" / "0001.png").write_bytes(b"no picture")
    prepared = prepare(digits_block.plan(digits), max_bad_rows=1)
    assert prepared.rows == 119
    assert [bad["id"] for bad in prepared.index["bad_rows"]] == ["1/0001.png"]
    assert "not a readable image" in prepared.index["bad_rows"][0]["reason"]
    assert list(stored(prepared)) == [f for f in files_of(digits) if f != "1/0001.png"]
    assert "1 bad rows left out" in digits_block.plan(digits).explain(prepared)


def test_what_was_left_out_counts_when_reused(digits_block: DataBlock, digits: Path) -> None:
    (digits / "1" / "0001.png").write_bytes(b"no picture")
    prepare(digits_block.plan(digits), max_bad_rows=1)
    assert prepare(digits_block.plan(digits), max_bad_rows=1).reused
    with pytest.raises(DataError, match=r"1/0001\.png"):
        prepare(digits_block.plan(digits))


def test_no_row_can_be_read(digits_block: DataBlock, digits: Path) -> None:
    for file in digits.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 120 rows could be read"):
        prepare(digits_block.plan(digits), max_bad_rows=1000)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "validation"])
def test_no_row_of_a_part_can_be_read(part: int, digits_block: DataBlock, digits: Path) -> None:
    plan = digits_block.plan(digits)
    assert plan.parts is not None
    for row_id, of in zip(files_of(digits), plan.parts, strict=True):
        if of == part:
            (digits / row_id).write_bytes(b"")
    with pytest.raises(DataError, match="part"):
        digits_block.dataloaders(digits, max_bad_rows=1000)
    assert left_behind() == []


def test_validation_of_nothing_but_lone_classes(digits_block: DataBlock, digits: Path) -> None:
    """Its one row moves to training, and leaves an empty part."""
    lone = digits / "lone" / "0.png"
    lone.parent.mkdir()
    shutil.copy(digits / "0" / "0000.png", lone)

    def splitter(items: Sequence[Path]) -> tuple[list[int], list[int]]:
        (position,) = [i for i, item in enumerate(items) if item.parent.name == "lone"]
        return [i for i in range(len(items)) if i != position], [position]

    with pytest.warns(UserWarning, match="'lone'"), pytest.raises(DataError, match="validation part is empty"):
        replace(digits_block, splitter=splitter).dataloaders(digits)


def test_sizes_that_differ_within_a_shard(digits_block: DataBlock, digits: Path) -> None:
    Image.new("RGB", (9, 9)).save(digits / "0" / "0000.png")
    with pytest.raises(DataError, match=r"3x9x9 of uint8 and 3x8x8 of uint8.*Resize\(size\)"):
        replace(digits_block, item_tfms=()).dataloaders(digits)
    assert left_behind() == []


def test_sizes_that_differ_from_shard_to_shard(digits_block: DataBlock, digits: Path) -> None:
    """Each shard has one size, as when the pictures of each class come from another camera."""
    for i, name in enumerate(files_of(digits)):
        if i >= 64:  # rows of the first shard
            Image.new("RGB", (9, 9)).save(digits / name)
    with pytest.raises(DataError, match=r"Resize\(size\)"):
        replace(digits_block, item_tfms=()).dataloaders(digits)
    assert left_behind() == []


def test_dtypes_that_differ_from_shard_to_shard(digits_block: DataBlock, digits: Path) -> None:
    @dataclass
    class Halve(Transform):
        """Of later files, fractions: never to be cut to whole numbers in silence."""

        def encodes(self, x: PILImage) -> torch.Tensor:
            pixels = torch.from_numpy(np.array(x))
            return pixels / 2 if pixels[0, 0, 0] == 255 else pixels

    for name in files_of(digits)[64:]:
        Image.new("RGB", (8, 8), "white").save(digits / name)
    with pytest.raises(DataError, match="uint8"):
        replace(digits_block, item_tfms=Halve()).dataloaders(digits)


@pytest.mark.parametrize("step", ["get_y", "get_x", "item_tfms"])
def test_an_exception_names_the_row(step: str, digits_block: DataBlock, few_digits: Path) -> None:
    def broken(item: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        replace(digits_block, **{step: broken}).dataloaders(few_digits)
    where = {"get_y": "y", "get_x": "x", "item_tfms": "item_tfms"}[step]
    first = files_of(few_digits)[0]
    assert caught.value.__notes__ == [f"while preparing {where!r} of the row {first!r}"]
    assert left_behind() == []


def test_a_label_that_cannot_be_read_is_a_bad_row(digits_block: DataBlock, few_digits: Path) -> None:
    """Read once to fit the vocabulary and once to encode, but one bad row."""

    def label(item: Path) -> str:
        if item.name == "0001.png":
            raise UnreadableRow("no label")
        return item.parent.name

    block = replace(digits_block, get_y=label)
    with pytest.raises(DataError, match=r"1 rows cannot be read, 0 are allowed:\n  1/0001\.png: no label"):
        prepare(block.plan(few_digits))
    prepared = prepare(block.plan(few_digits), max_bad_rows=1)
    assert prepared.index["bad_rows"] == [{"id": "1/0001.png", "reason": "no label"}]
    assert prepared.rows == 119


def test_one_class(digits_block: DataBlock, few_digits: Path) -> None:
    with pytest.raises(DataError, match="at least two classes in the training part, found 'same'"):
        prepare(replace(digits_block, get_y=lambda item: "same").plan(few_digits))
    assert left_behind() == []


def test_a_class_only_in_validation(digits_block: DataBlock, few_digits: Path) -> None:
    def splitter(items: Sequence[Path]) -> tuple[list[int], list[int]]:
        valid = [i for i, item in enumerate(items) if item.parent.name == "2"]
        return [i for i in range(len(items)) if i not in valid], valid

    with pytest.raises(DataError, match="'2': only in the validation part"):
        replace(digits_block, splitter=splitter).dataloaders(few_digits)
    assert left_behind() == []


def test_a_value_that_is_no_tensor_is_explained(digits_block: DataBlock, few_digits: Path) -> None:
    """A block without transforms leaves the label a text, which no column can hold."""
    with pytest.raises((DataError, TypeError), match="'y'"):
        replace(digits_block, blocks=(ImageBlock(), TransformBlock())).dataloaders(few_digits)


# --- items and shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuple", "dict", "path in a tuple"])
def test_get_x_and_get_y_are_given_the_items_of_get_items(kind: str, digits_block: DataBlock, few_digits: Path) -> None:
    def get_items(source: Any) -> list[Any]:
        files = [few_digits / f for f in files_of(few_digits)]
        made: dict[str, Callable[[Path], Any]] = {
            "tuple": lambda f: (str(f), f.parent.name),
            "dict": lambda f: {"file": str(f), "label": f.parent.name},
            "path in a tuple": lambda f: (f, f.parent.name),
        }
        return [made[kind](f) for f in files]

    seen: list[Any] = []

    def get_x(item: Any) -> Any:
        seen.append(item)
        return item["file"] if kind == "dict" else item[0]

    block = replace(digits_block, get_items=get_items, get_x=get_x, get_y=lambda i: i["label"] if kind == "dict" else i[1])
    prepared = prepare(block.plan(few_digits))
    assert prepared.rows == 120
    given = get_items(None)
    assert all(item in given for item in seen)


def test_the_cache_is_where_the_person_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("FASTRAY_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "fastray"
