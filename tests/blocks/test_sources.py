"""Sources: each kind of table gives the same rows and the same prepared data; what is wrong with one is said in one line."""

import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import blocks.sources
from blocks import (
    AttrGetter,
    CategoryBlock,
    ColReader,
    ColSplitter,
    DataBlock,
    DataError,
    EndSplitter,
    FileGetter,
    ImageBlock,
    IndexSplitter,
    ItemGetter,
    Prepared,
    RandomSplitter,
    TensorNumber,
    TrainTestSplitter,
    TransformBlock,
    get_files,
    get_image_files,
    prepare,
)
from blocks.shards import as_array
from blocks.sources import Source, source_of
from blocks.storage import put

ROWS = 1000


def number(x: Any) -> torch.Tensor:
    return torch.tensor(float(x)).as_subclass(TensorNumber)


NUMBER = TransformBlock(type_tfms=(number,))


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    text = [f'a {i}, "said"\nin two lines' if i % 7 == 0 else f"row {i} — ü" for i in range(ROWS)]
    return pd.DataFrame(
        {
            "n": np.arange(ROWS),
            "value": rng.normal(size=ROWS).round(3),
            "text": text,
            "kind": rng.choice(["cat", "dog", "owl"], ROWS),
            "held": rng.random(ROWS) < 0.3,
        }
    )


def as_parquet(frame: pd.DataFrame, folder: Path) -> Any:
    frame.to_parquet(folder / "a.parquet", row_group_size=150, index=False)
    return folder / "a.parquet"


def as_parquets(frame: pd.DataFrame, folder: Path) -> Any:
    for i, start in enumerate((0, 1, 400)):
        frame[start : (1, 400, ROWS)[i]].to_parquet(folder / f"{i}.parquet", row_group_size=300, index=False)
    return str(folder)


def as_csv(frame: pd.DataFrame, folder: Path) -> Any:
    frame.to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


def as_csvs(frame: pd.DataFrame, folder: Path) -> Any:
    frame[:300].to_csv(folder / "0.csv", index=False)
    frame[300:].to_csv(folder / "1.csv", index=False)
    return [folder / "0.csv", folder / "1.csv"]


def as_url(frame: pd.DataFrame, folder: Path) -> Any:
    return f"file://{as_parquet(frame, folder)}"


def in_fsspec_memory(frame: pd.DataFrame, folder: Path) -> Any:
    import fsspec

    written = io.BytesIO()
    frame.to_parquet(written, index=False)
    fsspec.filesystem("memory").pipe_file("/tables/a.parquet", written.getvalue())
    return "memory://tables/a.parquet"


