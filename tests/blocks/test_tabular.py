"""Tables: what is learned of the training part, codes and filled numbers in the store, gaps and unknown values afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from blocks import CategoryBlock, ColReader, DataBlock, DataError, Normalize, RandomSplitter, TensorTabular
from blocks.frames import add_datepart, add_elapsed_times, cont_cat_split
from blocks.tabular import Categorify, EncodeTable, FillMissing, RowReader, TabularBlock
from blocks.transform import transform_from_plain

CATS, CONTS = ("job", "level"), ("age", "pay")
PROCS = (Categorify, FillMissing, Normalize)
N = 300


def frame(n: int = N) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    df = pd.DataFrame(
        {
            "job": draw.choice(["nurse", "cook", None], n),
            "level": draw.integers(0, 4, n),
            "age": draw.integers(20, 60, n).astype(float),
            "pay": draw.normal(3000, 400, n).round(2),
            "stays": draw.choice(["no", "yes"], n),
        }
    )
    df.loc[::7, "age"] = np.nan
    return df


def block(
    cats: Any = CATS, conts: Any = CONTS, procs: Any = (Categorify, FillMissing, Normalize), **settings: Any
) -> DataBlock:
    return DataBlock(
        blocks=(TabularBlock(cats, conts, procs), CategoryBlock()),
        get_x=RowReader((*cats, *conts)),
        get_y=ColReader("stays"),
        **settings,
    )


def prepared(df: Any = None, **settings: Any) -> Any:
    return block(**settings).dataloaders(frame() if df is None else df, cache="off")


def fitted(dls: Any) -> EncodeTable:
    return dls.encode.columns[0].type_tfms.transforms[0]


def training_part(dls: Any, df: pd.DataFrame) -> pd.DataFrame:
    return df.iloc[sorted(map(int, dls.train.ids()))]


def test_numbers_are_filled_and_scaled_by_the_training_part() -> None:
    df = frame()
    dls = prepared(df)
    train = training_part(dls, df)
    filled = train[["age", "pay"]].fillna(train[["age", "pay"]].median())
    table = fitted(dls)
    assert table.fills == pytest.approx(tuple(train[["age", "pay"]].median()))
    assert table.means == pytest.approx(tuple(filled.mean()))
    assert table.stds == pytest.approx(tuple(filled.std(ddof=0)))
    assert table.gap_names == ("age",)
    row = df.iloc[0]
    codes, numbers = table(row.to_dict())
    assert codes.tolist() == [0 if pd.isna(row.job) else table.vocabs[0].index(row.job), 1 + row.level, 2]
    wanted = (table.fills[0] - table.means[0]) / table.stds[0], (row.pay - table.means[1]) / table.stds[1]
    assert numbers.tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_batch_has_codes_and_numbers() -> None:
    codes, numbers, target = prepared().one_batch()
    assert (type(codes), type(numbers)) == (TensorTabular, TensorTabular)
    assert (codes.dtype, codes.shape[1], numbers.dtype, numbers.shape[1]) == (torch.int64, 3, torch.float32, 2)
    assert len(target) == len(codes)


@pytest.mark.parametrize("kind", ["csv", "parquet", "rows"])
def test_files_and_rows_one_by_one_give_what_the_frame_gives(kind: str, tmp_path: Path) -> None:
    df = frame()
    if kind == "rows":
        source: Any = df.astype(object).where(df.notna(), None).to_dict("records")
    else:
        source = tmp_path / f"table.{kind}"
        df.to_csv(source, index=False) if kind == "csv" else df.to_parquet(source)
    here, there = (prepared(s, splitter=RandomSplitter(0.2, seed=3)) for s in (df, source))
    assert fitted(there).vocabs == fitted(here).vocabs
    for one, other in zip(there.valid, here.valid, strict=True):
        assert one.ids == other.ids
        for column, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(column, wanted)  # sums of other pieces differ in their last bits


def test_columns_of_one_kind_alone() -> None:
    assert [c.shape[1:] for c in prepared(cats=(), conts=("pay",)).one_batch()[:-1]] == [(1,)]
    assert [c.shape[1:] for c in prepared(cats=("job",), conts=()).one_batch()[:-1]] == [(1,)]


def test_decoding_gives_the_row_again() -> None:
    df = frame()
    dls = prepared(df)
    batch = dls.one_batch()
    ids = next(iter(dls.valid)).ids
    for (row, stays), number in zip(dls.decode_batch(batch), ids, strict=True):
        wanted = df.iloc[int(number)]
        assert stays == wanted.stays
        assert row["job"] == (None if pd.isna(wanted.job) else wanted.job)
        assert row["level"] == str(wanted.level)
        assert row["age"] == (None if np.isnan(wanted.age) else pytest.approx(wanted.age, rel=1e-4))
        assert row["pay"] == pytest.approx(wanted.pay, rel=1e-4)


@pytest.mark.parametrize(
    ("fill", "wanted"),
    [
        (FillMissing("mode"), lambda ages: ages.mode().min()),
        (FillMissing("constant", {"age": -1.0}), lambda _: -1.0),
        (FillMissing("constant"), lambda _: 0.0),
    ],
)
def test_other_ways_to_fill(fill: FillMissing, wanted: Any) -> None:
    df = frame()
    dls = prepared(df, procs=(Categorify(), fill))
    table = fitted(dls)
    assert table.fills[0] == wanted(training_part(dls, df).age)
    assert (table.means, table.stds) == ((0.0, 0.0), (1.0, 1.0))


def test_without_a_mark_for_gaps() -> None:
    table = fitted(prepared(procs=(Categorify, FillMissing(add_col=False), Normalize)))
    assert (table.gap_names, len(table.vocabs)) == ((), 2)


def test_what_training_never_saw() -> None:
    table = fitted(prepared())
    codes, numbers = table({"job": "pilot", "level": 9, "age": 33, "pay": None})
    assert codes.tolist() == [0, 0, 1]
    assert numbers[1].item() == pytest.approx((table.fills[1] - table.means[1]) / table.stds[1], rel=1e-6)


@pytest.mark.parametrize("value", [2, 2.0, "2", np.int64(2), np.float32(2)])
def test_a_whole_number_is_one_category_however_it_is_written(value: Any) -> None:
    codes, _ = fitted(prepared())({"job": None, "level": value, "age": 1, "pay": 1})
    assert codes[1] == 3


def test_the_fitted_transform_is_plain_data() -> None:
    table = fitted(prepared())
    assert transform_from_plain(table.to_plain()) == table


def test_a_constant_column_becomes_zeros() -> None:
    _, numbers, _ = prepared(frame().assign(pay=7.0)).one_batch()
    assert numbers[:, 1].abs().max() == 0


# --- mistakes ----------------------------------------------------------------------------------------------------------


def refused(df: pd.DataFrame, match: str, **settings: Any) -> None:
    with pytest.raises(DataError, match=match):
        prepared(df, **settings)


def test_text_among_the_numbers_is_named() -> None:
    df = frame().astype({"pay": object})
    df.loc[5, "pay"] = "much"
    df["pay"] = df["pay"].astype(str)
    refused(df, r"the column 'pay' holds .*string, such as 'much' \(row 5\): a number is wanted. Name it in cat_names")


def test_infinite_numbers_are_named() -> None:
    df = frame()
    df.loc[[3, 8], "pay"] = np.inf
    refused(df, r"the column 'pay' has 2 infinite values \(row 3, 8\): make them gaps")


def test_a_column_without_any_number() -> None:
    refused(frame().assign(age=np.nan), r"the column 'age' has no number in the training part.*FillMissing\('constant'\)")
    assert fitted(prepared(frame().assign(age=np.nan), procs=(Categorify, FillMissing("constant")))).fills == (0.0, 0.0)


def test_gaps_that_nothing_fills() -> None:
    refused(frame(), r"the column 'age' has 43 gaps: add FillMissing\(\) to the procs", procs=(Categorify, Normalize))


def test_columns_that_are_not_there() -> None:
    refused(frame(), "there is no column 'payy'.*Did you mean 'pay'", conts=("payy",))
    with pytest.raises(DataError, match="'pay'"):
        fitted(prepared())({"job": "cook", "level": 1, "age": 3})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"cat_names": ("a",), "cont_names": ("a",)}, "'a': a column is a category or a number, and named once"),
        ({}, "needs columns"),
        ({"cat_names": ("a",), "procs": (FillMissing,)}, "need Categorify"),
        ({"cont_names": ("a",), "procs": (FillMissing, FillMissing)}, "each once"),
        ({"cont_names": ("a",), "procs": (Normalize((0.5,), (0.5,)),)}, "learns a mean"),
        ({"cont_names": ("age",), "procs": (FillMissing("constant", {"agee": 1}),)}, "no column 'agee'.*'age'"),
    ],
)
def test_blocks_that_make_no_sense(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TabularBlock(**wrong)


def test_fill_strategies_are_named() -> None:
    with pytest.raises(ValueError, match="median, mode, constant"):
        FillMissing("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fill_vals are for"):
        FillMissing("median", {"a": 1})


# --- frames ------------------------------------------------------------------------------------------------------------


def test_parts_of_dates() -> None:
    df = pd.DataFrame({"saleDate": ["2024-02-29 13:30:00", "2023-12-31 00:00:10", None]})
    new = add_datepart(df, "saleDate", time=True)
    assert "saleDate" in df
    assert "saleDate" not in new
    first = {name: float(new.loc[0, f"sale{name}"]) for name in ("Year", "Week", "Dayofweek", "Is_month_end", "Hour", "Minute")}
    assert first == {"Year": 2024, "Week": 9, "Dayofweek": 3, "Is_month_end": 1, "Hour": 13, "Minute": 30}
    assert new.loc[1, "saleIs_year_end"] == 1
    assert new.loc[1, "saleElapsed"] == pd.Timestamp("2023-12-31 00:00:10").timestamp()
    assert new.iloc[2].isna().all()
    with pytest.raises(DataError, match="holds no dates"):
        add_datepart(pd.DataFrame({"d": ["soon"]}), "d")


def test_days_since_and_until_events() -> None:
    df = pd.DataFrame(
        {
            "date": pd.to_datetime(["2024-01-04", "2024-01-01", "2024-01-02", "2024-01-09"]),
            "event": [0, 0, 1, 1],
            "base": [1, 1, 1, 2],
        }
    )
    new = add_elapsed_times(df, ["event"], "date", "base")
    assert new["Afterevent"].tolist()[0] == 2
    assert np.isnan(new["Afterevent"][1])
    assert new["Beforeevent"][1] == -1
    assert np.isnan(new["Beforeevent"][0])
    assert new.loc[3, ["Afterevent", "Beforeevent"]].tolist() == [0, 0]


def test_days_since_events_where_the_index_repeats_and_the_event_has_gaps() -> None:
    half = pd.DataFrame({"date": pd.to_datetime(["2024-01-01", "2024-01-03"]), "event": [1.0, np.nan]})
    df = pd.concat([half.assign(base=1), half.assign(base=2)])
    new = add_elapsed_times(df, "event", "date", "base")
    assert new["Afterevent"].tolist() == [0, 2, 0, 2]
    assert new.index.tolist() == [0, 1, 0, 1]


def test_numbers_and_categories_are_told_apart() -> None:
    df = frame().assign(number=range(N), flag=True)
    assert cont_cat_split(df, dep_var="stays") == (["age", "pay", "number"], ["job", "level", "flag"])
