"""Losses: equal to torch's where torch has the same one, to the papers' formulas written out elsewhere; sums that add up."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks import tensors
from training.losses import (
    LOSSES,
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
    QuantileLoss,
    loss_for,
    loss_from_plain,
    loss_per_row,
    loss_to_plain,
)

ROWS, CLASSES = 7, 4
LOGITS, LABELS = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS) % CLASSES
MAPS = torch.randn(ROWS, CLASSES, 3, 5, generator=torch.Generator().manual_seed(1))
MASKS = torch.randint(CLASSES, (ROWS, 3, 5), generator=torch.Generator().manual_seed(2))
VALUES, FLOATS = LOGITS.sigmoid(), (LOGITS.roll(1, 0) > 0).float()
WEIGHT = (0.5, 2.0, 1.0, 3.0)
QUANTILES = (0.1, 0.3, 0.5, 0.9)
IGNORING = torch.where(LABELS == 1, -100, LABELS)

# Every loss with settings that matter, and data for it.
CASES: list[tuple[BaseLoss, Tensor, Tensor]] = [
    (CrossEntropyLossFlat(), LOGITS, LABELS),
    (CrossEntropyLossFlat(weight=WEIGHT), LOGITS, IGNORING),
    (CrossEntropyLossFlat(axis=1, weight=WEIGHT, label_smoothing=0.2), MAPS, MASKS),
    (CrossEntropyLossFlat(axis=1, ignore_index=2), MAPS, MASKS),
    (LabelSmoothingCrossEntropyFlat(0.1), MAPS.movedim(1, -1), MASKS),
    (FocalLossFlat(gamma=1.5, weight=WEIGHT), LOGITS, LABELS),
    (FocalLoss(), MAPS, MASKS),
    (DiceLoss(weight=WEIGHT), MAPS, MASKS),
    (DiceLoss(square_in_union=True, smooth=1.0), MAPS, MASKS),
    (BCEWithLogitsLossFlat(weight=WEIGHT, pos_weight=WEIGHT[::-1]), LOGITS, FLOATS),
    (BCELossFlat(), VALUES, FLOATS),
    (MSELossFlat(), LOGITS[:, :1], LABELS),
    (L1LossFlat(), LOGITS, FLOATS),
    (QuantileLoss(quantiles=QUANTILES), LOGITS, LOGITS[..., 0] + 0.5),
]
each_case = pytest.mark.parametrize(("loss", "pred", "targ"), CASES, ids=[str(number) for number in range(len(CASES))])


def test_every_loss_is_tried() -> None:
    assert {type(loss) for loss, _, _ in CASES} == {loss for loss in LOSSES.values() if loss.of_each_row}


@each_case
def test_sums_and_counts_of_parts_add_up_to_the_mean_of_all(loss: BaseLoss, pred: Tensor, targ: Tensor) -> None:
    parts = [loss.sum_and_count(pred[rows], targ[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, None))]
    total, count = (sum(halves) for halves in zip(*parts, strict=True))
    torch.testing.assert_close(total / count, loss(pred, targ))


@each_case
def test_without_reduction_the_sum_is_the_sum(loss: BaseLoss, pred: Tensor, targ: Tensor) -> None:
    each = type(loss)(**{**vars(loss), "reduction": "none"})(pred, targ)
    assert each.shape == ((ROWS, CLASSES) if isinstance(loss, DiceLoss) else targ.shape)
    torch.testing.assert_close(each.sum(), loss.sum_and_count(pred, targ)[0])


@each_case
def test_a_loss_becomes_plain_data_and_back(loss: BaseLoss, pred: Tensor, targ: Tensor) -> None:
    assert loss_from_plain(json.loads(json.dumps(loss_to_plain(loss)))) == loss


@each_case
def test_each_row_has_its_own_loss(loss: BaseLoss, pred: Tensor, targ: Tensor) -> None:
    """One row by itself, times what the mean of that row divides by other than the number of its targets."""
    rows = loss_per_row(loss, pred, targ)
    assert loss.reduction == "mean"
    for row in range(ROWS):
        alone = loss_per_row(loss, pred[row : row + 1], targ[row : row + 1])
        torch.testing.assert_close(rows[row], alone[0])
    if not hasattr(loss, "weight") or (loss.weight is None and getattr(loss, "ignore_index", -100) == -100):
        torch.testing.assert_close(rows.mean(), loss(pred, targ))


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze()
    return -(torch.tensor(WEIGHT)[labels] * (1 - p) ** 1.5 * p.log()).mean()


def dice(logits: Tensor, masks: Tensor) -> Tensor:
    p, found = logits.softmax(1), []
    for row in range(ROWS):
        for c in range(CLASSES):
            t = (masks[row] == c).float()
            found.append(1 - (2 * (p[row, c] * t).sum() + 1) / ((p[row, c] + t).sum() + 1))
    return torch.stack(found).mean()


@pytest.mark.parametrize(
    ("ours", "theirs", "pred", "targ"),
    [
        (CrossEntropyLossFlat(), nn.CrossEntropyLoss(), LOGITS, LABELS),
        (CrossEntropyLossFlat(weight=WEIGHT), nn.CrossEntropyLoss(torch.tensor(WEIGHT)), LOGITS, IGNORING),
        (CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss(), MAPS, MASKS),
        (CrossEntropyLossFlat(), lambda p, t: F.cross_entropy(p.movedim(-1, 1), t), MAPS.movedim(1, -1), MASKS),
        (LabelSmoothingCrossEntropyFlat(0.3), nn.CrossEntropyLoss(label_smoothing=0.3), LOGITS, LABELS),
        (FocalLossFlat(gamma=1.5, weight=WEIGHT), focal, LOGITS, LABELS),
        (FocalLoss(gamma=0), nn.CrossEntropyLoss(), MAPS, MASKS),
        (DiceLoss(smooth=1.0), dice, MAPS, MASKS),
        (BCEWithLogitsLossFlat(pos_weight=WEIGHT), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHT)), LOGITS, FLOATS),
        (BCELossFlat(), nn.BCELoss(), VALUES, FLOATS),
        (MSELossFlat(), lambda p, t: ((p.flatten() - t) ** 2).mean(), LOGITS[:, :1], LABELS),
        (L1LossFlat(), nn.L1Loss(), LOGITS, FLOATS),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    ours: BaseLoss, theirs: Callable[..., Tensor], pred: Tensor, targ: Tensor
) -> None:
    found, expected = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    values = ours(found, targ), theirs(expected, targ)
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(
    ("loss", "pred", "activation", "decoded"),
    [
        (CrossEntropyLossFlat(), LOGITS, LOGITS.softmax(1), LOGITS.argmax(1)),
        (CrossEntropyLossFlat(axis=1), MAPS, MAPS.softmax(1), MAPS.argmax(1)),
        (DiceLoss(), MAPS, MAPS.softmax(1), MAPS.argmax(1)),
        (BCEWithLogitsLossFlat(thresh=0.7), LOGITS, LOGITS.sigmoid(), LOGITS.sigmoid() > 0.7),
        (BCELossFlat(), VALUES, VALUES, VALUES > 0.5),
        (MSELossFlat(), LOGITS, LOGITS, LOGITS),
    ],
)
def test_activation_and_decodes(loss: BaseLoss, pred: Tensor, activation: Tensor, decoded: Tensor) -> None:
    torch.testing.assert_close(loss.activation(pred), activation)
    torch.testing.assert_close(loss.decodes(loss.activation(pred)), decoded)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (tensors.TensorCategory, CrossEntropyLossFlat()),
        (tensors.TensorMask, CrossEntropyLossFlat(axis=1)),
        (tensors.TensorMultiCategory, BCEWithLogitsLossFlat()),
        (tensors.TensorNumber, MSELossFlat()),
        (tensors.TensorPoint, MSELossFlat()),
        (tensors.TensorSeries, MSELossFlat()),
        (tensors.TensorText, CrossEntropyLossFlat()),
    ],
)
def test_the_usual_loss_of_each_target(kind: type[Tensor], expected: BaseLoss) -> None:
    assert loss_for(kind) == expected
    assert loss_for(kind) is not loss_for(kind)


def test_weights_may_be_a_tensor_and_follow_the_prediction() -> None:
    loss = CrossEntropyLossFlat(weight=torch.tensor(WEIGHT))
    assert loss == CrossEntropyLossFlat(weight=WEIGHT)
    assert loss(LOGITS.double(), LABELS).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MSELossFlat(reduction="average"), "reduction='average' is not known: one of mean, sum, none"),
        (lambda: MSELossFlat()(LOGITS, LABELS), "the model must give as many outputs as there are targets"),
        (lambda: CrossEntropyLossFlat()(MAPS, MASKS), r"give the loss the axis of the classes, CrossEntropyLossFlat\(axis=1\)"),
        (lambda: loss_for(Tensor), "pass loss_func=... to the Learner"),
        (lambda: loss_to_plain(F.mse_loss), "not one of the losses an export can name"),
        (lambda: loss_from_plain({"name": "os.system"}), "it names the loss 'os.system'"),
        (lambda: loss_from_plain({"name": "MSELossFlat", "x": 1}), r"MSELossFlat has the settings \['reduction'\]"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_per_row_needs_a_reduction_to_switch_off() -> None:
    torch.testing.assert_close(loss_per_row(nn.MSELoss(), LOGITS, FLOATS), (LOGITS - FLOATS).square().mean(1))
    with pytest.raises(TypeError, match="mse_loss has no `reduction`"):
        loss_per_row(F.mse_loss, LOGITS, FLOATS)
