"""Figures of batches, results and top losses, chosen by the types of input and target."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from blocks import (
    Categorize,
    Category,
    LabeledBBox,
    MultiCategory,
    Pipeline,
    TensorBBox,
    TensorCategory,
    TensorImage,
    TensorImageBW,
    TensorMask,
    TensorPoint,
    TensorSeries,
    TensorTabular,
    TensorText,
    dispatch,
)
from blocks.show import plot_top_losses, show, show_batch, show_results

PICTURE = torch.zeros(3, 8, 8, dtype=torch.uint8).as_subclass(TensorImage)
MASK = torch.zeros(8, 8, dtype=torch.uint8).as_subclass(TensorMask)
POINTS = torch.tensor([[1.5, 2.5], [3.5, 4.5]]).as_subclass(TensorPoint)
BOXES = torch.tensor([[1.0, 2.0, 5.0, 6.0]]).as_subclass(TensorBBox)
X = torch.zeros(2, 3, 8, 8).as_subclass(TensorImage)
Y = torch.zeros(2).as_subclass(TensorCategory)


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def cells(figure: Figure) -> list[list[str]]:
    (axis,) = figure.axes
    (table,) = axis.tables
    found = table.get_celld()
    rows, columns = (max(place[i] for place in found) + 1 for i in (0, 1))
    return [[found[row, column].get_text().get_text() for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize(
    ("target", "title"),
    [(Category("cat"), "cat"), (MultiCategory(["a", "b"]), "a;b"), (2.34567, "2.346"), ([1.0, 2.5], "1, 2.5")],
)
def test_pictures_are_titled_by_their_targets(target: Any, title: str) -> None:
    figure = show_batch(X, Y, samples=[(PICTURE, target)] * 3)
    assert titles(figure) == [title] * 3
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]
    assert not plt.get_fignums()  # returned, not shown


@pytest.mark.parametrize(("target", "drawn"), [(MASK, "images"), (POINTS, "collections"), (BOXES, "patches")])
def test_masks_points_and_boxes_lie_over_the_picture(target: Any, drawn: str) -> None:
    axis = show_batch(X, target, samples=[(PICTURE, target)]).axes[0]
    assert len(axis.images) == 1 + (drawn == "images")
    assert len(getattr(axis, drawn)) == 1 + (drawn == "images")
    assert not axis.get_title()


def test_a_point_is_where_its_pixel_is_drawn() -> None:
    """The middle of pixel (1, 2) is (1.5, 2.5) as a point, and (1, 2) where matplotlib draws pixels."""
    axis = show((PICTURE, POINTS)).axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[1, 2], [3, 4]]
    (box,) = show((PICTURE, BOXES)).axes[0].patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((0.5, 1.5), 4, 4)


@pytest.mark.parametrize("target", [(LabeledBBox((BOXES, ["cat"])),), (BOXES, [Category("cat")])])
def test_boxes_have_names(target: tuple[Any, ...]) -> None:
    axis = show_batch(X, BOXES, samples=[(PICTURE, *target)]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["cat"]
    assert len(axis.patches) == 1
    assert not axis.get_title()


def test_boxes_that_are_padding_are_not_drawn() -> None:
    padded = torch.cat([BOXES, torch.zeros(2, 4)])
    axis = show((PICTURE, padded, ["cat", "#na#", "#na#"])).axes[0]
    assert len(axis.patches) == len(axis.texts) == 1


def test_boxes_and_their_labels_as_two_targets() -> None:
    axis = show_batch(X, BOXES, samples=[(PICTURE, BOXES, ["cat"])]).axes[0]
    assert len(axis.patches) == 1
    assert [t.get_text() for t in axis.texts] == ["cat"]
    assert axis.get_title() == ""


def test_grey_float_and_typed_values_are_drawn() -> None:
    assert show(torch.rand(1, 8, 8).as_subclass(TensorImageBW)).axes[0].images[0].get_cmap().name == "gray"
    assert show(torch.rand(3, 8, 8).as_subclass(TensorImage) * 3 - 1).axes[0].images[0].get_array().max() <= 1
    assert len(show(torch.rand(50, 2).as_subclass(TensorSeries)).axes[0].lines) == 2


@pytest.mark.parametrize("kind", [TensorText, TensorTabular])
def test_anything_else_is_a_table(kind: type[torch.Tensor]) -> None:
    x = torch.zeros(2, 5).as_subclass(kind)
    samples = [("a long text " * 50, Category("good")), ("short", Category("bad"))]
    table = cells(show_batch(x, Y, samples=samples))
    assert table[0] == ["input", "target"]
    assert table[2] == ["short", "bad"]
    assert len(table[1][0]) == 200
    assert cells(show_results(x, Y, samples=samples, predictions=["bad", "bad"]))[2] == ["short", "bad", "bad"]
    assert cells(plot_top_losses(x, Y, samples=samples, predictions=["bad", "bad"], losses=torch.tensor([1.23456, 0.5])))[1][
        2:
    ] == ["bad", "1.235"]
    assert cells(show_batch(x, None, samples=[("only input",)])) == [["input"], ["only input"]]


def test_results_say_whether_they_agree() -> None:
    figure = show_results(
        X, Y, samples=[(PICTURE, Category("cat")), (PICTURE, Category("dog"))], predictions=[Category("cat"), Category("cat")]
    )
    assert titles(figure) == ["cat\ncat", "dog\ncat"]
    assert [axis.title.get_color() for axis in figure.axes] == ["green", "red"]


def test_results_of_pictures_stand_beside_their_targets() -> None:
    figure = show_results(X, MASK, samples=[(PICTURE, MASK)] * 3, predictions=[MASK] * 3)
    assert titles(figure) == ["target", "prediction"] * 3
    assert all(len(axis.images) == 2 for axis in figure.axes)
    figure = plot_top_losses(X, POINTS, samples=[(PICTURE, POINTS)], predictions=[POINTS], losses=[0.25])
    assert titles(figure) == ["target", "prediction, loss 0.25"]


def test_top_losses() -> None:
    figure = plot_top_losses(X, Y, samples=[(PICTURE, Category("cat"))], predictions=[Category("dog")], losses=[2.0])
    assert titles(figure) == ["cat\ndog\nloss 2"]


def test_a_method_for_types_of_ones_own() -> None:
    class Spectrum(TensorSeries):
        pass

    @dispatch
    def show_batch(x: Spectrum, y: TensorCategory, *, samples: Sequence[tuple[Any, ...]]) -> str:
        return f"{len(samples)} spectra"

    @dispatch
    def draw(axis: Any, value: Spectrum) -> None:
        axis.set_title("a spectrum")

    from blocks.show import show_batch as ours

    assert ours is show_batch
    assert ours(torch.zeros(1, 4).as_subclass(Spectrum), Y, samples=[(1, 2)]) == "1 spectra"
    assert titles(
        ours(torch.zeros(1, 4, 1).as_subclass(TensorSeries), Y, samples=[(torch.zeros(1, 4).as_subclass(Spectrum), "a")])
    ) == ["a spectrum\na"]


def test_a_pipeline_shows_what_it_decodes() -> None:
    assert titles(Pipeline.of(Categorize(("cat", "dog"))).show((PICTURE, torch.tensor(1).as_subclass(TensorCategory)))) == [
        "dog"
    ]
