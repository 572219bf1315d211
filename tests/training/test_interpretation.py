"""Interpretations: which rows are worst, what is confused, what is kept of it all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import metrics as skm
from torch import Tensor, nn

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Normalize,
    RandomSplitter,
    Resize,
    get_image_files,
    parent_label,
)
from training import BCEWithLogitsLossFlat, CrossEntropyLossFlat, Learner, MSELossFlat
from training.interpretation import (
    ClassificationInterpretation,
    Interpretation,
    RegressionInterpretation,
    SegmentationInterpretation,
)


class Same(nn.Module):
    """Predicts its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def says_its_input(x: Tensor, y: Tensor, loss: Any, batch: int = 4) -> Learner:
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    return Learner(DataLoaders(batches, batches), Same(), loss, device=torch.device("cpu"))


LOGITS, CLASSES = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 3


def test_the_worst_rows_are_found_over_all_batches() -> None:
    found = Interpretation.from_learner(says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat()), k=5)
    losses = nn.functional.cross_entropy(LOGITS, CLASSES, reduction="none")
    order = losses.argsort(descending=True)
    torch.testing.assert_close(found.losses, losses)
    assert found.top_losses(3)[1] == [str(i) for i in order[:3].tolist()]
    assert found.top_losses(2, largest=False)[1] == [str(i) for i in order.flip(0)[:2].tolist()]
    assert len(found.top_losses()[0]) == 23
    assert [row.loss for row in found.worst] == pytest.approx(losses[order[:5]].tolist())
    for row, i in zip(found.worst, order, strict=False):
        assert torch.equal(row.inputs[0], LOGITS[i])
        assert (row.targets, row.predicted) == ((CLASSES[i],), (LOGITS[i].argmax(),))


def test_only_the_worst_rows_are_kept() -> None:
    """Not even the batches that they were rows of."""
    found = Interpretation.from_learner(says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat()), k=5)
    assert len(found.worst) == 5
    assert all(row.inputs[0].untyped_storage().nbytes() == 12 for row in found.worst)
    with pytest.raises(ValueError, match=r"only the 5 worst rows were kept: make it with from_learner\(learn, k=9\)"):
        found.plot_top_losses(9)


def test_confusion_is_scikit_learns() -> None:
    found = ClassificationInterpretation.from_learner(says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat()))
    predicted = LOGITS.argmax(1)
    expected = skm.confusion_matrix(CLASSES, predicted)
    assert found.confusion_matrix().tolist() == expected.tolist()
    report = skm.classification_report(CLASSES, predicted, output_dict=True, zero_division=0.0)
    for name, values in found.report().items():
        theirs = report[name]
        assert list(values.values()) == pytest.approx([theirs[k] for k in ("precision", "recall", "f1-score", "support")])
    wrong = {(str(t), str(p), expected[t, p]) for t in range(3) for p in range(3) if t != p and expected[t, p] >= 3}
    confused = found.most_confused(3)
    assert set(confused) == wrong
    assert [n for *_, n in confused] == sorted((n for *_, n in confused), reverse=True)


def test_several_labels_have_a_report_but_no_confusion_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    labels = (LOGITS.roll(1, 0) > 0).float()
    found = ClassificationInterpretation.from_learner(says_its_input(LOGITS, labels, BCEWithLogitsLossFlat()))
    report = skm.classification_report(labels, LOGITS > 0, output_dict=True, zero_division=0.0)
    for name, values in found.report().items():
        assert list(values.values()) == pytest.approx([report[name][k] for k in ("precision", "recall", "f1-score", "support")])
    found.print_classification_report()
    assert "accuracy" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="rows with several labels have no confusion matrix"):
        found.most_confused()


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = ClassificationInterpretation.from_learner(says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat()))
    capsys.readouterr()
    found.print_classification_report()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["precision", "recall", "f1", "support"]
    accuracy = skm.accuracy_score(CLASSES, LOGITS.argmax(1))
    assert lines[-1].split() == ["accuracy", f"{accuracy:.3f}", "23"]


def test_pictures_of_confusion_show_every_count() -> None:
    found = ClassificationInterpretation.from_learner(says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat()))
    (axes,) = found.plot_confusion_matrix().axes
    assert [int(text.get_text()) for text in axes.texts] == found.confusion.flatten().tolist()
    (axes,) = found.plot_confusion_matrix(normalize=True).axes
    assert sum(float(text.get_text()) for text in axes.texts) == pytest.approx(3, abs=0.05)


def test_pixels_are_counted_but_those_ignored() -> None:
    maps = torch.randn(7, 3, 4, 5)
    masks = torch.randint(3, (7, 4, 5))
    masks[:, 0] = 255
    loss = CrossEntropyLossFlat(axis=1, ignore_index=255)
    found = SegmentationInterpretation.from_learner(says_its_input(maps, masks, loss))
    counts = masks != 255
    right, predicted = masks[counts], maps.argmax(1)[counts]
    assert found.confusion.tolist() == skm.confusion_matrix(right, predicted).tolist()
    expected = skm.jaccard_score(right, predicted, average=None)
    assert list(found.iou().values()) == pytest.approx(expected.tolist())
    assert len(found.losses) == 7


