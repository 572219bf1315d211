"""Series as an application: classes by shape, forecasts in the series' own units, no leak over the split, mistakes."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from blocks import DataError
from blocks.tensors import as_plain
from cluster.train import new_learner
from pipelines.backtest import backtest, plot_backtest
from pipelines.recipes import find_recipe
from pipelines.series import (
    forecast_block,
    forecast_dataloaders,
    forecast_learner,
    regular,
    series_block,
    series_learner,
    series_pieces,
)
from training import accuracy, load_predictor, one_cycle

there = importlib.util.find_spec("vega_datasets") is not None
needs_temperatures = pytest.mark.skipif(not there, reason="vega_datasets is not installed: it is in fastray[examples]")


def waves(n: int = 400) -> pd.DataFrame:
    """Two noisy waves, one of them rising, synthetic, an hour a row, in any order of rows."""
    draw, hours = np.random.default_rng(0), np.arange(n)
    frame = pd.DataFrame({"when": pd.Timestamp("2024-01-01") + pd.to_timedelta(hours, unit="h")})
    frame["tide"] = 50 + 0.1 * hours + 20 * np.sin(hours / 24 * 2 * np.pi) + draw.normal(0, 0.5, n)
    frame["wind"] = 5 * np.cos(hours / 12 * 2 * np.pi) + draw.normal(0, 0.2, n)
    return frame.sample(frac=1, random_state=0)


def test_forecasts_in_their_own_units_beat_the_naive_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dls = forecast_dataloaders(waves(), "when", ["tide", "wind"], lookback=24, horizon=6, cache="off")
    learn = forecast_learner(dls, season=24)
    preds, came = learn.get_preds()  # least squares is where it begins
    begun = float((preds - came).abs().mean())
    with learn.no_logging():
        learn.fit_one_cycle(5, 1e-3)
    assert begun == pytest.approx(learn.recorder.history[-1]["valid/mae_linear"], rel=1e-3)
    last = learn.recorder.history[-1]
    assert last["valid/mae"] < 0.95 * last["valid/mae_naive"]
    ordered = waves().sort_values("when")[["tide", "wind"]].to_numpy()
    seen, came = ordered[300:324], ordered[324:330]
    said = as_plain(learn.predict(seen).decoded).numpy()
    assert said.shape == (6, 2)
    assert np.abs(said - came).mean() < 2
    (exported,) = load_predictor(learn.export(tmp_path)).predict([seen])
    np.testing.assert_allclose(as_plain(exported.label).numpy(), said, rtol=1e-4, atol=1e-3)


def test_quantiles_and_convolutions() -> None:
    torch.manual_seed(0)
    dls = forecast_dataloaders(waves(), "when", "tide", lookback=24, horizon=6, cache="off")
    learn = forecast_learner(dls, "tcn", quantiles=(0.1, 0.5, 0.9))
    with learn.no_logging():
        learn.fit_one_cycle(8, 3e-3)
    preds, targets = learn.get_preds()
    below = [float((as_plain(targets) < preds[..., i]).float().mean()) for i in range(3)]
    assert below[0] < below[1] < below[2]
    assert learn.show_results() is not None
    assert dls.show_batch() is not None


def test_no_target_of_the_training_part_lies_in_the_validation_part() -> None:
    frame = waves(100).assign(tide=np.nan)
    frame["tide"] = (frame["when"] - frame["when"].min()).dt.total_seconds() / 3600  # the hour itself
    dls = forecast_dataloaders(frame, "when", "tide", lookback=10, horizon=5, scale=None, cache="off", valid_pct=0.2)
    train = [as_plain(y) for _, y in dls.train]
    valid = [(as_plain(x), as_plain(y)) for x, y in dls.valid]
    assert max(float(y.max()) for y in train) == 79
    assert min(float(y.min()) for _, y in valid) == 80
    assert min(float(x.min()) for x, _ in valid) == 70  # looking back is no leak


def test_missing_hours_are_the_ones_before_and_groups_are_series() -> None:
    frame = waves(60).assign(port="a")
    frame = pd.concat([frame.drop(frame.index[frame.when == pd.Timestamp("2024-01-01 05:00")]), frame.assign(port="b")])
    pieces = series_pieces(frame, "when", ["tide"], "port", 10, 0.2)
    assert [(p["series"], p["is_valid"], len(p["values"])) for p in pieces] == [
        ("a", False, 48),
        ("a", True, 22),
        ("b", False, 48),
        ("b", True, 22),
    ]
    there = frame[frame.port == "a"].set_index("when").tide
    assert pieces[0]["values"][5, 0] == pieces[0]["values"][4, 0] == there[pd.Timestamp("2024-01-01 04:00")]
    assert not np.isnan(pieces[0]["values"]).any()


def test_rows_that_share_a_step_are_told() -> None:
    frame = pd.DataFrame({"when": [0.0, 1.0, 2.0, 2.1, 3.0, 4.0], "tide": range(6)})
    with pytest.warns(UserWarning, match=r"1 rows share a step of 1\.0 with a later one"):
        (piece, *_) = series_pieces(frame, "when", ["tide"], None, 2, 0.0)
    assert piece["values"][:, 0].tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("freq", ["MS", "ME", "QS", "YS", "W", "D", "h", "15min"])
def test_equal_steps_of_calendars_and_clocks(freq: str) -> None:
    """Months and years of several lengths are a step each, and clocks that are a little off do not drift away."""
    when = pd.date_range("1970-01-31", periods=200, freq=freq)
    off = np.random.default_rng(0).normal(0, 0.02, 200) * (when[1] - when[0])
    frame = pd.DataFrame({"when": when if freq[-1] in "SE" else when + off, "tide": np.arange(200.0)}).drop(index=[50, 51])
    found = regular(frame, "when", ["tide"], "")[:, 0]
    assert found.tolist() == [49 if i in (50, 51) else i for i in range(200)]


def test_rows_of_no_series_are_told() -> None:
    frame = waves(20).assign(port=["a"] * 19 + [None])
    with pytest.raises(DataError, match="'port' does not say of 1 rows"):
        forecast_dataloaders(frame, "when", "tide", group="port", cache="off")


@pytest.mark.parametrize("arch", ["nlinear", "tcn"])
def test_one_quantile_alone(arch: Any) -> None:
    dls = forecast_dataloaders(waves(), "when", ["tide", "wind"], lookback=24, horizon=6, cache="off")
    learn = forecast_learner(dls, arch, quantiles=[0.9])
    with learn.no_logging():
        learn.fit(1)
    assert learn.get_preds()[0].shape == (dls.valid.n, 6, 2, 1)
    assert learn.predict(waves().sort_values("when")[["tide", "wind"]].to_numpy()[:24]).decoded.shape == (6, 2)


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (waves().drop(columns="tide"), "no column 'tide'"),
        (pd.concat([waves(), waves().head(1)]), "1 times come twice, such as"),
        (waves().assign(when="soon"), "holds no times"),
        (waves().assign(when=pd.NaT), "rows without a time"),
        (waves().head(2), "has 2 rows"),
        (waves().assign(tide="high"), "column 'tide' holds no numbers"),
    ],
)
def test_mistakes(frame: pd.DataFrame, match: str) -> None:
    with pytest.raises(DataError, match=match):
        forecast_dataloaders(frame, "when", "tide", cache="off")


def test_other_mistakes() -> None:
    with pytest.raises(DataError, match="no table of times"):
        forecast_dataloaders([1, 2, 3], "when", "tide")
    with pytest.raises(DataError, match="a window of 500: the longest has 320"):
        next(iter(forecast_dataloaders(waves(), "when", "tide", lookback=400, horizon=100, cache="off").train))
    dls = forecast_dataloaders(waves(), "when", "tide", cache="off")
    with pytest.raises(ValueError, match="'nlinear' or 'tcn', not 'arima'"):
        forecast_learner(dls, "arima")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scales a window by what comes after it"):
        forecast_block("when", "tide", scale="sample")
    with pytest.raises(ValueError, match="season=49 is a number of steps from 1 to the lookback, 48"):
        forecast_learner(dls, season=49)
    with pytest.raises(TypeError, match="no windows with a horizon"):
        forecast_learner(dls.new(samples=None))


@pytest.mark.parametrize("arch", ["inception_time", "resnet1d"])
def test_classes_by_their_shape(arch: Any) -> None:
    draw = np.random.default_rng(0)
    rows = [{"values": np.sin(np.arange(30) * (1 + i % 2) / 3) * draw.uniform(1, 9), "label": "ab"[i % 2]} for i in range(80)]
    torch.manual_seed(0)
    learn = series_learner(series_block(scale="sample").dataloaders(rows, cache="off", batch_size=16), arch, metrics=accuracy)
    with learn.no_logging():
        learn.fit_one_cycle(3, 3e-3)
    assert learn.recorder.history[-1]["valid/accuracy"] == 1
    assert learn.predict(np.sin(np.arange(30) / 3)).decoded == "a"
    with pytest.raises(ValueError, match="inception_time, resnet1d, not 'lstm'"):
        series_learner(learn.dls, "lstm")  # type: ignore[arg-type]


def shops(n: int = 200) -> pd.DataFrame:
    """Sales of two shops, synthetic: noise, ten more on days of a sale, which are known; the large one sells double."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"day": np.tile(np.arange(n), 2), "shop": np.repeat(["a", "b"], n), "sale": draw.integers(0, 2, 2 * n)}
    )
    frame["size"], frame["metres"] = np.where(frame.shop == "a", "small", "large"), np.where(frame.shop == "a", 50.0, 100.0)
    frame["sold"] = 10.0 * frame.sale * (1 + (frame.shop == "b")) + draw.normal(0, 0.3, 2 * n)
    return frame


