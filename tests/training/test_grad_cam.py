"""Grad-CAM finds the place that a class is known by."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blocks import DataBlock
from blocks.errors import UserError
from training import Learner, grad_cam, report_of, torchvision_classifier
from training.grad_cam import grad_cam_of


class Patches(nn.Module):
    """Class c's score is the brightness of channel c, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 16)
        self.features.requires_grad_(False)  # as in a frozen body

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


@pytest.fixture
def learn(digits_block: DataBlock, few_digits: Path) -> Learner:
    dls = digits_block.new(batch_tfms=()).dataloaders(few_digits, batch_size=8)
    return Learner(dls, Patches(), device=torch.device("cpu"))


def test_the_heat_lies_where_the_class_is_seen(learn: Learner) -> None:
    picture = torch.zeros(3, 16, 16)
    picture[1, 4:8, 8:12] = 1
    seen = grad_cam_of(learn, picture, "1")
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1
    torch.testing.assert_close(seen.heat, expected)
    assert grad_cam_of(learn, picture).label == "1"
    assert float(grad_cam_of(learn, picture, "0").heat.max()) == 0
    assert seen.show().axes[0].get_title() == "1"


def test_an_item_and_its_class_by_name(learn: Learner, few_digits: Path) -> None:
    learn.model = torchvision_classifier(arch="shufflenet_v2_x0_5", n_out=3)
    learn.model.train()
    photo = next((few_digits / "2").iterdir())
    with pytest.raises(UserError, match="no class 'two'; there are 0, 1, 2"):
        grad_cam(learn, photo, "two")
    with pytest.raises(UserError, match="Flatten gives no map of several places"):
        grad_cam(learn, photo, "2", nn.Flatten())
    seen = grad_cam(learn, photo, "2", learn.model.stage2)  # type: ignore[arg-type]
    assert seen.heat.shape == (2, 2)
    assert learn.model.training


def test_a_report_has_what_the_target_allows(learn: Learner) -> None:
    found = report_of(learn, k=4)
    assert set(found.pictures) == {"top_losses.png", "confusion.png", "grad_cam.png"}
    assert set(found.texts) == {"top_losses.txt", "classes.txt"}
    assert len(found.texts["top_losses.txt"].splitlines()) == 5
