"""Which rows train and which validate: by chance, by position, by what the item is."""

import math
import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import (
    ColReader,
    ColSplitter,
    DataBlock,
    DataError,
    EndSplitter,
    FileSplitter,
    FuncSplitter,
    GrandparentSplitter,
    IndexSplitter,
    MaskSplitter,
    RandomSplitter,
    RandomSubsetSplitter,
    RegressionBlock,
    TimeSplitter,
    TrainTestSplitter,
    parent_label,
)
from blocks.fingerprint import fingerprint
from blocks.splits import LEFT_OUT, TRAIN, VALID, Rows, Splitter, as_splitter

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


# --- what each promises ------------------------------------------------------------------------------------------------

ROW_BY_ROW = [
    *(RandomSplitter(0.3), RandomSubsetSplitter(0.5, 0.2), IndexSplitter((0, 3, 3)), EndSplitter(0.3)),
    *(EndSplitter(0.4, valid_last=False), FuncSplitter(lambda item: item.startswith("class1")), ColSplitter("flag")),
]
AT_ONCE = [RandomSplitter(0.3, stratify=parent_label), TrainTestSplitter(0.3), TrainTestSplitter(3, stratify=parent_label)]
FEW = st.lists(st.sampled_from(IDS), min_size=5, max_size=60, unique=True)


def items_for(splitter: Splitter, ids: list[str]) -> Any:
    return [{"flag": hash(i) % 3 == 0} for i in ids] if isinstance(splitter, ColSplitter) else ids


@pytest.mark.parametrize("splitter", ROW_BY_ROW, ids=lambda s: type(s).__name__)
@settings(deadline=None, max_examples=20)
@given(ids=FEW, cut=st.integers(0, 60))
def test_parts_do_not_depend_on_the_partitioning(splitter: Splitter, ids: list[str], cut: int) -> None:
    assert not splitter.needs_all
    items = items_for(splitter, ids)
    whole = splitter.parts(Rows(ids, items))
    pieces = [
        splitter.parts(Rows(ids[a:b], items[a:b], first=a, total=len(ids)))
        for a, b in ((0, min(cut, len(ids))), (cut, len(ids)))
    ]
    assert whole.dtype == np.uint8
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("splitter", [*ROW_BY_ROW[:2], *AT_ONCE], ids=repr)
@settings(deadline=None, max_examples=20)
@given(ids=FEW, seed=st.integers(0, 2**32))
def test_parts_do_not_depend_on_the_order(splitter: Splitter, ids: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(ids, len(ids))
    before, after = (dict(zip(i, splitter.parts(Rows(i, i)), strict=True)) for i in (ids, shuffled))
    assert before == after


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), share=st.floats(0.05, 0.95))
def test_stratifying_keeps_the_shares_of_the_classes(sizes: list[int], share: float) -> None:
    ids = [f"c{c}/{i}" for c, size in enumerate(sizes) for i in range(size)]
    for splitter in (RandomSplitter(share, stratify=parent_label), TrainTestSplitter(share, stratify=parent_label)):
        assert splitter.needs_all
        valid = [ids[i] for i in splitter(ids)[1]]
        drawn = [sum(v.startswith(f"c{c}/") for v in valid) for c in range(len(sizes))]
        assert drawn == [min(round(share * size), size - 1) for size in sizes]


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.05, 0.95), seed=st.integers(-(2**40), 2**40))
def test_rows_without_names_are_drawn_by_their_number(share: float, seed: int) -> None:
    ids = np.arange(20_000)
    splitter = RandomSplitter(share, seed)
    parts = splitter.parts(Rows(ids, ids))
    assert abs(parts.mean() - share) < 4.5 * math.sqrt(share * (1 - share) / len(ids))
    assert np.array_equal(splitter.parts(Rows(pa.array(ids), ids)), parts)
    assert np.array_equal(splitter.parts(Rows(pa.array(ids[5000:6000]), ids)), parts[5000:6000])


def test_a_subset_leaves_the_rest_out() -> None:
    parts = RandomSubsetSplitter(0.3, 0.1, seed=3).parts(Rows(IDS, IDS))
    assert [abs((parts == p).mean() - share) < 0.015 for p, share in ((TRAIN, 0.3), (VALID, 0.1), (LEFT_OUT, 0.6))] == [
        True
    ] * 3
    train, valid = RandomSubsetSplitter(0.3, 0.1, seed=3)(IDS)
    assert set(valid) == set(RandomSplitter(0.1, seed=3)(IDS)[1])
    assert len(train) + len(valid) == (parts != LEFT_OUT).sum()
    with pytest.raises(ValueError, match="at most 1"):
        RandomSubsetSplitter(0.8, 0.3)


