"""`fastray train series path=...`: a person's own series, with what the file says of them found and printed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from blocks.category import CategoryBlock
from blocks.datablock import DataBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import DataError
from blocks.frames import is_kept_index, is_number_column
from blocks.items import ColReader
from blocks.regression import RegressionBlock
from blocks.rows import missing_column
from blocks.splits import ColSplitter, RandomSplitter, Splitter
from blocks.ts import get_ts_series
from pipelines.series import (
    forecast_block,
    forecast_learner,
    read_table,
    regular,
    series_block,
    series_learner,
    series_of,
)
from pipelines.settings import BatchSize, given_path
from training import AgainstNaive, Learner, R2Score, Recipe, Schedule, accuracy, mae, one_cycle, recipe
from training.recipe import SettingError

if TYPE_CHECKING:
    import pandas as pd

SECOND, HOUR, DAY, YEAR = 1.0, 3600.0, 86_400.0, 365.25 * 86_400
CYCLES = (60 * SECOND, HOUR, DAY, 7 * DAY, YEAR)
TIME_NAMES = ("time", "timestamp", "date", "datetime", "ds", "step", "t")  # of columns of numbers that are times


@recipe
def series(
    *,
    path: str = "",
    time: str = "",
    values: str = "",
    group: str = "",
    label: str = "",
    known: str = "",
    arch: Literal["", "nlinear", "tcn", "inception_time", "resnet1d"] = "",
    lookback: NonNegativeInt = 0,
    horizon: NonNegativeInt = 0,
    valid_pct: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(10),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Your own series: what comes next, or with labels which class (or number) each is of. What is not said is found, and told.

    path: a CSV or Parquet file or a folder of them, a row a time; or a .ts file, or a folder of them, *_TEST.ts validating.
    time, values, group: the columns of the time, the channels (a,b), and of which series a row is. label: the column of each
    series' class or number, instead of a forecast. known: columns that are known of the future as well. arch: "nlinear", "tcn"
    to forecast, "inception_time", "resnet1d" for labels. lookback, horizon: steps that are seen, and foretold. valid_pct: the
    share that validates. seed: of the split, the order and the weights.
    """
    words = Words(path, time, _names(values), group, label, _names(known), lookback, horizon, valid_pct, seed)
    return Recipe(
        block=partial(own_block, words=words),
        source=partial(given_path, "series", path, "a CSV or Parquet file with a row a time, a .ts file, or a folder of them"),
        learner=partial(_own_learner, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@dataclass(frozen=True)
class Words:
    """What a person says of a file of series; empty or 0: to be found."""

    path: str = ""
    time: str = ""
    values: tuple[str, ...] = ()
    group: str = ""
    label: str = ""
    known: tuple[str, ...] = ()
    lookback: int = 0
    horizon: int = 0
    valid_pct: float = 0.2
    seed: int = 42


def own_block(source: Path, words: Words) -> DataBlock:
    """The DataBlock of a file or folder of series, after a look at it; prints what was found."""
    if source.suffix == ".ts" or (source.is_dir() and any(source.glob("*.ts"))):
        return _of_ts(source, words)
    frame = read_table(source)
    words = found_in(frame, words)
    if words.label:
        return _of_labels(frame, words)
    print(
        f"series: {words.horizon} steps ahead of {', '.join(words.values)} from {words.lookback}, by {words.time}"
        + (f", a series for each {words.group}" if words.group else "")
        + (f", with {', '.join(words.known)} known ahead" if words.known else "")
    )
    return forecast_block(
        words.time,
        words.values,
        group=words.group or None,
        known=words.known,
        lookback=words.lookback,
        horizon=words.horizon,
        valid_pct=words.valid_pct,
    )


# --- labels ------------------------------------------------------------------------------------------------------------


def _of_ts(source: Path, words: Words) -> DataBlock:
    rows = get_ts_series(source)
    parts = {row["is_valid"] for row in rows}
    how = "*_TEST.ts validates" if len(parts) == 2 else f"{words.valid_pct:.0%} at random validate"
    splitter: Splitter = ColSplitter("is_valid") if len(parts) == 2 else _at_random(words, rows)
    return replace(_labelled(rows, how, splitter), get_items=get_ts_series)


def _of_labels(frame: "pd.DataFrame", words: Words) -> DataBlock:
    items = partial(labelled_series, time=words.time, values=words.values, group=words.group, label=words.label)
    rows = items(frame)
    how = f"{words.valid_pct:.0%} of each {words.group} at random validate"
    return replace(_labelled(rows, how, _at_random(words, rows)), get_items=items)


def _labelled(rows: Sequence[dict[str, Any]], how: str, splitter: Splitter) -> DataBlock:
    numbers = all(isinstance(row["label"], float) for row in rows)
    lengths = sorted({len(row["values"]) for row in rows})
    of = "a number" if numbers else f"{len({row['label'] for row in rows})} classes"
    steps = f"{lengths[0]}" + (f" to {lengths[-1]}" if lengths[1:] else "")
    channels = rows[0]["values"].shape[1]
    print(f"series: {len(rows)} of {steps} steps and {channels} channel{'s' * (channels > 1)}, of {of}; {how}")
    return series_block(y_block=RegressionBlock() if numbers else CategoryBlock(), splitter=splitter)


def _at_random(words: Words, rows: Sequence[dict[str, Any]]) -> RandomSplitter:
    classes = not all(isinstance(row["label"], float) for row in rows)
    return RandomSplitter(words.valid_pct, words.seed, stratify=ColReader("label") if classes else None)


def labelled_series(source: Any, time: str, values: Sequence[str], group: str, label: str) -> list[dict[str, Any]]:
    """The series of a table with a row a time, each with its label: a class, or a number where some have fractions.

    time: "" where rows are in order and equally far apart. DataError where a series has several labels, or none.
    """
    frame = read_table(source)
    numbers = is_number_column(frame[label]) and not (frame[label].dropna() % 1 == 0).all()
    found = []
    for name, rows in series_of(frame, group):
        labels = rows[label].dropna().unique()
        if len(labels) != 1:
            said = f"{len(labels)} labels, such as {labels[0]!r} and {labels[1]!r}" if len(labels) else "no label"
            raise DataError(f"{group} {name!r} has {said} in the column {label!r}: a series has one")
        steps = regular(rows, time, list(values), f" of {group} {name!r}") if time else rows[list(values)].to_numpy(float)
        found.append({"series": str(name), "values": steps, "label": float(labels[0]) if numbers else str(labels[0])})
    return found


# --- what is found -----------------------------------------------------------------------------------------------------


def found_in(frame: "pd.DataFrame", words: Words) -> Words:
    """The words with what is not said found in the table. DataError when it cannot be, or a column is not there."""
    names = [str(c) for c in frame.columns if not is_kept_index(str(c))]
    for name in (words.time, *words.values, words.group, words.label, *words.known):
        if name and name not in names:
            raise DataError(missing_column(name, names))
    time = words.time or next((n for n in names if n not in (words.group, words.label) and _is_time(frame[n])), "")
    if not time and not words.label:
        raise DataError(f"no column of times was found: name it, time=...; there are {', '.join(names)}")
    taken = {time, words.group, words.label, *words.known}
    group = words.group
    if not group and (words.label or (time and frame[time].duplicated().any())):
        group = next((n for n in names if n not in taken and n not in words.values and _tells_apart(frame, n, time)), "")
        if not group:
            raise DataError(
                f"no column was found that says which series a row is of: name it, group=...; there are {', '.join(names)}"
            )
    values = words.values or tuple(n for n in names if n not in {*taken, group} and is_number_column(frame[n]))
    if not values:
        raise DataError(f"no column of numbers was found: name them, values=...; there are {', '.join(names)}")
    found = replace(words, time=time, group=group, values=values)
    return found if words.label else _with_lengths(frame, found)


def _is_time(column: "pd.Series") -> bool:
    import pandas as pd

    if is_number_column(column):
        return str(column.name).lower() in TIME_NAMES
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    some = column.dropna().head(100).astype(str)
    return bool(len(some)) and bool(pd.to_datetime(some, errors="coerce", format="mixed").notna().all())


def _tells_apart(frame: "pd.DataFrame", name: str, time: str) -> bool:
    # Whether the column names series: texts or whole numbers, each several times, and never twice at one time.
    column = frame[name]
    whole = not is_number_column(column) or bool((column.dropna() % 1 == 0).all())
    several = 2 * column.nunique() <= len(column)
    return whole and several and not (time and frame.duplicated([name, time]).any())


def _with_lengths(frame: "pd.DataFrame", words: Words) -> Words:
    # Two cycles are seen and one is foretold, of the day for hours, of the week for days, as far as the series are long enough.
    import pandas as pd

    counts = frame[words.group].value_counts() if words.group else pd.Series([len(frame)])
    n = int(counts.median())
    valid = int(words.valid_pct * n)
    season = _season(frame[frame[words.group] == counts.index[0]] if words.group else frame, words.time)
    horizon = words.horizon or max(1, min(season or 12, valid // 2))
    lookback = words.lookback or max(2, min(2 * (season or 12), (n - valid) // 2 - horizon))
    return replace(words, horizon=horizon, lookback=lookback)


def _season(rows: "pd.DataFrame", time: str) -> int | None:
    import pandas as pd

    if is_number_column(rows[time]):
        return None
    step = pd.to_datetime(rows[time], format="mixed").sort_values().diff().dt.total_seconds().median()
    return next((round(c / step) for c in CYCLES if step and c / step >= 6.5), None)


def _own_learner(dls: DataLoaders, arch: str) -> Learner:
    allowed = (
        ("nlinear", "tcn") if dls.encode and not dls.encode.columns[dls.encode.n_inp :] else ("inception_time", "resnet1d")
    )
    if arch and arch not in allowed:
        raise SettingError(f"arch={arch} is for another task: here it is {' or '.join(allowed)}")
    made: Any = arch or allowed[0]
    if allowed[0] == "inception_time":
        return series_learner(dls, made, metrics=accuracy if dls.vocab else [R2Score(), mae])
    learn = forecast_learner(dls, made)
    naive = next(c for c in learn.callbacks if isinstance(c, AgainstNaive))
    print(f"series: mae_naive is the error of what was there {naive.season} steps before, mae_linear that of a linear forecast")
    return learn


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
