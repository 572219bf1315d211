"""Detection: targets in and boxes out, losses of the model in the ordinary loop, and what found boxes are worth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blocks import BBoxBlock, BBoxLblBlock, DataBlock, DataLoaders, ImageBlock, RandomSplitter, Resize
from training import DetectionLoss, GiveTargets, Learner, MeanAP, detection_model, encoder_and_rest, load_predictor, report_of
from training.detection import DETECTORS, Checked

SMALL = "shufflenet_v2_x0_5"


def box(*corners: float, label: int, score: float = 1.0) -> list[float]:
    return [*corners, label, score]


LEFT, RIGHT, TOP = (-1.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0), (-1.0, -1.0, 1.0, -0.5)


def mean_ap(found: list[list[list[float]]], there: list[list[list[float]]], **settings: Any) -> float:
    metric = MeanAP(**settings)
    most = max(map(len, there))
    padded = torch.tensor([rows + [[0.0] * 6] * (most - len(rows)) for rows in there])
    for row, target in zip(found, padded, strict=True):  # as from batches of one
        metric.accumulate(torch.tensor([row]).view(1, -1, 6), (target[None, :, :4], target[None, :, 4].long()), 1)
    state = metric.state()
    assert state is not None
    return metric.value([state])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([[box(*LEFT, label=1), box(*RIGHT, label=2)]], 1.0),
        ([[box(*LEFT, label=2), box(*RIGHT, label=1)]], 0.0),  # the wrong names
        ([[box(*LEFT, label=1)]], 0.5),  # of two classes one
        ([[]], 0.0),
        ([[box(*LEFT, label=1, score=0.9), box(*LEFT, label=1, score=0.8), box(*RIGHT, label=2)]], 1.0),  # twice, after it
        ([[box(*TOP, label=1, score=0.9), box(*LEFT, label=1, score=0.8), box(*RIGHT, label=2)]], 0.75),  # a wrong one first
        ([[box(*LEFT, label=1, score=0.0), box(*RIGHT, label=2)]], 0.5),  # padding
    ],
)
def test_mean_average_precision_by_hand(found: list[list[list[float]]], expected: float) -> None:
    assert mean_ap(found, [[box(*LEFT, label=1), box(*RIGHT, label=2)]]) == pytest.approx(expected)


def test_precision_is_that_of_all_pictures_together_on_any_number_of_ranks() -> None:
    """Of three boxes two are found, with a wrong one between them: (1 + 2/3) / 3."""
    there = [[box(*LEFT, label=1)], [box(*RIGHT, label=1)], [box(*TOP, label=1)]]
    found = [[box(*LEFT, label=1, score=0.9)], [box(*LEFT, label=1, score=0.8)], [box(*TOP, label=1, score=0.7)]]
    assert mean_ap(found, there) == pytest.approx((1 + 2 / 3) / 3)
    metrics = [MeanAP() for _ in found]
    for metric, row, target in zip(metrics, found, there, strict=True):
        metric.accumulate(torch.tensor([row]), (torch.tensor([target])[..., :4], torch.tensor([[1]])), 1)
    assert metrics[0].value([m.state() for m in metrics]) == pytest.approx((1 + 2 / 3) / 3)  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """32 pictures, 80x40, with a bright square at the left or a dark one, and in each fourth one both."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(32):
        pixels = rng.integers(110, 140, (40, 80, 3), dtype=np.uint8)
        for (left, top, right, bottom), name in zip(boxes_of(Path(f"{i}.png")), labels_of(Path(f"{i}.png")), strict=True):
            pixels[top:bottom, left:right] = 250 if name == "bright" else 5
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def boxes_of(file: Path) -> list[list[int]]:
    i = int(file.stem)
    return [[20 + i % 8, 8, 40 + i % 8, 28], [52, 10, 68, 26]][: 2 if i % 4 == 0 else 1]


def labels_of(file: Path) -> list[str]:
    i = int(file.stem)
    return ["bright" if i % 2 else "dark", "bright"][: 2 if i % 4 == 0 else 1]


@pytest.fixture
def dls(folder: Path) -> DataLoaders:
    from blocks import get_image_files

    block = DataBlock(
        blocks=(ImageBlock(), BBoxBlock(), BBoxLblBlock()),
        n_inp=1,
        get_items=get_image_files,
        get_y=[boxes_of, labels_of],
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize((32, 64)),
    )
    return block.dataloaders(folder, batch_size=8)


def detection(dls: DataLoaders, detector: str = "retinanet", **settings: Any) -> Learner:
    torch.manual_seed(0)
    model = detection_model(detector=detector, arch=SMALL, n_classes=len(dls.vocab))
    given: dict[str, Any] = {"splitter": encoder_and_rest, "callbacks": GiveTargets(), "metrics": MeanAP()}
    return Learner(dls, model, DetectionLoss(), device=torch.device("cpu"), **given, **settings)


@pytest.mark.parametrize("detector", DETECTORS)
def test_each_detector_trains_and_validates(dls: DataLoaders, detector: str) -> None:
    learn = detection(dls, detector)
    learn.fit(1, 1e-3)
    record = learn.recorder.history[-1]
    assert record.keys() >= {"train/loss", "valid/loss", "valid/map_50"}
    assert np.isfinite(record["valid/loss"])
    assert len(learn.layer_groups) == 2


def test_losses_in_evaluation_are_those_of_the_model_with_its_norms_still(dls: DataLoaders) -> None:
    learn = detection(dls)
    images, boxes, labels = (x.as_subclass(Tensor) for x in dls.one_batch())
    model = learn.model.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    checked = model(images, boxes, labels)
    assert isinstance(checked, Checked)
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    torch.testing.assert_close(model(images), checked.found)
    wider = torch.nn.functional.pad(boxes, (0, 0, 0, 3)), torch.nn.functional.pad(labels, (0, 3))
    torch.testing.assert_close(model(images, *wider).losses, checked.losses)  # what fills up counts for nothing


def test_it_learns_and_predicts_boxes_in_pixels_of_the_persons_picture(dls: DataLoaders, folder: Path, tmp_path: Path) -> None:
    learn = detection(dls)
    with learn.no_logging():
        learn.fit_one_cycle(25, 5e-3)
    assert max(record["valid/map_50"] for record in learn.recorder.history) > 0.5
    photo = folder / "3.png"
    boxes, names = learn.predict(photo).decoded
    assert names[0] == "bright"
    assert np.abs(boxes[0].numpy() - boxes_of(photo)[0]).max() < 6
    predictor = load_predictor(learn.export(tmp_path / "export"))
    (again,) = predictor.predict([photo])
    assert again.label == names
    np.testing.assert_allclose(again.boxes, boxes.numpy(), rtol=1e-3)
    assert again.scores is not None
    assert all(score >= 0.5 for score in again.scores)
    learn.show_results(4).savefig(tmp_path / "results.png")
    learn.dls.show_batch(4).savefig(tmp_path / "batch.png")


def test_a_loss_of_each_row_is_not_to_be_had(dls: DataLoaders) -> None:
    with pytest.raises(ValueError, match="losses come from the model"):
        detection(dls).get_preds(with_loss=True)
    assert report_of(detection(dls)).texts == {"report.txt": "the loss has no value for each row, so there are no worst ones"}
