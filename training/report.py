"""What a trained Learner gets wrong, as pictures and text: what `report=true` on the command line adds to a run's record."""

import contextlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from blocks.tensors import TensorCategory, TensorImage, TensorMask, TensorMultiCategory, TensorNumber
from training.grad_cam import grad_cam_of
from training.interpretation import (
    ClassificationInterpretation,
    Interpretation,
    RegressionInterpretation,
    SegmentationInterpretation,
)
from training.losses import BaseLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.learner import Learner

MOST_CLASSES = 60  # of a confusion matrix that anybody can read
_KINDS: dict[type[Tensor], type[Interpretation]] = {
    TensorMask: SegmentationInterpretation,
    TensorCategory: ClassificationInterpretation,
    TensorMultiCategory: ClassificationInterpretation,
    TensorNumber: RegressionInterpretation,
}


@dataclass
class Report:
    """Figures by name, and text by name."""

    pictures: dict[str, "Figure"] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def report_of(learn: "Learner", k: int = 9) -> Report:
    """The `k` worst validation rows and, as the target has them, confusion, a report a class, residuals, and heat maps.

    Nothing for a loss that is not one of each row.
    """
    found = Report()
    kind = next((kind for target, kind in _KINDS.items() if issubclass(learn.target_type, target)), Interpretation)
    loss = learn.loss_func
    if not (loss.of_each_row if isinstance(loss, BaseLoss) else hasattr(loss, "reduction")):
        found.texts["report.txt"] = "the loss has no value for each row, so there are no worst ones"
        return found
    interpretation = kind.from_learner(learn, k=k)
    losses, ids = interpretation.top_losses(k)
    lines = [f"{value:10.4f}  {row}" for value, row in zip(losses.tolist(), ids, strict=True)]
    found.texts["top_losses.txt"] = "\n".join(["      loss  row", *lines])
    if all(row.predicted for row in interpretation.worst):
        found.pictures["top_losses.png"] = interpretation.plot_top_losses(len(interpretation.worst))
    if isinstance(interpretation, ClassificationInterpretation):
        if interpretation.confusion is not None and len(interpretation.vocab) <= MOST_CLASSES:
            found.pictures["confusion.png"] = interpretation.plot_confusion_matrix()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            interpretation.print_classification_report()
        found.texts["classes.txt"] = said.getvalue()
    if isinstance(interpretation, RegressionInterpretation):
        found.pictures["residuals.png"] = interpretation.plot_residuals()
    if issubclass(learn.target_type, TensorCategory) and isinstance(learn.dls.one_batch()[0], TensorImage):
        found.pictures["grad_cam.png"] = _heat_maps(learn, k)
    return found


def _heat_maps(learn: "Learner", k: int) -> "Figure":
    from blocks.show import grid

    rows: Any = next(iter(learn.dls.valid))[0][:k]
    figure, axes = grid(len(rows))
    for axis, x in zip(axes, rows, strict=True):
        grad_cam_of(learn, x).draw(axis)
    return figure