def test_train_test_counts_exactly() -> None:
    assert len(TrainTestSplitter(0.25)(IDS)[1]) == 5000
    assert len(TrainTestSplitter(7)(IDS)[1]) == 7
    assert len(TrainTestSplitter(99)(IDS[:10])[0]) == 1
    assert set(TrainTestSplitter(0.1)(IDS)[1]) < set(TrainTestSplitter(0.2)(IDS)[1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        TrainTestSplitter(0)


def test_by_position() -> None:
    assert IndexSplitter([1, 3])("abcde") == ([0, 2, 4], [1, 3])
    assert EndSplitter(0.4)("abcde") == ([0, 1, 2], [3, 4])
    assert EndSplitter(0.4, valid_last=False)("abcde") == ([2, 3, 4], [0, 1])
    assert MaskSplitter([True, False, True])("abc") == ([1], [0, 2])
    assert MaskSplitter([True, False, True]).parts(Rows([1, 2], "bc", first=1, total=3)).tolist() == [0, 1]
    with pytest.raises(DataError, match="position 5, but the source has 5 rows"):
        IndexSplitter([1, 5])("abcde")
    with pytest.raises(DataError, match="has 3 values, but the source has 2 rows"):
        MaskSplitter([True, False, True])("ab")


def test_by_folder() -> None:
    files = [Path("r/train/cat/1"), Path("r/valid/cat/2"), Path("r/test/cat/3"), Path("r/train/valid/4")]
    assert GrandparentSplitter()(files) == ([0, 3], [1])
    assert GrandparentSplitter(valid_name=("valid", "test"))(files) == ([0, 3], [1, 2])
    assert GrandparentSplitter()([str(f) for f in files]) == ([0, 3], [1])


def test_by_a_file_of_names(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("1.png\n\n 3.png \n")
    splitter = FileSplitter(tmp_path / "valid.txt")
    (tmp_path / "valid.txt").unlink()  # read once, so that it is not needed where the rows are
    assert splitter(["a/1.png", "a/2.png", "b/3.png"]) == ([1], [0, 2])
    assert repr(splitter) == f"FileSplitter(fname={tmp_path / 'valid.txt'!r})"


def test_by_a_column() -> None:
    table = pa.table({"is_valid": [True, False, True], "n": [0, 1, 1], "fold": ["a", "b", "c"], "gap": ["a", None, "b"]})
    ids = pa.array([0, 1, 2])
    dicts = table.to_pylist()
    for rows in (Rows(ids, table), Rows(ids, dicts), Rows(ids, [namedtuple("R", row)(**row) for row in dicts])):
        assert ColSplitter().parts(rows).tolist() == [1, 0, 1]
        assert ColSplitter("n").parts(rows).tolist() == [0, 1, 1]
        assert ColSplitter("fold", on="b").parts(rows).tolist() == [0, 1, 0]
        assert ColSplitter("fold", on=["a", "c"]).parts(rows).tolist() == [1, 0, 1]
        with pytest.raises(DataError, match="no column 'gone'"):
            ColSplitter("gone").parts(rows)
        with pytest.raises(DataError, match="holds string, not true and false"):
            ColSplitter("fold").parts(rows)
        with pytest.raises(DataError, match="is empty in 1 of them"):
            ColSplitter("gap", on="a").parts(rows)
        with pytest.raises(DataError, match=r"'n' holds int64, so on='valid' is none of its values"):
            ColSplitter("n", on="valid").parts(rows)
    coded = table.set_column(table.column_names.index("fold"), "fold", table["fold"].combine_chunks().dictionary_encode())
    assert ColSplitter("fold", on=["a", "c"]).parts(Rows(ids, coded)).tolist() == [1, 0, 1]
    assert FuncSplitter(lambda row: row["n"] > 0).parts(Rows(ids, table)).tolist() == [0, 1, 1]


def test_a_function_of_the_users() -> None:
    splitter = as_splitter(lambda items: ([0, 1], [3]))
    assert splitter.needs_all
    assert splitter.parts(Rows("abcd", "abcd")).tolist() == [TRAIN, TRAIN, LEFT_OUT, VALID]
    for lists in (([0, 1], [1]), ([0], [4]), ([-1], [0])):
        with pytest.raises(DataError, match="at most one part"):
            as_splitter(lambda items, lists=lists: lists)("abcd")


def test_splitters_have_fingerprints() -> None:
    every = [*ROW_BY_ROW, *AT_ONCE, MaskSplitter([True]), GrandparentSplitter(), as_splitter(parent_label)]
    assert len({fingerprint(s) for s in every}) == len(every)


@pytest.mark.parametrize(
    ("splitter", "text"),
    [
        (RandomSplitter(0.3, stratify=parent_label), "RandomSplitter(valid_pct=0.3, seed=42, stratify=parent_label)"),
        (IndexSplitter(range(9)), "IndexSplitter(valid_idx=<9 values>)"),
        (IndexSplitter((1, 2)), "IndexSplitter(valid_idx=(1, 2))"),
        (ColSplitter(on="a"), "ColSplitter(col='is_valid', on='a')"),
        (FuncSplitter(len), "FuncSplitter(func=len)"),
    ],
)
def test_splitters_print_short(splitter: Splitter, text: str) -> None:
    assert repr(splitter) == text


def test_the_latest_rows_validate() -> None:
    rows = Rows(pa.array(range(6)), pa.table({"t": [3, 1, 5, 4, 2, 0], "day": ["b", "a", "c", "c", "c", "a"]}))
    assert TimeSplitter("t", 0.34).parts(rows).tolist() == [0, 0, 1, 1, 0, 0]
    assert TimeSplitter("day", 0.2).parts(rows).tolist() == [0, 0, 1, 1, 1, 0]  # one time is not torn apart
    with pytest.raises(DataError, match="is empty in 1 of them"):
        TimeSplitter("t").parts(Rows(pa.array(range(2)), pa.table({"t": [1, None]})))
    frame = pa.table({"t": np.arange(100)[::-1], "x": np.arange(100.0)})
    block = DataBlock(blocks=(RegressionBlock(),), get_x=ColReader("x"), splitter=TimeSplitter("t", 0.1))
    assert block.dataloaders(frame, cache="off").valid.ids() == [str(i) for i in range(10)]  # type: ignore[union-attr]
