"""Cutting a model into body and head."""

import pytest
import torch
import torchvision
from torch import nn

from blocks import DataLoaders
from blocks.errors import UserError
from training import (
    BnFreeze,
    CrossEntropyLossFlat,
    Learner,
    Phase,
    body_and_head,
    create_body,
    create_head,
    cut_model,
    num_features,
    vision_model,
)
from training.layers import AdaptiveConcatPool2d
from training.transfer import adapt_first_layer


@pytest.mark.parametrize(
    ("arch", "features"),
    [
        ("resnet18", 512),
        ("resnet50", 2048),
        ("vgg11_bn", 512),
        ("densenet121", 1024),
        ("squeezenet1_1", 512),
        ("mobilenet_v3_small", 576),
        ("efficientnet_b0", 1280),
        ("convnext_tiny", 768),
        ("shufflenet_v2_x0_5", 1024),
    ],
)
def test_the_body_of_torchvisions_models(arch: str, features: int) -> None:
    with torch.device("meta"):  # shapes only
        model = torchvision.models.get_model(arch, weights=None)
        body = create_body(model)
        assert num_features(body) == features
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in body.modules())


@pytest.mark.parametrize("arch", ["vit_b_16", "swin_t", "maxvit_t"])
def test_what_is_no_body_of_convolutions_is_told(arch: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"cut=\.\.\."):
        num_features(create_body(torchvision.models.get_model(arch, weights=None)))


def test_where_to_cut_can_be_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3))
    assert list(create_body(model, cut=2)) == [model[0], model[1]]
    assert cut_model(model, lambda m: m[0]) is model[0]
    assert num_features(create_body(model, cut=2)) == 5
    with pytest.raises(UserError, match="Sequential is not a body of convolutions"):
        create_body(nn.Sequential(nn.Linear(3, 4)))


@pytest.mark.parametrize("n_in", [1, 4])
def test_the_first_layer_takes_other_channels(n_in: int) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)), nn.ReLU())
    adapted = adapt_first_layer(model, n_in)
    grey = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(adapted(grey.expand(2, n_in, 8, 8)), model(grey.expand(2, 3, 8, 8)))
    assert model[0][0].in_channels == 3


def test_what_a_head_is_made_of() -> None:
    head = create_head(8, 3, lin_ftrs=[16], ps=0.5)
    kinds = [type(m) for m in head.modules() if not any(m.children())]
    expected = [AdaptiveConcatPool2d, nn.Flatten, nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU]
    assert kinds == [*expected, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.5]
    assert head(torch.randn(2, 8, 3, 3)).shape == (2, 3)
    assert create_head(8, 3, lin_ftrs=[], ps=0.0, concat_pool=False, first_bn=False)(torch.randn(2, 8, 3, 3)).shape == (2, 3)
    in_range = create_head(8, 1, y_range=(2.0, 3.0), bn_final=True)(100 * torch.randn(5, 8, 3, 3))
    assert bool(((in_range >= 2) & (in_range <= 3)).all())
    linear_first = create_head(8, 3, lin_ftrs=[16], lin_first=True, ps=[0.1, 0.2])
    kinds = [type(m) for m in linear_first.modules() if not any(m.children())]
    assert kinds[2:] == [nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    with pytest.raises(UserError, match="the head has 2 linear layers"):
        create_head(8, 3, ps=[0.1, 0.2, 0.3])


def test_a_model_of_body_and_head_freezes_and_trains() -> None:
    model = vision_model(arch="squeezenet1_1", n_out=2, n_in=1, lin_ftrs=[8])
    assert model.spec.arguments == {"arch": "squeezenet1_1", "n_out": 2, "n_in": 1, "lin_ftrs": [8]}
    batches = [(torch.randn(4, 1, 32, 32), torch.randint(2, (4,))) for _ in range(2)]
    learn = Learner(DataLoaders(batches), model, CrossEntropyLossFlat(), splitter=body_and_head, callbacks=[BnFreeze()])
    assert [sum(p.numel() for p in g) for g in learn.layer_groups] == [
        sum(p.numel() for p in part.parameters()) for part in model
    ]
    before = [[p.detach().clone() for p in part.parameters()] for part in model]
    learn.fit((Phase(1, freeze_to=-1, train_bn=False),))
    for part, old, trains in zip(model, before, (False, True), strict=True):
        assert trains != all(torch.equal(p, o) for p, o in zip(part.parameters(), old, strict=True))
