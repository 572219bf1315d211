"""Mean average precision of found boxes, exact: the area under each class's curve of precision over recall, and their mean.

torchmetrics has it only beside pycocotools, which has to be compiled; this is the same at one overlap, with every recall that
occurs in place of COCO's 101.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.detection import CORNERS, LABEL, SCORE, Checked
from training.metrics import Metric


@dataclass
class MeanAP(Metric):
    """The mean over the classes that occur of average precision: a found box is right if it overlaps one by at least `iou`.

    Each box is found once: by the one with the highest score (Everingham et al., the PASCAL Visual Object Classes challenge).
    """

    iou: float = 0.5
    name: str = ""
    higher_is_better: bool = True
    found: list[Tensor] = field(default_factory=list, repr=False)
    there: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.name = self.name or f"map_{round(100 * self.iou)}"

    def reset(self) -> None:
        self.found, self.there = [], []

    def accumulate(self, pred: Any, targ: Any, rows: int) -> None:
        boxes, labels = targ
        for row, corners, classes in zip(pred.found if isinstance(pred, Checked) else pred, boxes, labels, strict=True):
            row, corners, classes = row[row[:, SCORE] > 0].cpu(), corners[classes > 0].cpu(), classes[classes > 0].cpu()
            self.found.append(torch.stack([row[:, LABEL], row[:, SCORE], self._right(row, corners, classes)], 1))
            self.there.append(classes)

    def _right(self, row: Tensor, corners: Tensor, classes: Tensor) -> Tensor:
        # Of an image's found boxes, the best first, whether each finds one that is not found yet.
        from torchvision.ops import box_iou

        right = torch.zeros(len(row))
        if not len(corners):
            return right
        overlaps = box_iou(row[:, CORNERS], corners.float()) * (row[:, LABEL, None] == classes)
        for i in row[:, SCORE].argsort(descending=True).tolist():
            best = int(overlaps[i].argmax())
            if overlaps[i, best] >= self.iou:
                right[i] = 1
                overlaps[:, best] = 0
        return right

    def state(self) -> tuple[Tensor, Tensor] | None:
        return (torch.cat(self.found), torch.cat(self.there)) if self.there else None

    def value(self, states: Sequence[tuple[Tensor, Tensor]]) -> float:
        found, there = torch.cat([f for f, _ in states]), torch.cat([t for _, t in states])
        precisions = []
        for label in there.unique().tolist():
            of_class = found[found[:, 0] == label]
            right = of_class[of_class[:, 1].argsort(descending=True, stable=True), 2].double()
            precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
            # At each recall the best precision at that one or a higher.
            best = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
            precisions.append(float((best * right).sum() / (there == label).sum()))
        return sum(precisions) / len(precisions) if precisions else 0.0
