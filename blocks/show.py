"""Pictures of data, as matplotlib figures that are returned and never shown by themselves.

`show_batch`, `show_results` and `plot_top_losses` are chosen by the types of a batch's first input x and target y alone, so the
rest is given by name. A type of your own gets a method of its own:

    @dispatch
    def show_batch(x: MySeries, y: TensorCategory, *, samples: Sequence[tuple[Any, ...]]) -> Figure: ...

or, where a picture of one value will do, a method of `draw`. `samples` are decoded: inputs first, then targets.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from blocks.tensors import LabeledBBox, TensorBBox, TensorImage, TensorMask, TensorPoint, TensorSeries, TensorTabular
from blocks.transform import dispatch

Samples = Sequence[tuple[Any, ...]]
PIXEL = 0.5  # the middle of the first pixel is (0.5, 0.5) as a point, and (0, 0) to matplotlib
LONGEST_TEXT = 200  # characters of a text in a table
LINE = 60  # characters of a line in a cell


# --- one value ---------------------------------------------------------------------------------------------------------


@dispatch
def draw(axis: Any, value: TensorImage) -> None:
    """Draw one decoded value on matplotlib axes, over what is there; what is no picture goes into the title."""
    pixels = np.asarray(value.detach().cpu()).transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 1)
    axis.imshow(pixels, cmap="gray" if pixels.shape[-1] == 1 else None)


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: TensorMask) -> None:  # noqa: F811
    axis.imshow(np.asarray(value.cpu()), cmap="tab20", vmin=0, vmax=19, alpha=0.5, interpolation="nearest")


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: TensorPoint) -> None:  # noqa: F811
    points = np.asarray(value.cpu()).reshape(-1, 2) - PIXEL
    axis.scatter(points[:, 0], points[:, 1], s=12, c="lime", edgecolors="black", linewidths=0.5)


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: TensorBBox) -> None:  # noqa: F811
    _draw_boxes(axis, value, [""] * len(value))


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: LabeledBBox) -> None:  # noqa: F811
    boxes, labels = value
    _draw_boxes(axis, boxes, [str(label) for label in labels])


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: TensorSeries) -> None:  # noqa: F811
    axis.plot(np.asarray(value.cpu()), linewidth=0.8)


@dispatch  # type: ignore[no-redef]
def draw(axis: Any, value: object) -> None:  # noqa: F811
    title = "\n".join(filter(None, [axis.get_title(), as_text(value)]))
    axis.set_title(title, fontsize=9)


def _draw_boxes(axis: Any, boxes: Any, labels: Sequence[str]) -> None:
    for (left, top, right, bottom), label in zip((boxes - PIXEL).tolist(), labels, strict=True):
        if left >= right or top >= bottom:  # padding
            continue
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="lime", linewidth=1.5))
        if label:
            axis.text(left, top, label, color="black", fontsize=7, va="bottom", backgroundcolor="lime")


def draw_sample(axis: Any, sample: Sequence[Any]) -> None:
    """Draw the values of a decoded sample over each other; names that follow their boxes stand at the boxes."""
    values = list(sample)
    for i in range(len(values) - 1, 0, -1):
        boxes, names = values[i - 1 : i + 1]
        if isinstance(boxes, TensorBBox) and isinstance(names, list) and len(names) == len(boxes):
            values[i - 1 : i + 1] = [LabeledBBox((boxes, names))]
    for value in values:
        draw(axis, value)


def as_text(value: Any) -> str:
    """A value in a title or a cell: numbers to 4 digits, long texts cut."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if type(value) in (list, tuple):
        return ", ".join(map(as_text, value))
    text = str(value)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."


def show(value: Any) -> Figure:
    """A figure of one decoded value, or of the values of one sample over each other."""
    figure, (axis,) = grid(1)
    draw_sample(axis, value if type(value) is tuple else (value,))
    return figure


# --- a batch -----------------------------------------------------------------------------------------------------------


@dispatch
def show_batch(x: TensorImage | TensorSeries, y: object, *, samples: Samples) -> Figure:
    """A figure of some decoded samples; pictures with their targets over them or as titles, else a table."""
    figure, axes = grid(len(samples))
    for axis, sample in zip(axes, samples, strict=True):
        draw_sample(axis, sample)
    return figure


@dispatch  # type: ignore[no-redef]
def show_batch(x: TensorTabular, y: object, *, samples: Samples) -> Figure:  # noqa: F811
    return _table(_table_names(samples, ["target"]), [_cells(sample) for sample in samples])


@dispatch  # type: ignore[no-redef]
def show_batch(x: object, y: object, *, samples: Samples) -> Figure:  # noqa: F811
    return _table([*["input"] * (len(samples[0]) - 1), "target"] if len(samples[0]) > 1 else ["input"], samples)


@dispatch  # type: ignore[no-redef]
def show_batch(x: TensorSeries, y: TensorSeries, *, samples: Samples) -> Figure:  # noqa: F811
    return _forecasts(samples, [()] * len(samples))


@dispatch
def show_results(x: TensorImage | TensorSeries, y: object, *, samples: Samples, predictions: Sequence[Any]) -> Figure:
    """A figure of decoded samples and the decoded predictions for them: green where they agree, else red."""
    figure, axes = grid(len(samples))
    for axis, sample, predicted in zip(axes, samples, predictions, strict=True):
        draw_sample(axis, (*sample, predicted))
        axis.title.set_color("green" if as_text(sample[-1]) == as_text(predicted) else "red")
    return figure