def test_residuals() -> None:
    x, y = torch.randn(9, 1), torch.randn(9)
    found = RegressionInterpretation.from_learner(says_its_input(x, y, MSELossFlat()), k=3)
    torch.testing.assert_close(found.residuals, x[:, 0] - y)
    torch.testing.assert_close(found.losses, found.residuals.square())
    over, spread = found.plot_residuals().axes
    assert len(over.collections[0].get_offsets()) == 9
    assert sum(bar.get_height() for bar in spread.patches) == 9


def test_real_pictures_are_drawn_with_their_names(few_digits: Path) -> None:
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(8),
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    dls = block.dataloaders(few_digits, batch_size=16)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), lr=1e-2)
    found = ClassificationInterpretation.from_learner(learn, k=4)
    assert list(found.vocab) == ["0", "1", "2"]
    assert sorted(found.ids) == sorted(i for batch in dls.valid for i in batch.ids)
    assert int(found.confusion.sum()) == len(found.ids)
    figure = found.plot_top_losses(4)
    assert len([axes for axes in figure.axes if axes.images]) == 4
    titles = " ".join(axes.get_title() for axes in figure.axes)
    assert f"{found.worst[0].loss:.3g}" in titles


@pytest.mark.parametrize(
    ("kind", "learn", "error", "message"),
    [
        (
            ClassificationInterpretation,
            lambda: says_its_input(LOGITS, LOGITS, MSELossFlat()),
            TypeError,
            "classes are wanted, but here are targets of type torch.float32",
        ),
        (RegressionInterpretation, lambda: says_its_input(LOGITS, LOGITS, MSELossFlat()), TypeError, "one number a row"),
        (
            Interpretation,
            lambda: Learner(DataLoaders([(LOGITS, CLASSES)], []), Same(), CrossEntropyLossFlat()),
            ValueError,
            "there is nothing to interpret",
        ),
    ],
)
def test_what_cannot_be_interpreted_is_said(kind: Any, learn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind.from_learner(learn())


def test_a_learner_is_as_it_was_afterwards() -> None:
    learn = says_its_input(LOGITS, CLASSES, CrossEntropyLossFlat())
    learn.fit(1)
    before = learn.callbacks, list(learn.recorder.history)
    Interpretation.from_learner(learn)
    assert ([*learn.callbacks], learn.recorder.history) == ([*before[0]], before[1])


class TwoTargets:
    """Cross entropy of the classes plus the squared error of a number."""

    reduction = "mean"

    def __call__(self, pred: Tensor, classes: Tensor, number: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(pred, classes, reduction="none") + (pred[:, 0] - number).square()
        return losses.mean() if self.reduction == "mean" else losses


class Decoded(TwoTargets):
    def decodes(self, pred: Tensor) -> tuple[Tensor, Tensor]:
        return pred.argmax(1), pred[:, 0]


def test_rows_with_several_targets_are_interpreted_by_their_loss() -> None:
    batches = [(LOGITS, CLASSES, LOGITS[:, 1])]
    dls = DataLoaders(batches, batches)
    losses = nn.functional.cross_entropy(LOGITS, CLASSES, reduction="none") + (LOGITS[:, 0] - LOGITS[:, 1]).square()
    for loss in (TwoTargets(), Decoded()):
        found = Interpretation.from_learner(Learner(dls, Same(), loss, device=torch.device("cpu")), k=2)
        torch.testing.assert_close(found.losses, losses)
        worst = int(losses.argmax())
        assert found.worst[0].targets == (CLASSES[worst], LOGITS[worst, 1])
    assert found.worst[0].predicted == (LOGITS[worst].argmax(), LOGITS[worst, 0])
    with pytest.raises(TypeError, match="residuals are of one target, but the data has 2"):
        RegressionInterpretation.from_learner(Learner(dls, Same(), Decoded()))


def test_a_loss_that_decodes_nothing_is_interpreted_and_not_drawn() -> None:
    found = Interpretation.from_learner(says_its_input(LOGITS, CLASSES, nn.CrossEntropyLoss()), k=2)
    assert found.worst[0].loss == pytest.approx(float(nn.functional.cross_entropy(LOGITS, CLASSES, reduction="none").max()))
    with pytest.raises(ValueError, match="the loss needs `decodes`"):
        found.plot_top_losses(2)


def test_nothing_is_worse_than_a_loss_that_is_no_number() -> None:
    rows = LOGITS.clone()
    rows[17] = float("nan")
    found = Interpretation.from_learner(says_its_input(rows, CLASSES, CrossEntropyLossFlat()), k=2)
    assert found.top_losses(1)[1] == ["17"]
    assert bool(found.worst[0].inputs[0].isnan().all())
    assert len(found.worst) == 2
