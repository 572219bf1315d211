"""Listing image files, labels from paths, and which rows validate."""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blocks import DataError, RandomSplitter, get_image_files, parent_label


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


# --- RandomSplitter ----------------------------------------------------------------------------------------------------

IDS = [f"class{i % 7}/{i:05d}.png" for i in range(20_000)]


def validating(splitter: RandomSplitter, ids: list[str]) -> set[str]:
    return {ids[i] for i in splitter(ids)[1]}


def test_each_row_is_in_one_part() -> None:
    train, valid = RandomSplitter(0.3)(IDS)
    assert sorted(train + valid) == list(range(len(IDS)))


def test_a_rows_part_depends_on_its_id_alone() -> None:
    splitter = RandomSplitter(0.3, seed=5)
    whole = validating(splitter, IDS)
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert validating(splitter, shuffled) == whole
    assert validating(splitter, shuffled[:1000]) == whole & set(shuffled[:1000])
    assert [bool(validating(splitter, [i])) for i in IDS[:50]] == [i in whole for i in IDS[:50]]


def test_a_larger_share_only_adds_rows() -> None:
    assert validating(RandomSplitter(0.1), IDS) < validating(RandomSplitter(0.2), IDS)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_the_share_holds_within_sampling_error(share: float) -> None:
    drawn = len(RandomSplitter(share, seed=0)(IDS)[1]) / len(IDS)
    assert abs(drawn - share) < 3 * math.sqrt(share * (1 - share) / len(IDS))


def test_the_seed_changes_the_parts() -> None:
    first, second = (validating(RandomSplitter(0.5, seed=s), IDS) for s in (1, 2))
    assert abs(len(first & second) / len(IDS) - 0.25) < 0.02  # independent draws
    assert first == validating(RandomSplitter(0.5, seed=1), IDS)


@pytest.mark.parametrize("seed", [-1, 0, 2**63])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 < len(RandomSplitter(seed=seed)(IDS[:100])[1]) < 100


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    train, valid = RandomSplitter(0.5)([b"\xff\xfe.png".decode("utf-8", "surrogateescape")])
    assert len(train) + len(valid) == 1


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, 20, math.nan])
def test_bad_share(share: Any) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        RandomSplitter(share)
