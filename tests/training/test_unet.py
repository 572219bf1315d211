"""A U-Net over any encoder."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from blocks.errors import UserError
from training import DynamicUnet, SelfAttention, create_body, unet_model
from training.transfer import halves_and_head, layers_of


@pytest.mark.parametrize(
    ("arch", "size"),
    [("resnet18", (32, 32)), ("resnet18", (33, 47)), ("shufflenet_v2_x0_5", (33, 47)), ("vgg11_bn", (33, 47))],
)
def test_a_prediction_for_each_pixel_whatever_the_size(arch: str, size: tuple[int, int]) -> None:
    model = unet_model(arch=arch, n_out=2)
    assert model(torch.randn(2, 3, *size)).shape == (2, 2, *size)
    assert model.spec.arguments == {"arch": arch, "n_out": 2}


def test_what_comes_back_is_the_last_layer_of_each_size() -> None:
    """Of a ResNet what fastai takes: the stem after its activation and the stages."""
    encoder = create_body(torchvision.models.resnet18())
    unet = DynamicUnet(encoder, 2)
    layers = layers_of(encoder)
    assert [layers[n] for n in unet._skips] == [encoder[6][-1], encoder[5][-1], encoder[4][-1], encoder[2]]  # type: ignore[index]


def test_each_skip_and_the_picture_matter() -> None:
    torch.manual_seed(0)
    model = unet_model(arch="resnet18", n_out=1, n_in=1, self_attention=True, blur=True, y_range=(0.0, 1.0)).train()
    assert any(isinstance(m, SelfAttention) for m in model.modules())
    y = model(torch.randn(2, 1, 32, 32))
    assert bool(((y > 0) & (y < 1)).all())
    y.sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []
    model.eval()
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert not any(m._forward_hooks for m in model.modules())


def test_its_encoder_is_the_body_of_the_groups() -> None:
    model = unet_model(arch="resnet18", n_out=2)
    first, second, rest = halves_and_head(model)
    assert len(first) + len(second) == len(list(model.encoder.parameters()))
    assert len(rest) + len(first) + len(second) == len(list(model.parameters()))


def test_an_encoder_of_one_size_is_refused() -> None:
    with pytest.raises(UserError, match="in one size"):
        DynamicUnet(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), 2)
