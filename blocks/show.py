"""Pictures of data, as matplotlib figures that are returned and never shown by themselves."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from blocks.tensors import TensorImage


def show_samples(samples: Sequence[tuple[Any, ...]], titles: Sequence[str] | None = None) -> Figure:
    """A grid of decoded (input, target) samples, titled by their targets unless `titles` are given."""
    columns = math.ceil(math.sqrt(len(samples)))
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(2 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, sample, title in zip(axes, samples, titles or [str(s[-1]) for s in samples], strict=False):
        _draw(axis, sample[0])
        axis.set_title(title, fontsize=9)
    return figure


def _draw(axis: Any, value: Any) -> None:
    if isinstance(value, TensorImage):
        pixels = np.asarray(value.cpu()).transpose(1, 2, 0)
        axis.imshow(pixels, cmap="gray" if pixels.shape[-1] == 1 else None)
    else:
        axis.text(0.5, 0.5, str(value), ha="center", va="center", wrap=True)
