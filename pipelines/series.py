"""Values over time: which class a series is of, and what comes next.

dls = forecast_dataloaders(df, "date", "temp", lookback=48, horizon=24)
learn = forecast_learner(dls, season=24)
learn.fit_one_cycle(5, 3e-3)
learn.predict(df.temp[-48:]).decoded         # the next 24
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from blocks.category import CategoryBlock
from blocks.datablock import DataBlock, Getter, TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import DataError
from blocks.feed import Feed
from blocks.frames import is_number_column
from blocks.items import ColReader
from blocks.resident import Windows
from blocks.rows import missing_column
from blocks.series import KnownBlock, Scale, SeriesBlock
from blocks.sources import source_of
from blocks.splits import ColSplitter, RandomSplitter, Splitter
from blocks.tabular import TabularBlock
from blocks.tensors import TensorKnown, TensorTabular, as_plain
from blocks.transform import TransformLike
from pipelines.examples import package_folder
from pipelines.learners import n_outputs
from pipelines.settings import BatchSize
from pipelines.tabular import LOOK_ROWS, get_emb_sz, table_of
from training import (
    AgainstLinear,
    AgainstNaive,
    L1LossFlat,
    Learner,
    QuantileLoss,
    Recipe,
    Schedule,
    accuracy,
    covariate_forecast,
    fit_linear,
    inception_time,
    mae,
    naive_forecast,
    one_cycle,
    recipe,
    resnet1d,
)
from training.checks import listed
from training.series import FORECASTERS, NLinear

if TYPE_CHECKING:
    import pandas as pd

WINDOWS_TO_LOOK_AT = 100_000
UNITS = tuple(timedelta(**{unit: 1}) for unit in ("days", "hours", "minutes", "seconds"))
NEARLY = 0.02
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"inception_time": inception_time, "resnet1d": resnet1d}

# --- classes -----------------------------------------------------------------------------------------------------------


def series_block(
    values: str = "values",
    label: str = "label",
    *,
    y_block: TransformBlock | None = None,
    scale: Scale | None = "training",
    splitter: Splitter | None = None,
    batch_tfms: Sequence[TransformLike] = (),
) -> DataBlock:
    """The DataBlock of rows with a series, an array (steps,) or (steps, channels), and its label, by the names of both.

    y_block: CategoryBlock() unless given; RegressionBlock() for a number of each series. batch_tfms: such as `series_tfms()`.
    """
    return DataBlock(
        blocks=(SeriesBlock(scale), y_block or CategoryBlock()),
        get_x=ColReader(values),
        get_y=ColReader(label),
        splitter=splitter or RandomSplitter(0.2, seed=42),
        batch_tfms=batch_tfms,
    )


def series_learner(
    dls: DataLoaders, arch: Literal["inception_time", "resnet1d"] = "inception_time", **settings: Any
) -> Learner:
    """A Learner of the classes of series, of one length or of several, or of numbers. settings: of `Learner`."""
    if arch not in CLASSIFIERS:
        raise ValueError(f"arch is one of {', '.join(CLASSIFIERS)}, not {arch!r}")
    return Learner(dls, CLASSIFIERS[arch](n_in=dls.one_batch()[0].shape[-1], n_out=n_outputs(dls)), **settings)


# --- what comes next ---------------------------------------------------------------------------------------------------


def forecast_block(
    time: str,
    values: str | Sequence[str],
    *,
    group: str | None = None,
    known: Sequence[str] = (),
    cat_names: Sequence[str] = (),
    cont_names: Sequence[str] = (),
    lookback: int = 48,
    horizon: int = 24,
    stride: int = 1,
    valid_pct: float = 0.2,
    until: float = 1.0,
    scale: Scale | None = "training",
) -> DataBlock:
    """The DataBlock of a table with a row a time: windows of `lookback` steps, and the `horizon` steps that follow each.

    time, values: the columns of the time and of the channels. group: one that says which series a row is of. known: columns of
    numbers that are known of the future as well, such as holidays and prices. cat_names, cont_names: columns that say
    something of a whole series, categories and numbers, alike in all its rows. An item to predict is then a tuple: the values
    of `lookback` steps, what is known of these and of `horizon` steps more, and a mapping of what is static, those there are.

    The last share `valid_pct` of the times of each series validates: its first windows look back into the training part, which
    has no target there. until: the share of the times that there are at all, for a back-test. Windows are cut when a batch is
    made, so that a million of them cost no copy.
    """
    if scale == "sample":
        raise ValueError("scale='sample' scales a window by what comes after it: give scale='training' or None")
    static = (*cat_names, *cont_names)
    if static and group is None:
        raise ValueError("what is static tells series from each other: name the column that says which is which, group=...")
    names = (values,) if isinstance(values, str) else tuple(values)
    inputs: list[tuple[TransformBlock, Getter]] = [(SeriesBlock(scale, len(names)), ColReader("values"))]
    if known:
        inputs.append((KnownBlock(len(known)), ColReader("known")))
    cut = ("x0", "x1")[: len(inputs)] if known or static else ("x",)
    if static:
        inputs.append((TabularBlock(cat_names, cont_names), ColReader("static")))
    blocks, getters = zip(*inputs, strict=True)
    windows = {"samples": Windows(lookback, stride, cut, horizon)}
    return DataBlock(
        blocks=(replace(blocks[0], dls_kwargs=windows), *blocks[1:]),
        n_inp=len(blocks),
        getters=getters,
        get_items=partial(
            series_pieces,
            time=time,
            values=names,
            group=group,
            lookback=lookback,
            valid_pct=valid_pct,
            known=tuple(known),
            static=static,
            until=until,
        ),
        splitter=ColSplitter("is_valid"),
    )


def series_pieces(
    source: Any,
    time: str,
    values: Sequence[str],
    group: str | None,
    lookback: int,
    valid_pct: float,
    known: Sequence[str] = (),
    static: Sequence[str] = (),
    until: float = 1.0,
) -> list[dict[str, Any]]:
    """Two pieces of each series of a table: its training steps, and its validation steps with `lookback` steps before them.

    Rows are put in order of time, at equal steps. A value that is missing is the one before, since a line to the next would
    tell a window what follows it. DataError for times that come twice, or none, for rows of no series, and for a static column
    that changes within one.
    """
    frame = read_table(source)
    for name in (time, *values, *known, *static, *([] if group is None else [group])):
        if name not in frame.columns:
            raise DataError(missing_column(name, [str(c) for c in frame.columns]))
    pieces = []
    for name, rows in series_of(frame, group):
        of = f" of {group} {name!r}" if group else ""
        steps = regular(rows, time, [*values, *known], of)
        beside = {"static": {column: _only_value(rows[column], column, of) for column in static}} if static else {}
        end = round(until * len(steps))
        cut = end - int(valid_pct * len(steps))
        for is_valid, part in ((False, steps[:cut]), (True, steps[max(0, cut - lookback) : end])):
            if len(part):
                parts = {"values": part[:, : len(values)], **({"known": part[:, len(values) :]} if known else {})}
                pieces.append({"series": str(name), **parts, **beside, "is_valid": is_valid})
    return pieces


def series_of(frame: "pd.DataFrame", group: str | None) -> "Iterable[tuple[Any, pd.DataFrame]]":
    """The rows of each series by its name, in the order of the names. DataError for rows of none."""
    if group is None:
        return [("", frame)]
    if frame[group].isna().any():
        nameless = int(frame[group].isna().sum())
        raise DataError(f"the column {group!r} does not say of {nameless} rows which series they are of: leave them out")
    return frame.groupby(group, sort=True)


def _only_value(column: "pd.Series", name: str, of: str) -> Any:
    found = column.unique()
    if len(found) > 1:
        raise DataError(f"the column {name!r}{of} is not static: it holds {found[0]!r} and {found[1]!r}")
    return found[0]


def read_table(source: Any) -> "pd.DataFrame":
    """A table as a DataFrame: one as it is, or a CSV or Parquet file, several or a folder of them, by path or URL."""
    if hasattr(source, "columns") and hasattr(source, "groupby"):
        found: pd.DataFrame = source
        return found
    import pyarrow as pa

    rows = [b.table for p in source_of(source, source).pieces(LOOK_ROWS) for b in p.blocks(LOOK_ROWS)]
    tables = [t for t in rows if t is not None]
    if not tables or len(tables) < len(rows):
        raise DataError(f"{type(source).__name__} is no table of times: give a DataFrame, a CSV or a Parquet file")
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


def regular(rows: "pd.DataFrame", time: str, values: list[str], of: str) -> np.ndarray:
    """The values of a series at equal steps of time, (steps, channels), by the last one before: gaps stay before the first."""
    import pandas as pd

    times = rows[time]
    if not pd.api.types.is_numeric_dtype(times):
        try:
            times = pd.to_datetime(times)
        except (ValueError, TypeError) as error:
            raise DataError(f"the column {time!r} holds no times: {str(error).splitlines()[0]}") from error
    if times.isna().any():
        raise DataError(f"the column {time!r}{of} has {int(times.isna().sum())} rows without a time: leave them out")
    twice = times[times.duplicated()]
    if len(twice):
        raise DataError(
            f"{len(twice)} times{of} come twice, such as {twice.iloc[0]}: keep one row each, or name a group column"
        )
    if len(times) < 3:
        raise DataError(f"the series{of} has {len(times)} rows: there is nothing to learn from them")
    ordered = rows.set_index(times)[values].sort_index()
    places, step = _places(ordered.index)
    together = len(places) - len(np.unique(places))
    if together:
        warnings.warn(f"{together} rows{of} share a step of {step} with a later one, which counts", stacklevel=2)
    found = np.full((int(places[-1]) + 1, len(values)), np.nan)
    try:
        found[places] = ordered.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        odd = ", ".join(repr(v) for v in values if not is_number_column(rows[v]))
        raise DataError(f"the column {odd}{of} holds no numbers: {error}") from error
    return pd.DataFrame(found).ffill().to_numpy()


def _places(times: Any) -> tuple[np.ndarray, Any]:
    # The number of the step that each of some ordered times is nearest to, int64, and how long a step is: the usual distance,
    # which is a whole number of months, days, hours, minutes or seconds where it nearly is one.
    import pandas as pd

    step = times.to_series().diff().iloc[1:].median()
    since = times - times[0]
    if isinstance(step, pd.Timedelta):
        if step >= pd.Timedelta(days=28):  # months are of several lengths
            months = round(step / pd.Timedelta(days=30.44))
            since, step = pd.Index(12 * times.year + times.month), months
            since = since - since[0]
        else:
            step = next((n * u for u in UNITS if (n := round(step / u)) and abs(step / (n * u) - 1) < NEARLY), step)
    return np.asarray(since / step, np.float64).round().astype(np.int64), step


def forecast_dataloaders(
    source: Any,
    time: str,
    values: str | Sequence[str],
    *,
    batch_size: int = 64,
    seed: int = 0,
    cache: str = "disk",
    **settings: Any,
) -> DataLoaders:
    """Prepare a table of times in this process, and feed its windows. settings: of `forecast_block`."""
    return forecast_block(time, values, **settings).dataloaders(source, batch_size=batch_size, seed=seed, cache=cache)


def forecast_learner(
    dls: DataLoaders,
    arch: Literal["nlinear", "tcn"] = "nlinear",
    *,
    season: int | None = None,
    quantiles: Sequence[float] | None = None,
    **settings: Any,
) -> Learner:
    """A Learner of what comes next, by the absolute error, or of `quantiles` of it.

    arch: one linear layer, which begins at least squares, or "tcn", causal convolutions; covariates have an effect of their own
    beside either. Beside the model's error of each epoch stand those of two others: of what was there `season` steps before, by
    default as many as err least on training windows, and of a linear forecast in closed form. settings: of `Learner`.
    """
    windows = windows_of(dls)
    if season is not None and not 1 <= season <= windows.length:
        raise ValueError(f"season={season} is a number of steps from 1 to the lookback, {windows.length}")
    if arch not in FORECASTERS:
        raise ValueError(f"arch is 'nlinear' or 'tcn', not {arch!r}")
    some = list(_training_windows(dls))
    x, *beside, _ = some[0]
    n_quantiles = len(quantiles) if quantiles else None
    of_arch: dict[str, Any] = {"horizon": windows.horizon, "n_quantiles": n_quantiles}
    of_arch |= {"steps": windows.length} if arch == "nlinear" else {"channels": x.shape[2]}
    if beside:
        table = table_of(dls) if isinstance(beside[-1], TensorTabular) else None
        known = beside[0].shape[2] if isinstance(beside[0], TensorKnown) else 0
        of_series = {"emb_szs": get_emb_sz(table), "n_static": len(table.cont_names)} if table else {}
        model = covariate_forecast(arch=arch, settings=of_arch, channels=x.shape[2], n_known=known, **of_series)
    else:
        model = FORECASTERS[arch](**of_arch)
    linear = fit_linear(some)
    if arch == "nlinear":
        next(m for m in model.modules() if isinstance(m, NLinear)).begin_at(linear)
    against = [AgainstNaive(season or found_season(some)), AgainstLinear(linear)]
    settings["callbacks"] = [*against, *listed(settings.get("callbacks", ()))]
    if quantiles:
        settings.setdefault("loss_func", QuantileLoss(quantiles=tuple(quantiles)))
    else:
        settings.setdefault("loss_func", L1LossFlat())
        settings.setdefault("metrics", mae)
    return Learner(dls, model, **settings)


def _training_windows(dls: DataLoaders) -> Iterator[Any]:
    # Enough of them for what is to be found without training.
    n = 0
    for batch in dls.train:
        yield batch
        n += len(batch[0])
        if n >= WINDOWS_TO_LOOK_AT:
            return


def found_season(windows: Iterable[Any]) -> int:
    """As many steps before as tell most of what follows, 1 or more: the naive forecast by them errs least on `windows`."""
    errors = torch.zeros(())
    for x, *_, y in windows:
        seen, came = as_plain(x), as_plain(y)
        tried = range(1, seen.shape[1] + 1)
        errors = errors + torch.stack([(naive_forecast(seen, came.shape[1], s) - came).abs().sum() for s in tried])
    return 1 + int(errors.argmin())


def windows_of(dls: DataLoaders) -> Windows:
    """How the data's windows are cut. TypeError for data without a horizon."""
    samples = dls.valid.samples if isinstance(dls.valid, Feed) else None
    if not isinstance(samples, Windows) or not samples.horizon:
        raise TypeError("the data has no windows with a horizon: make it by forecast_dataloaders")
    return samples