@dispatch  # type: ignore[no-redef]
def show_results(  # noqa: F811
    x: TensorImage, y: TensorMask | TensorPoint, *, samples: Samples, predictions: Sequence[Any]
) -> Figure:
    return _beside(samples, predictions, [("target", "prediction")] * len(samples))


@dispatch  # type: ignore[no-redef]
def show_results(x: TensorTabular, y: object, *, samples: Samples, predictions: Sequence[Any]) -> Figure:  # noqa: F811
    rows = [(*_cells(sample), predicted) for sample, predicted in zip(samples, predictions, strict=True)]
    return _table(_table_names(samples, ["target", "prediction"]), rows)


@dispatch  # type: ignore[no-redef]
def show_results(  # noqa: F811
    x: TensorSeries, y: TensorSeries, *, samples: Samples, predictions: Sequence[Any]
) -> Figure:
    return _forecasts(samples, [(p,) for p in predictions])


@dispatch  # type: ignore[no-redef]
def show_results(x: object, y: object, *, samples: Samples, predictions: Sequence[Any]) -> Figure:  # noqa: F811
    rows = [(*sample, predicted) for sample, predicted in zip(samples, predictions, strict=True)]
    return _table([*["input"] * (len(samples[0]) - 1), "target", "prediction"], rows)


@dispatch
def plot_top_losses(
    x: TensorImage | TensorSeries, y: object, *, samples: Samples, predictions: Sequence[Any], losses: Sequence[float]
) -> Figure:
    """A figure of the samples with the highest losses: each with its target, the decoded prediction and the loss."""
    figure, axes = grid(len(samples))
    for axis, sample, predicted, loss in zip(axes, samples, predictions, losses, strict=True):
        draw_sample(axis, (*sample, predicted, f"loss {loss:.3g}"))
    return figure


@dispatch  # type: ignore[no-redef]
def plot_top_losses(  # noqa: F811
    x: TensorImage, y: TensorMask | TensorPoint, *, samples: Samples, predictions: Sequence[Any], losses: Sequence[float]
) -> Figure:
    return _beside(samples, predictions, [("target", f"prediction, loss {loss:.3g}") for loss in losses])


@dispatch  # type: ignore[no-redef]
def plot_top_losses(  # noqa: F811
    x: TensorTabular, y: object, *, samples: Samples, predictions: Sequence[Any], losses: Sequence[float]
) -> Figure:
    rows = [(*_cells(s), predicted, float(loss)) for s, predicted, loss in zip(samples, predictions, losses, strict=True)]
    return _table(_table_names(samples, ["target", "prediction", "loss"]), rows)


@dispatch  # type: ignore[no-redef]
def plot_top_losses(  # noqa: F811
    x: object, y: object, *, samples: Samples, predictions: Sequence[Any], losses: Sequence[float]
) -> Figure:
    rows = [(*sample, predicted, float(loss)) for sample, predicted, loss in zip(samples, predictions, losses, strict=True)]
    return _table([*["input"] * (len(samples[0]) - 1), "target", "prediction", "loss"], rows)


def _beside(samples: Samples, predictions: Sequence[Any], titles: Sequence[tuple[str, str]]) -> Figure:
    # Two pictures a sample: with the target over it, and with the prediction.
    figure, axes = grid(2 * len(samples), columns=2 * max(1, math.isqrt(len(samples)) // 2 or 1))
    pairs = zip(axes[::2], axes[1::2], samples, predictions, titles, strict=True)
    for left, right, sample, predicted, (of_target, of_prediction) in pairs:
        said = predicted if type(predicted) is tuple else (predicted,)
        for axis, values, title in ((left, sample, of_target), (right, (*sample[: -len(said)], *said), of_prediction)):
            draw_sample(axis, values)
            axis.set_title(title, fontsize=9)
    return figure


def _forecasts(samples: Samples, predictions: Sequence[tuple[Any, ...]]) -> Figure:
    # What was seen, what came, and dashed what was foretold: a value a step and channel, or several of a forecast's quantiles.
    figure, axes = grid(len(samples))
    for axis, (seen, *_, came), foretold in zip(axes, samples, predictions, strict=True):
        ahead = np.arange(len(seen), len(seen) + len(came))
        axis.plot(np.asarray(seen.cpu()), linewidth=0.8, color="grey")
        axis.plot(ahead, np.asarray(came.cpu()), linewidth=0.8, color="black")
        for values in foretold:
            axis.plot(ahead, np.asarray(values.cpu()).reshape(len(came), -1), "--", linewidth=0.8, color="tab:blue")
    return figure


def grid(n: int, columns: int | None = None) -> tuple[Figure, list[Any]]:
    """A figure with `n` small axes, as many a row as a column by default, and these axes."""
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(2 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    return figure, list(axes[:n])


def _cells(sample: Sequence[Any]) -> list[Any]:
    # The row of a table, a mapping by column once decoded, as cells; what follows it as it is.
    row, *rest = sample
    return [*row.values(), *rest] if isinstance(row, Mapping) else list(sample)


def _table_names(samples: Samples, rest: Sequence[str]) -> list[str]:
    row, *targets = samples[0]
    return [*(row if isinstance(row, Mapping) else ["input"]), *(rest if targets else rest[1:])]


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Figure:
    cells = [[textwrap.fill(as_text(cell), LINE) for cell in row] for row in [names, *rows]]
    heights = [0.15 + 0.15 * max(cell.count("\n") + 1 for cell in row) for row in cells]
    widths = [
        0.3 + 0.075 * max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*cells, strict=True)
    ]
    figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    table = axis.table(cells, cellLoc="left", colWidths=widths, bbox=Bbox.unit())
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_height(heights[row])
    return figure