@pytest.mark.parametrize("arch", ["nlinear", "tcn"])
def test_what_is_known_of_the_future_and_of_the_series_counts(arch: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    beside: dict[str, Any] = {"group": "shop", "known": ["sale"], "cat_names": ["size"], "cont_names": ["metres"]}
    dls = forecast_dataloaders(shops(), "day", "sold", lookback=8, horizon=4, cache="off", batch_size=32, **beside)
    learn = forecast_learner(dls, arch)
    with learn.no_logging():
        learn.fit_one_cycle(12, 1e-2)
    last = learn.recorder.history[-1]
    assert last["valid/mae"] < 0.3 * min(last["valid/mae_naive"], last["valid/mae_linear"])
    sale = [0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    item = (np.multiply(sale[:8], 20), sale, {"size": "large", "metres": 100})
    said = as_plain(learn.predict(item).decoded)
    torch.testing.assert_close(said[:, 0], torch.tensor([20.0, 0, 20, 0]), atol=3, rtol=0)
    (exported,) = load_predictor(learn.export(tmp_path)).predict([item])
    torch.testing.assert_close(as_plain(exported.label), said, rtol=1e-4, atol=1e-3)
    assert dls.show_batch() is not None
    assert learn.show_results() is not None


def test_what_changes_within_a_series_is_not_static() -> None:
    with pytest.raises(DataError, match="'sale' of shop 'a' is not static: it holds"):
        forecast_dataloaders(shops(), "day", "sold", group="shop", cat_names=["sale"], cache="off")


def test_a_backtest_goes_on_from_what_was_known_then() -> None:
    learners = []

    def learner(dls: Any) -> Any:
        learners.append(forecast_learner(dls, season=24))
        return learners[-1]

    def fit(learn: Any) -> None:
        with learn.no_logging():
            learn.fit(1)

    folds = backtest(waves(), "when", ["tide", "wind"], learner, fit, folds=3, lookback=24, horizon=6)
    assert [(round(f.train, 6), round(f.end, 6)) for f in folds] == [(0.7, 0.8), (0.8, 0.9), (0.9, 1)]
    tides = waves().sort_values("when")[["tide", "wind"]].to_numpy()
    for fold, first, learn in zip(folds, (280, 320, 360), learners, strict=True):
        np.testing.assert_allclose(fold.truth, tides[first : first + len(fold.truth)], atol=1e-3)
        assert fold.forecast.shape == fold.truth.shape == (36, 2)
        assert learn.dls.train.n == first - 24 - 6 + 1
        assert fold.scores["mae_naive"] > 0
    assert len(plot_backtest(folds).axes) == 3
    with pytest.raises(ValueError, match=r"5 folds of valid_pct=0\.2"):
        backtest(waves(), "when", "tide", learner, fit, folds=5, valid_pct=0.2)


@needs_temperatures
@pytest.mark.parametrize(
    ("name", "schedule", "metric", "bound"),
    [
        ("temperature", one_cycle(10), "mae", 0.097),
        pytest.param("cities", one_cycle(4), "accuracy", 0.978, marks=pytest.mark.slow),
    ],
)
def test_recipes(name: str, schedule: Any, metric: str, bound: float) -> None:
    recipe = find_recipe(name)(seed=0, schedule=schedule)
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, cache="off", **recipe.data_settings))
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    found = learn.recorder.history[-1][f"valid/{metric}"]
    assert found <= bound if metric == "mae" else found >= bound
