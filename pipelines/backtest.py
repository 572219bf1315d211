"""Rolling back-tests: a forecast is trained on what was known then, measured on what came, and so on to the end of the data."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from blocks.dataloaders import DataLoaders
from blocks.tensors import TensorForecast, as_plain
from pipelines.series import forecast_dataloaders, windows_of
from training import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Fold(NamedTuple):
    """One round. train, end: shares of the times up to which was trained, and measured. scores: the last epoch's, on what came.

    truth, forecast: of its windows that follow each other without overlap, (steps, channels) in their own units; of quantiles
    the middle one.
    """

    train: float
    end: float
    scores: dict[str, float]
    truth: np.ndarray
    forecast: np.ndarray


def backtest(
    source: Any,
    time: str,
    values: str | Sequence[str],
    learner: Callable[[DataLoaders], Learner],
    fit: Callable[[Learner], Any],
    *,
    folds: int = 4,
    valid_pct: float = 0.1,
    **settings: Any,
) -> list[Fold]:
    """Train `folds` times, each time on all there was before the next share `valid_pct` of the times, and measure on that.

        backtest(df, "date", "temp", forecast_learner, lambda learn: learn.fit_one_cycle(5, 3e-3), lookback=48, horizon=24)

    settings: of `forecast_dataloaders`. ValueError when nothing is left to train on.
    """
    if folds < 1 or not 0 < folds * valid_pct < 1:
        raise ValueError(
            f"{folds} folds of valid_pct={valid_pct} leave nothing of the times to train on: their product is below 1"
        )
    settings = {"cache": "off", **settings}
    found = []
    for left in reversed(range(folds)):
        end = 1 - left * valid_pct
        dls = forecast_dataloaders(source, time, values, valid_pct=valid_pct, until=end, **settings)
        learn = learner(dls)
        fit(learn)
        scores = {k.removeprefix("valid/"): v for k, v in learn.recorder.history[-1].items() if k.startswith("valid/")}
        found.append(Fold(end - valid_pct, end, scores, *_in_a_row(learn)))
    return found


def _in_a_row(learn: Learner) -> tuple[np.ndarray, np.ndarray]:
    # Truth and forecasts of the windows that follow each other without overlap, decoded.
    preds, targets = learn.get_preds()
    if preds.ndim > targets.ndim:
        preds = preds[..., preds.shape[-1] // 2]
    windows, target = windows_of(learn.dls), learn.dls.target
    assert target is not None
    every = max(1, -(-windows.horizon // windows.stride))
    of_all = (torch.cat(list(as_plain(x)[::every])) for x in (targets, preds))
    truth, forecast = (np.asarray(as_plain(target.type_tfms.decode(x.as_subclass(TensorForecast)))) for x in of_all)
    return truth, forecast


def plot_backtest(folds: Sequence[Fold], channel: int = 0) -> "Figure":
    """A figure of what came, in black, and of each round's forecasts, dashed: a panel a round, with its scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 * len(folds)), layout="constrained")
    for axis, fold in zip(figure.subplots(len(folds), squeeze=False)[:, 0], folds, strict=True):
        axis.plot(fold.truth[:, channel], linewidth=0.8, color="black")
        axis.plot(fold.forecast[:, channel], "--", linewidth=0.8, color="tab:blue")
        scores = ", ".join(f"{name} {value:.3g}" for name, value in fold.scores.items())
        axis.set_title(f"{fold.train:.0%} to {fold.end:.0%} of the times: {scores}", fontsize=8, loc="left")
    return figure
