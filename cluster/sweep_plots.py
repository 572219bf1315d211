"""Figures of a sweep: lines over its settings, the score against each of them, learning curves."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.space import Choice, LogUniform
from cluster.swept import Swept, Trial, described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 12


def parallel(swept: Swept) -> "Figure":
    """A line a trial, an axis a drawn setting and the score last; better scores are darker, what failed is left out."""
    from matplotlib import colormaps

    trials, names = _scored(swept), _drawn(swept)
    figure, axes = _figure(1 + 1.8 * (len(names) + 1), 4)
    columns = [_places(swept.space.get(name), [t.drawn[name] for t in trials]) for name in names]
    scores, ticks = _places(None, [t.score for t in trials])
    for number, (name, (_, marks)) in enumerate(zip([*names, swept.metric], [*columns, (scores, ticks)], strict=True)):
        axes.axvline(number, color="0.8", linewidth=1)
        for height, label in marks:
            axes.text(number, height, f" {label}", fontsize=7, va="center")
        axes.text(number, 1.06, name, ha="center")
    better = scores if swept.mode == "max" else [1 - s for s in scores]
    for place in range(len(trials)):
        heights = [*(heights[place] for heights, _ in columns), scores[place]]
        axes.plot(range(len(heights)), heights, color=colormaps["viridis_r"](better[place]), alpha=0.8)
    axes.set_axis_off()
    return figure


def against_settings(swept: Swept) -> "Figure":
    """The score over each drawn setting, a point a trial; rates on a logarithmic axis."""
    from matplotlib.figure import Figure

    trials, names = _scored(swept), _drawn(swept)
    figure = Figure(figsize=(1 + 3 * max(1, len(names)), 3.2), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, max(1, len(names)), squeeze=False, sharey=True)[0], strict=False):
        values = [t.drawn[name] for t in trials]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numeric:
            axes.plot(values, [t.score for t in trials], "o")
            if isinstance(swept.space.get(name), LogUniform):
                axes.set_xscale("log")
                axes.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            words = [described({name: v}).partition("=")[2] for v in values]
            order = sorted(set(words))
            axes.plot([order.index(w) for w in words], [t.score for t in trials], "o")
            axes.set_xticks(range(len(order)), order, rotation=20, ha="right", fontsize=7)
        axes.set_xlabel(name)
    figure.supylabel(swept.metric)
    return figure


def curves(swept: Swept) -> "Figure":
    """The score epoch by epoch, a line a trial, those of the best named."""
    figure, axes = _figure(7, 4)
    for place, trial in enumerate(swept.trials):
        points = [(v["epoch"] + 1, v[swept.metric]) for v in trial.history if swept.metric in v]
        if points:
            label = f"{trial.name} {trial.describe()}" if place < MOST_LABELS else None
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="epoch", ylabel=swept.metric)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    return figure


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _scored(swept: Swept) -> list[Trial]:
    return [t for t in swept.trials if t.ended != "failed" and not math.isnan(t.score)]


def _drawn(swept: Swept) -> list[str]:
    return list(dict.fromkeys(name for t in swept.trials for name in t.drawn))


def _places(space: Any, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    # Heights from 0 to 1, and the labels of the axis with theirs.
    if not values:
        return [], []
    if isinstance(space, Choice) or not all(isinstance(v, int | float) for v in values):
        words = [described({"": v}).removeprefix("=") for v in values]
        order: Mapping[str, float] = {w: n for n, w in enumerate(sorted(set(words)))}
        most = max(1, len(order) - 1)
        return [order[w] / most for w in words], [(n / most, w) for w, n in order.items()]
    numbers = [math.log(v) if isinstance(space, LogUniform) else float(v) for v in values]
    low, high = min(numbers), max(numbers)
    heights = [(v - low) / (high - low) if high > low else 0.5 for v in numbers]
    ends = sorted(zip(heights, values, strict=True), key=lambda pair: pair[0])
    return heights, [(height, f"{value:.4g}") for height, value in (ends[0], ends[-1])]
