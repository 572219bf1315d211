"""Values over time: which class a series is of, and what comes next.

dls = forecast_dataloaders(df, "date", "temp", lookback=48, horizon=24)
learn = forecast_learner(dls, season=24)
learn.fit_one_cycle(5, 3e-3)
learn.predict(df.temp[-48:]).decoded         # the next 24
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from blocks.category import CategoryBlock
from blocks.datablock import DataBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import DataError
from blocks.feed import Feed
from blocks.frames import is_number_column
from blocks.items import ColReader
from blocks.resident import Windows
from blocks.rows import missing_column
from blocks.series import Scale, SeriesBlock
from blocks.splits import ColSplitter, RandomSplitter, Splitter
from pipelines.examples import package_folder
from training import (
    AgainstNaive,
    L1LossFlat,
    Learner,
    QuantileLoss,
    Recipe,
    Schedule,
    accuracy,
    inception_time,
    mae,
    nlinear,
    one_cycle,
    recipe,
    resnet1d,
    tcn,
)
from training.checks import listed

if TYPE_CHECKING:
    import pandas as pd

BatchSize = Annotated[int, Field(ge=2)]  # BatchNorm needs two rows
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"inception_time": inception_time, "resnet1d": resnet1d}

# --- classes -----------------------------------------------------------------------------------------------------------


def series_block(
    values: str = "values",
    label: str = "label",
    *,
    scale: Scale | None = "training",
    splitter: Splitter | None = None,
) -> DataBlock:
    """The DataBlock of rows with a series, an array (steps,) or (steps, channels), and its class, by the names of both."""
    return DataBlock(
        blocks=(SeriesBlock(scale), CategoryBlock()),
        get_x=ColReader(values),
        get_y=ColReader(label),
        splitter=splitter or RandomSplitter(0.2, seed=42),
    )


def series_learner(
    dls: DataLoaders, arch: Literal["inception_time", "resnet1d"] = "inception_time", **settings: Any
) -> Learner:
    """A Learner of the classes of series. settings: of `Learner`.

    Series of several lengths are padded with zeros in a batch, and the models see them: what is said of a short one depends on
    the longest beside it. Cut or resample them to one length where that matters.
    """
    if arch not in CLASSIFIERS:
        raise ValueError(f"arch is one of {', '.join(CLASSIFIERS)}, not {arch!r}")
    return Learner(dls, CLASSIFIERS[arch](n_in=channels_of(dls), n_out=len(dls.vocab)), **settings)


def channels_of(dls: DataLoaders) -> int:
    """How many channels the series have."""
    return int(next(iter(dls.valid))[0].shape[-1])


# --- what comes next ---------------------------------------------------------------------------------------------------


def forecast_block(
    time: str,
    values: str | Sequence[str],
    *,
    group: str | None = None,
    lookback: int = 48,
    horizon: int = 24,
    stride: int = 1,
    valid_pct: float = 0.2,
    scale: Scale | None = "training",
) -> DataBlock:
    """The DataBlock of a table with a row a time: windows of `lookback` steps, and the `horizon` steps that follow each.

    time, values: the columns of the time and of the channels. group: one that says which series a row is of. The last share
    `valid_pct` of the times of each series validates: its first windows look back into the training part, which has no target
    there. Windows are cut when a batch is made, so that a million of them cost no copy.
    """
    if scale == "sample":
        raise ValueError("scale='sample' scales a window by what comes after it: give scale='training' or None")
    names = (values,) if isinstance(values, str) else tuple(values)
    windows = Windows(lookback, stride, horizon=horizon)
    return DataBlock(
        blocks=(replace(SeriesBlock(scale, len(names)), dls_kwargs={"samples": windows}),),
        get_items=partial(series_pieces, time=time, values=names, group=group, lookback=lookback, valid_pct=valid_pct),
        get_x=ColReader("values"),
        get_y=(),
        splitter=ColSplitter("is_valid"),
    )


def series_pieces(
    source: Any, time: str, values: Sequence[str], group: str | None, lookback: int, valid_pct: float
) -> list[dict[str, Any]]:
    """Two pieces of each series of a table: its training steps, and its validation steps with `lookback` steps before them.

    Rows are put in order of time, at equal steps. A value that is missing is the one before, since a line to the next would
    tell a window what follows it. DataError for times that come twice, or none, and for rows of no series.
    """
    frame = _read(source)
    for name in (time, *values, *([] if group is None else [group])):
        if name not in frame.columns:
            raise DataError(missing_column(name, [str(c) for c in frame.columns]))
    if group is not None and frame[group].isna().any():
        nameless = int(frame[group].isna().sum())
        raise DataError(f"the column {group!r} does not say of {nameless} rows which series they are of: leave them out")
    pieces = []
    for name, rows in [("", frame)] if group is None else frame.groupby(group, sort=True):
        steps = _regular(rows, time, list(values), f" of {group} {name!r}" if group else "")
        cut = len(steps) - int(valid_pct * len(steps))
        for is_valid, part in ((False, steps[:cut]), (True, steps[max(0, cut - lookback) :])):
            if len(part):
                pieces.append({"series": str(name), "values": part, "is_valid": is_valid})
    return pieces


def _read(source: Any) -> "pd.DataFrame":
    import pandas as pd

    if isinstance(source, str | Path):
        return pd.read_parquet(source) if str(source).endswith(".parquet") else pd.read_csv(source)
    if hasattr(source, "columns") and hasattr(source, "groupby"):
        found: pd.DataFrame = source
        return found
    raise DataError(f"{type(source).__name__} is no table of times: give a DataFrame, a CSV or a Parquet file")


def _regular(rows: "pd.DataFrame", time: str, values: list[str], of: str) -> np.ndarray:
    # The values at equal steps of time, (steps, channels); gaps before the first one only.
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
    distances = ordered.index.to_series().diff().iloc[1:]
    step = distances.median()
    places = np.asarray((ordered.index - ordered.index[0]) / step, np.float64).round().astype(np.int64)
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
    season: int = 1,
    quantiles: Sequence[float] | None = None,
    **settings: Any,
) -> Learner:
    """A Learner of what comes next, by the absolute error, or of `quantiles` of it.

    arch: one linear layer, or "tcn", causal convolutions. season: the error of what was there so many steps before stands
    beside the model's at each epoch. settings: of `Learner`.
    """
    windows = _windows_of(dls)
    if not 1 <= season <= windows.length:
        raise ValueError(f"season={season} is a number of steps from 1 to the lookback, {windows.length}")
    n_quantiles = len(quantiles) if quantiles else None
    if arch == "nlinear":
        model = nlinear(steps=windows.length, horizon=windows.horizon, n_quantiles=n_quantiles)
    elif arch == "tcn":
        model = tcn(channels=channels_of(dls), horizon=windows.horizon, n_quantiles=n_quantiles)
    else:
        raise ValueError(f"arch is 'nlinear' or 'tcn', not {arch!r}")
    settings["callbacks"] = [AgainstNaive(season), *listed(settings.get("callbacks", ()))]
    if quantiles:
        settings.setdefault("loss_func", QuantileLoss(quantiles=tuple(quantiles)))
    else:
        settings.setdefault("loss_func", L1LossFlat())
        settings.setdefault("metrics", mae)
    return Learner(dls, model, **settings)


def _windows_of(dls: DataLoaders) -> Windows:
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