# --- recipes -----------------------------------------------------------------------------------------------------------


@recipe
def temperature(
    *,
    arch: Literal["nlinear", "tcn"] = "nlinear",
    lookback: PositiveInt = 48,
    horizon: PositiveInt = 1,
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(20),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Seattle's temperature in the next hours: the normals of 8,759 hours of 2010. Needs fastray[examples].

    lookback, horizon: hours that are seen, and foretold. seed: of the order and the weights.
    """
    return Recipe(
        block=forecast_block("date", "temp", lookback=lookback, horizon=horizon, scale=None),
        source=lambda: package_folder("vega_datasets") / "_data" / "seattle-temps.csv",
        learner=partial(forecast_learner, arch=arch, season=24),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def cities(
    *,
    arch: Literal["inception_time", "resnet1d"] = "inception_time",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Seattle or San Francisco? 1,452 windows of 48 hourly temperatures, by their shape alone. Needs fastray[examples].

    Every fourth month validates; windows at its edges overlap with training ones. seed: of the order and the weights.
    """
    return Recipe(
        block=replace(series_block(label="city", scale="sample", splitter=ColSplitter("is_valid")), get_items=city_windows),
        source=lambda: package_folder("vega_datasets") / "_data",
        learner=partial(series_learner, arch=arch, metrics=accuracy),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


def city_windows(folder: Path) -> list[dict[str, Any]]:
    """Two days from every half day on, of both cities; those of every fourth 30 days validate."""
    import pandas as pd

    def windows() -> Iterator[dict[str, Any]]:
        for file, city in (("seattle-temps.csv", "Seattle"), ("sf-temps.csv", "San Francisco")):
            temps = pd.read_csv(Path(folder, file)).temp.to_numpy(float)
            for start in range(0, len(temps) - 48 + 1, 12):
                yield {"values": temps[start : start + 48], "city": city, "is_valid": start // 720 % 4 == 3}

    return list(windows())
