"""Layers under fastai's names: their shapes, and what each is there for."""

from typing import Any

import pytest
import torch
from torch import nn

from training import (
    AdaptiveConcatPool2d,
    ConvLayer,
    Embedding,
    LinBnDrop,
    PixelShuffle_ICNR,
    ResBlock,
    SelfAttention,
    SigmoidRange,
    SimpleCNN,
    TimeDistributed,
)


@pytest.mark.parametrize(
    ("settings", "kinds", "size"),
    [
        ({}, ["Conv2d", "BatchNorm2d", "ReLU"], (8, 8)),
        ({"stride": 2}, ["Conv2d", "BatchNorm2d", "ReLU"], (4, 4)),
        ({"norm": None, "act_cls": None}, ["Conv2d"], (8, 8)),
        ({"norm": "instance", "act_cls": nn.Mish}, ["Conv2d", "InstanceNorm2d", "Mish"], (8, 8)),
        ({"transpose": True, "ks": 2, "stride": 2}, ["ConvTranspose2d", "BatchNorm2d", "ReLU"], (16, 16)),
        ({"ks": 5, "padding": 0}, ["Conv2d", "BatchNorm2d", "ReLU"], (4, 4)),
    ],
)
def test_what_a_conv_layer_is_made_of(settings: dict[str, Any], kinds: list[str], size: tuple[int, int]) -> None:
    layer = ConvLayer(3, 5, **settings)
    assert [type(m).__name__ for m in layer] == kinds
    assert layer(torch.randn(2, 3, 8, 8)).shape == (2, 5, *size)
    assert (layer[0].bias is None) == any("Norm" in k for k in kinds)


def test_conv_layers_of_one_and_three_dimensions_and_spectral_weights() -> None:
    assert ConvLayer(3, 5, ndim=1)(torch.randn(2, 3, 8)).shape == (2, 5, 8)
    assert ConvLayer(3, 5, ndim=3)(torch.randn(2, 3, 4, 4, 4)).shape == (2, 5, 4, 4, 4)
    spectral = ConvLayer(3, 5, norm="spectral", act_cls=None)
    for _ in range(50):
        spectral(torch.randn(2, 3, 8, 8))
    norm = torch.linalg.matrix_norm(spectral[0].weight.detach().flatten(1), ord=2)
    assert float(norm) == pytest.approx(1, abs=1e-2)
    with pytest.raises(ValueError, match="not 'layer'"):
        ConvLayer(3, 5, norm="layer")  # type: ignore[arg-type]


def test_the_order_of_linear_batchnorm_and_dropout() -> None:
    assert [type(m) for m in LinBnDrop(3, 2, p=0.1, act=nn.ReLU())] == [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU]
    later = LinBnDrop(3, 2, p=0.1, act=nn.ReLU(), lin_first=True)
    assert [type(m) for m in later] == [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout]
    assert later(torch.randn(4, 3)).shape == (4, 2)
    assert LinBnDrop(3, 2, bn=False)[0].bias is not None


def test_largest_and_mean_pixel() -> None:
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert AdaptiveConcatPool2d()(x).flatten().tolist() == [3.0, 7.0, 1.5, 5.5]


def test_enlarging_starts_without_a_checkerboard() -> None:
    x = torch.randn(2, 4, 3, 3)
    big = PixelShuffle_ICNR(4, 2)(x)
    assert big.shape == (2, 2, 6, 6)
    torch.testing.assert_close(big, big[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert PixelShuffle_ICNR(4, scale=3, blur=True)(x).shape == (2, 4, 9, 9)


def test_self_attention_starts_as_the_identity_and_mixes_positions() -> None:
    layer, x = SelfAttention(16).eval(), torch.randn(2, 16, 3, 4)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gamma.fill_(1.0)
    changed = x.clone()
    changed[:, :, 0, 0] += 1
    assert ((layer(changed) - layer(x)).abs().amax(dim=1) > 1e-7).all()  # one position is seen by all
    shuffled = x.flatten(2)[:, :, torch.arange(11, -1, -1)].view_as(x)
    torch.testing.assert_close(layer(shuffled).flatten(2).flip(2), layer(x).flatten(2))
    with pytest.raises(ValueError, match="at least 8, not 4"):
        SelfAttention(4)


@pytest.mark.parametrize(("expansion", "ni", "nf", "stride"), [(1, 4, 4, 1), (1, 4, 6, 2), (4, 4, 4, 1), (4, 2, 4, 2)])
def test_a_residual_block_starts_as_its_short_cut(expansion: int, ni: int, nf: int, stride: int) -> None:
    block, x = ResBlock(expansion, ni, nf, stride), torch.randn(2, ni * expansion, 7, 7)
    y = block(x)
    assert y.shape == (2, nf * expansion, 7 if stride == 1 else 4, 7 if stride == 1 else 4)
    torch.testing.assert_close(y, block.short(x).relu())


def test_a_simple_cnn() -> None:
    cnn = SimpleCNN([3, 8, 4])
    assert cnn(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in cnn.modules()) == 1
    assert SimpleCNN([3, 8], kernel_szs=[5], strides=[1], bn=False)[0][0].kernel_size == (5, 5)


def test_values_in_a_range() -> None:
    y = SigmoidRange(-1, 5.5)(torch.tensor([-100.0, 0.0, 100.0]))
    assert y.tolist() == pytest.approx([-1, 2.25, 5.5])


def test_embeddings_start_near_zero() -> None:
    weight = Embedding(1000, 10).weight.detach()
    assert float(weight.abs().max()) <= 0.02
    assert 0.005 < float(weight.std()) < 0.01


@pytest.mark.parametrize("tdim", [1, 2])
def test_a_module_at_each_step(tdim: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    at_once, one_by_one = (TimeDistributed(nn.Flatten(), low_mem, tdim)(x) for low_mem in (False, True))
    assert at_once.shape == ((2, 3, 20) if tdim == 1 else (2, 15, 4))
    assert torch.equal(at_once, one_by_one)
