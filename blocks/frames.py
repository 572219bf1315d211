"""What is done to a pandas DataFrame before it becomes a source: parts of dates, times since events, which columns are what."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blocks.errors import DataError
from blocks.rows import missing_column

if TYPE_CHECKING:
    import pandas as pd

# fastai's names, where they are not pandas' own.
PANDAS_NAMES = {"Dayofweek": "day_of_week", "Dayofyear": "day_of_year"}
DATE_PARTS = (
    *("Year", "Month", "Week", "Day", "Dayofweek", "Dayofyear"),
    *("Is_month_end", "Is_month_start", "Is_quarter_end", "Is_quarter_start", "Is_year_end", "Is_year_start"),
)
TIME_PARTS = ("Hour", "Minute", "Second")


def add_datepart(
    df: "pd.DataFrame", field_name: str, prefix: str | None = None, drop: bool = True, time: bool = False
) -> "pd.DataFrame":
    """A copy of `df` with the parts of the date in a column as columns: SaleYear, SaleMonth, ..., SaleElapsed of `Saledate`.

    prefix: of the new names; by default the column's without a final "date". drop: without the column itself. time: hour,
    minute and second too. Elapsed: seconds since 1970. A gap stays one in each. DataError where the column holds no dates.
    """
    import pandas as pd

    dates = _dates(df, field_name)
    prefix = re.sub(r"[Dd]ate$", "", field_name) if prefix is None else prefix
    parts: dict[str, Any] = {}
    for name in (*DATE_PARTS, *(TIME_PARTS if time else ())):
        values = dates.dt.isocalendar().week if name == "Week" else getattr(dates.dt, PANDAS_NAMES.get(name, name.lower()))
        there = dates.notna()
        parts[prefix + name] = values.astype("Float64").where(there) if not there.all() else values.astype(_kind(name))
    elapsed = (dates - pd.Timestamp(0, tz=dates.dt.tz)).dt.total_seconds()
    parts[f"{prefix}Elapsed"] = elapsed
    kept = df.drop(columns=field_name) if drop else df
    return pd.concat([kept, pd.DataFrame(parts, index=df.index)], axis=1)


def _kind(name: str) -> str:
    return "bool" if name.startswith("Is_") else "int64"


def _dates(df: "pd.DataFrame", name: str) -> Any:
    import pandas as pd

    if name not in df.columns:
        raise DataError(missing_column(name, [str(c) for c in df.columns]))
    column = df[name]
    if pd.api.types.is_datetime64_any_dtype(column):
        return column
    try:
        return pd.to_datetime(column)
    except (ValueError, TypeError) as error:
        raise DataError(f"the column {name!r} holds no dates: {str(error).splitlines()[0]}") from error


def add_elapsed_times(df: "pd.DataFrame", field_names: str | Sequence[str], date_field: str, base_field: str) -> "pd.DataFrame":
    """A copy of `df` with the days since and until the nearest event of each kind, within each group of `base_field`.

    field_names: columns of 0 and 1 (or booleans), 1 where the event is, a gap being none. New columns: After<name>, days since
    the last event (of this row or before), and Before<name>, days until the next, as a negative number; gaps where there is
    none. Rows keep their order.
    """
    import pandas as pd

    names = [field_names] if isinstance(field_names, str) else list(field_names)
    for name in (*names, base_field):
        if name not in df.columns:
            raise DataError(missing_column(name, [str(c) for c in df.columns]))
    dates = _dates(df, date_field).reset_index(drop=True)
    base = df[base_field].reset_index(drop=True)  # the frame's own index may name several rows alike
    order = pd.DataFrame({"base": base, "date": dates}).sort_values(["base", "date"], kind="stable").index
    new = df.copy()
    for name in names:
        there = (df[name].notna() & df[name].ne(0).fillna(False)).to_numpy(bool)
        event = dates.where(there).loc[order]
        groups = event.groupby(base.loc[order], sort=False)
        for column, nearest in ((f"After{name}", groups.ffill()), (f"Before{name}", groups.bfill())):
            new[column] = ((dates - nearest.reindex(dates.index)).dt.total_seconds() / 86_400).to_numpy()
    return new


def cont_cat_split(
    df: "pd.DataFrame", max_card: int = 20, dep_var: str | Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The names of a frame's columns of numbers and those of categories, less the target `dep_var`.

    Numbers are floats, and whole numbers of more than `max_card` different values. A column that pandas kept a frame's index
    in, in a Parquet file, is neither.
    """
    import pandas as pd

    targets = {dep_var} if isinstance(dep_var, str) else {*(dep_var or ())}
    cont_names: list[str] = []
    cat_names: list[str] = []
    for name in map(str, df.columns):
        if name in targets or is_kept_index(name):
            continue
        kind = df[name].dtype
        whole = pd.api.types.is_integer_dtype(kind)
        number = pd.api.types.is_float_dtype(kind) or (whole and df[name].nunique() > max_card)
        (cont_names if number else cat_names).append(name)
    return cont_names, cat_names


def is_kept_index(name: str) -> bool:
    """Whether pandas gave a column this name to keep a frame's index in a Parquet file."""
    return name.startswith("__index_level_")


def is_number_column(values: Any) -> bool:
    """Whether a column of a frame holds numbers, booleans not being such."""
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(values)) and not pd.api.types.is_bool_dtype(values)