KINDS: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    "frame": lambda frame, folder: frame,
    "table": lambda frame, folder: pa.Table.from_pandas(frame),
    "parquet": as_parquet,
    "folder of parquets": as_parquets,
    "csv": as_csv,
    "csvs": as_csvs,
    "tsv": lambda frame, folder: frame.to_csv(folder / "a.tsv", index=False, sep="\t") or folder / "a.tsv",
    "url": as_url,
    "fsspec": in_fsspec_memory,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def source(request: pytest.FixtureRequest, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(blocks.sources, "RANGE_BYTES", 3000)  # so that a small file has several pieces
    return request.param(frame, tmp_path)


def items_of(source: Source, rows: int) -> list[dict[str, Any]]:
    pieces = pickle.loads(pickle.dumps(source.pieces(rows)))  # noqa: S301  as on their way to a task
    assert [p.first for p in pieces] == np.cumsum([0, *(p.rows for p in pieces)])[:-1].tolist()
    found = [block for piece in pieces for block in piece.blocks(rows)]
    assert np.array_equal(np.concatenate([block.ids for block in found]), np.arange(source.rows))
    assert all(len(block) <= rows for block in found)
    return [item for block in found for item in block.each()]


@pytest.mark.parametrize("rows", [7, 5000])
def test_every_kind_of_table_gives_the_same_rows(source: Any, rows: int, frame: pd.DataFrame) -> None:
    found = source_of(source, source)
    assert found.rows == ROWS
    assert items_of(found, rows) == frame.to_dict("records")


def stored(prepared: Prepared) -> pa.Table:
    return pa.concat_tables(prepared.tables())


def block_of(**changes: Any) -> DataBlock:
    settings: dict[str, Any] = {
        "blocks": (NUMBER, CategoryBlock()),
        "get_x": ColReader("value"),
        "get_y": ColReader("kind"),
        "splitter": RandomSplitter(0.2),
    }
    return DataBlock(**settings | changes)


def test_a_table_is_prepared_row_by_row(source: Any, frame: pd.DataFrame) -> None:
    plan = block_of().plan(source)
    assert plan.parts is None
    assert plan.unkept is None
    prepared = prepare(plan)
    table = stored(prepared)
    assert table["id"].to_pylist() == list(range(ROWS))
    assert np.array_equal(table["x"], frame["value"].astype(np.float32))
    assert [("cat", "dog", "owl")[i] for i in table["y"].to_pylist()] == frame["kind"].tolist()
    valid = RandomSplitter(0.2)(range(ROWS))[1]
    assert np.flatnonzero(table["part"]).tolist() == valid
    assert f"{ROWS - len(valid)} training rows, {len(valid)} validation rows" in plan.explain(prepared)
    assert "counted as they are read" in plan.explain()
    assert prepare(block_of().plan(source)).reused


@pytest.mark.parametrize(
    ("splitter", "valid"),
    [
        (ColSplitter("held"), lambda frame: np.flatnonzero(frame["held"])),
        (IndexSplitter((3, 999)), lambda frame: [3, 999]),
        (EndSplitter(0.1), lambda frame: range(900, 1000)),
        (TrainTestSplitter(0.25), lambda frame: TrainTestSplitter(0.25)(range(ROWS))[1]),
        (lambda items: (range(10, len(items)), [i for i, row in enumerate(items) if row["n"] < 10]), lambda frame: range(10)),
    ],
    ids=["column", "positions", "end", "all rows", "function"],
)
def test_every_splitter_splits_a_table(splitter: Any, valid: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    table = stored(prepare(block_of(splitter=splitter).plan(as_parquets(frame, tmp_path))))
    assert np.flatnonzero(table["part"]).tolist() == list(valid(frame))


GETTERS: dict[str, tuple[Any, Any]] = {
    "columns": (ColReader("value"), ColReader("kind")),
    "attributes": (AttrGetter("value"), AttrGetter("kind")),
    "positions": (ItemGetter(1), ItemGetter(3)),
    "functions": (lambda row: row["value"], lambda row: row.kind),
}


@pytest.mark.parametrize("getters", GETTERS.values(), ids=GETTERS)
def test_a_row_is_read_by_name_attribute_or_position(getters: Any, frame: pd.DataFrame) -> None:
    table = stored(prepare(block_of(getters=getters).plan(frame)))
    assert np.array_equal(table["x"], frame["value"].astype(np.float32))
    assert table["y"].to_pylist() == stored(prepare(block_of().plan(frame)))["y"].to_pylist()


def test_get_items_may_choose_rows(frame: pd.DataFrame) -> None:
    block = block_of(get_items=lambda source: source[source["n"] >= 100])
    assert prepare(block.plan(frame)).rows == ROWS - 100


def test_changed_content_changes_the_fingerprint(frame: pd.DataFrame, tmp_path: Path) -> None:
    def prints(of: pd.DataFrame, name: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        return [block_of().plan(source).fingerprint for source in (of, as_csv(of, folder), as_parquet(of, folder))]

    other = frame.assign(n=frame["n"] + 1)
    assert not set(prints(frame, "one")) & set(prints(other, "other"))
    assert block_of().plan(frame).fingerprint == block_of().plan(frame.copy()).fingerprint


def test_columns_of_csv_have_one_type_in_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers at first, later fractions, empty cells and words."""
    monkeypatch.setattr(blocks.sources, "RANGE_BYTES", 100)
    lines = ["a,b,c"] + [f"{i},{i},{i}" for i in range(50)] + ["1.5,,word"] * 50
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = items_of(source_of(tmp_path / "a.csv", None), 10)
    assert rows[3] == {"a": 3.0, "b": 3, "c": "3"}
    assert rows[-1] == {"a": 1.5, "b": None, "c": "word"}
    assert len(rows) == 100


@pytest.mark.parametrize("text", ["a,b\n", "a,b"])
def test_a_csv_without_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"no rows|it is empty"):
        block_of().plan(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text", ["\n\na,b\n1,2\n", "\r\na,b\r\n1,2\r\n", '\ufeff"a",b\n1,2', "\ufeff\na,b\n\n1,2\n\n"], ids=repr
)
def test_the_first_line_of_csv_that_is_not_empty_names_the_columns(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert items_of(source_of(tmp_path / "a.csv", None), 10) == [{"a": 1, "b": 2}]


def test_a_name_of_csv_in_two_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"a\nor c",b\n1,2\n')
    assert items_of(source_of(tmp_path / "a.csv", None), 10) == [{"a\nor c": 1, "b": 2}]


def test_an_ending_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TSV").write_text("a\tb\n1\t2\n")
    assert items_of(source_of(tmp_path / "A.TSV", None), 10) == [{"a": 1, "b": 2}]


def test_one_row(frame: pd.DataFrame, tmp_path: Path) -> None:
    for kind in (as_csv, as_parquet):
        assert items_of(source_of(kind(frame[:1], tmp_path), None), 10) == frame[:1].to_dict("records")


# --- what fails --------------------------------------------------------------------------------------------------------


def test_a_truncated_parquet_file(frame: pd.DataFrame, tmp_path: Path) -> None:
    file = as_parquet(frame, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read"):
        block_of().plan(file)


def test_a_parquet_file_damaged_in_the_middle(frame: pd.DataFrame, tmp_path: Path) -> None:
    file = as_parquet(frame, tmp_path)
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read"):
        prepare(block_of().plan(file))


def test_a_line_of_csv_with_too_many_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv' cannot be read: .*2 columns, got 3"):
        block_of().plan(tmp_path / "a.csv")


@pytest.mark.parametrize("change", [lambda t: t.rename(columns={"n": "m"}), lambda t: t.astype({"n": float})])
def test_files_with_other_columns(change: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    frame[:10].to_parquet(tmp_path / "0.parquet")
    change(frame[10:]).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet' has other columns than .*: 'n' is (missing|double, not int64)"):
        block_of().plan(tmp_path)


@pytest.mark.parametrize("reader", [ColReader("kinds"), lambda row: row["kinds"]], ids=["reader", "function"])
def test_a_column_that_is_not_there(reader: Any, frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="no column 'kinds'; there are n, value, text, kind, held"):
        prepare(block_of(get_y=reader).plan(frame))


@pytest.mark.parametrize("name", ["gone.csv", "gone.parquet", "gone", "memory://gone.parquet", "file:///gone/x.csv"])
def test_a_table_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        block_of().plan(name if "://" in name else tmp_path / name)


@pytest.mark.parametrize("get_y", [ColReader("kind"), ColReader("value")], ids=["fitted", "not fitted"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_an_empty_part_of_a_table(get_y: Any, part: str, frame: pd.DataFrame) -> None:
    column = frame.assign(held=part == "training")
    target = CategoryBlock() if get_y.cols == "kind" else NUMBER
    with pytest.raises(DataError, match=f"the {part} part is empty"):
        prepare(block_of(blocks=(NUMBER, target), get_y=get_y, splitter=ColSplitter("held")).plan(column))


def test_a_folder_without_tables(few_digits: Path) -> None:
    with pytest.raises(DataError, match=r"holds no table.*get_items=get_image_files"):
        block_of().plan(few_digits)


def test_a_thing_without_items() -> None:
    with pytest.raises(DataError, match="int holds no items"):
        block_of().plan(3)


def test_an_unreadable_row_is_named_by_its_position(frame: pd.DataFrame, tmp_path: Path) -> None:
    from blocks import UnreadableRow

    def value(row: Any) -> float:
        if row["n"] == 500:
            raise UnreadableRow("no value")
        return float(row["value"])

    plan = block_of(get_x=value).plan(as_parquets(frame, tmp_path))
    with pytest.raises(DataError, match="1 rows cannot be read, 0 are allowed:\n  500: no value"):
        prepare(plan)
    table = stored(prepare(plan, max_bad_rows=1))
    assert table["id"].to_pylist() == [i for i in range(ROWS) if i != 500]
    assert as_array(table.combine_chunks(), "y").shape == (ROWS - 1,)


# --- files -------------------------------------------------------------------------------------------------------------


def test_files_at_a_url(few_digits: Path, digits_block: DataBlock) -> None:
    """The same store as from the folder itself."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in few_digits.rglob("*.png"):
        memory.pipe_file(f"/digits/{file.relative_to(few_digits).as_posix()}", file.read_bytes())
    memory.pipe_file("/digits/.hidden/0.png", b"")
    here = prepare(digits_block.plan(few_digits))
    for url in (f"file://{few_digits}", "memory://digits"):
        plan = digits_block.plan(url)
        assert plan.unkept is None
        assert plan.fingerprint != here.fingerprint
        there = prepare(plan)
        assert [t.equals(h) for t, h in zip(there.tables(), here.tables(), strict=True)] == [True, True]
    prints = {digits_block.plan("memory://digits").fingerprint}
    for content in (b"12", b"34"):  # of one length, on a storage of which pyarrow learns no times
        memory.pipe_file("/digits/0/more.png", content)
        prints.add(digits_block.plan("memory://digits").fingerprint)
    assert len(prints) == 3


def test_a_table_that_changed_at_a_url_without_times() -> None:
    import fsspec

    prints = set()
    for text in ("value,kind\n1,a\n", "value,kind\n2,a\n"):
        fsspec.filesystem("memory").pipe_file("/changing/a.csv", text.encode())
        prints.add(block_of().plan("memory://changing/a.csv").fingerprint)
    assert len(prints) == 2


def test_files_at_a_url_in_some_folders() -> None:
    import fsspec

    for name in ("a/1.png", "a/b/2.PNG", "c/3.png", "c/4.txt", "5.png"):
        fsspec.filesystem("memory").pipe_file(f"/some/{name}", b"")
    url = "memory://some"
    assert get_image_files(url) == [f"{url}/{name}" for name in ("5.png", "a/1.png", "a/b/2.PNG", "c/3.png")]
    assert get_image_files(url, folders=["a", "."]) == [f"{url}/{name}" for name in ("5.png", "a/1.png", "a/b/2.PNG")]
    assert get_image_files(url, recurse=False) == [f"{url}/5.png"]
    assert get_files(url, [".TXT"]) == [f"{url}/c/4.txt"]
    assert FileGetter("a", (".png",))(url) == [f"{url}/a/1.png", f"{url}/a/b/2.PNG"]
    with pytest.raises(DataError, match="gone"):
        get_image_files("memory://gone")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    server_module = pytest.importorskip("moto.server")
    import boto3

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    for name, value in keys.items():
        monkeypatch.setenv(name.upper(), value)
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys).create_bucket(Bucket="data")
        yield f"s3://data/{{}}?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    finally:
        server.stop()


def test_files_and_tables_in_a_bucket(bucket: str, few_digits: Path, frame: pd.DataFrame, digits_block: DataBlock) -> None:
    files = sorted(few_digits.rglob("*.png"))[::10]
    for file in files:
        put(bucket.format("digits"), file.relative_to(few_digits).as_posix(), file.read_bytes())
    block = digits_block.new(blocks=(ImageBlock(), CategoryBlock(vocab=("0", "1", "2"))), splitter=EndSplitter(0.5))
    prepared = prepare(block.plan(bucket.format("digits")))
    assert stored(prepared)["id"].to_pylist() == [f.relative_to(few_digits).as_posix() for f in files]
    table = io.BytesIO()
    frame.to_parquet(table, index=False)
    put(bucket.format("tables"), "a.parquet", table.getvalue())
    for name in ("tables", "tables/a.parquet"):
        assert items_of(source_of(bucket.format(name), None), 300) == frame.to_dict("records")
    with pytest.raises(DataError, match="gone"):
        block_of().plan(bucket.format("gone.parquet"))


# --- explain -----------------------------------------------------------------------------------------------------------


def test_explain_as_a_value(frame: pd.DataFrame) -> None:
    plan = block_of(get_x=ColReader("value", pref="<b>")).plan(frame)
    explained = plan.explained(None)
    plain = json.loads(json.dumps(explained.to_json()))
    assert plain["fingerprint"] == plan.fingerprint
    assert [s["stage"] for s in plain["steps"]] == [line.split()[0] for line in plan.explain().splitlines()[1:]]
    assert {"stage": "split", "when": "once", "where": "tasks"}.items() <= plain["steps"][1].items()
    page = plan._repr_html_()
    assert page.count("<tr>") == len(plain["steps"]) + 1
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
