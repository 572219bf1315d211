"""A plan carried out by Ray Data gives the same bytes as in this process, and its errors arrive as themselves."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray.cloudpickle
import ray.data

from blocks import CategoryBlock, ColReader, DataBlock, DataError, RandomSplitter, prepare
from cluster import dataloaders
from cluster.data import map_on_ray
from cluster.failures import as_bytes

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what this file defines travels by value, because workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def shards(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.arrow"))}


def test_here_is_as_through_ray_data(
    digits_block: DataBlock, few_digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = digits_block.dataloaders(few_digits).prepared
    monkeypatch.setenv("FASTRAY_CACHE", str(tmp_path / "other"))
    through_ray = dataloaders(digits_block, few_digits).prepared
    assert here is not None
    assert through_ray is not None
    assert not through_ray.reused
    assert shards(here.folder) == shards(through_ray.folder)
    assert here.index | {"seconds": 0} == through_ray.index | {"seconds": 0}


def as_parquet(frame: pd.DataFrame, folder: Path) -> Any:
    frame.to_parquet(folder / "a.parquet", row_group_size=70)
    return folder / "a.parquet"


def as_csv(frame: pd.DataFrame, folder: Path) -> Any:
    frame.to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


SOURCES = {"parquet": as_parquet, "csv": as_csv, "frame": lambda frame, folder: frame}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_tables_here_are_as_through_ray_data(
    source: Callable[[pd.DataFrame, Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"kind": ["cat", "dog", "owl", None] * 100, "n": range(400)})
    block = table_block()
    given = source(frame, tmp_path)
    here = block.dataloaders(given).prepared
    monkeypatch.setenv("FASTRAY_CACHE", str(tmp_path / "other"))
    through_ray = dataloaders(block, given).prepared
    assert here is not None
    assert through_ray is not None
    assert shards(here.folder) == shards(through_ray.folder) != {}
    assert here.index | {"seconds": 0} == through_ray.index | {"seconds": 0}


def table_block() -> DataBlock:
    return DataBlock(
        (CategoryBlock(add_na=True), CategoryBlock(vocab=tuple("0123456789"))),
        get_x=ColReader("kind"),
        get_y=lambda row: row["n"] % 10,
        splitter=RandomSplitter(0.25),
    )


def test_a_dataset_of_ray_is_a_source(tmp_path: Path) -> None:
    frame = pd.DataFrame({"kind": ["cat", "dog", "owl", None] * 100, "n": range(400)})
    made = ray.data.from_pandas([frame[:100], frame[100:130], frame[130:]]).map_batches(lambda batch: batch, batch_size=50)
    dls = dataloaders(table_block(), made)
    here = table_block().dataloaders(frame).prepared
    assert dls.prepared is not None
    assert here is not None
    assert "not kept across runs: a ray.data.Dataset has no lasting identity" in dls.plan_text
    for name in ("id", "part", "x", "y"):
        assert [v for t in dls.prepared.tables() for v in t[name].to_pylist()] == [
            v for t in here.tables() for v in t[name].to_pylist()
        ]


def test_the_second_time_nothing_is_decoded(digits_block: DataBlock, few_digits: Path) -> None:
    dataloaders(digits_block, few_digits)
    plan = digits_block.plan(few_digits)

    def nobody(*_: Any) -> Iterator[Any]:
        raise AssertionError("the data is prepared already")

    assert prepare(plan, map_work=nobody).reused


def broken_label(path: Path) -> str:
    raise KeyError(f"no label for {path.name}")


def test_an_error_of_the_users_code_arrives_as_itself(digits_block: DataBlock, few_digits: Path) -> None:
    with pytest.raises(KeyError, match="no label for") as caught:
        dataloaders(replace(digits_block, get_y=broken_label), few_digits)
    notes = "\n".join(caught.value.__notes__)
    assert "while preparing 'y' of the row '0/" in notes
    assert "broken_label" in notes


def test_unreadable_files_are_named(digits_block: DataBlock, few_digits: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(few_digits, folder)
    (folder / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(DataError, match=r"1 rows cannot be read, 0 are allowed:\n  1/broken.png: "):
        dataloaders(digits_block, folder)


class OfTwo(Exception):
    """An exception that cannot be made again from its message alone, as pickle would."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")


def test_an_error_that_cannot_be_made_again_arrives_with_its_words() -> None:
    error = OfTwo("a.png", "too dark")
    error.add_note("while preparing 'x'")
    found = ray.cloudpickle.loads(as_bytes(error))
    assert type(found) is RuntimeError
    assert str(found) == "OfTwo: a.png: too dark"
    assert found.__notes__ == ["while preparing 'x'"]
    whole = ray.cloudpickle.loads(as_bytes(DataError("no rows")))
    assert type(whole) is DataError
    assert str(whole) == "no rows"


def test_each_table_is_one_task() -> None:
    import pyarrow as pa

    tables = [pa.table({"n": [i] * (i + 1)}) for i in range(5)]
    rows = [t.to_pylist() for t in map_on_ray(lambda t: pa.table({"rows": [t.num_rows], "n": [t["n"][0].as_py()]}), tables)]
    assert sorted(r["n"] for (r,) in rows) == [0, 1, 2, 3, 4]
    assert all(r["rows"] == r["n"] + 1 for (r,) in rows)


def test_tasks_write_to_a_storage_url(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the nodes of a cluster share no disk; each has its own copies."""
    here = digits_block.dataloaders(few_digits).prepared
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/shared")
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    there = dataloaders(digits_block, few_digits, cache="disk").prepared
    assert here is not None
    assert there is not None
    assert there.where == f"file://{tmp_path}/shared/prepared/{there.fingerprint}"
    assert [t.to_pylist() for t in there.tables()] == [t.to_pylist() for t in here.tables()]
