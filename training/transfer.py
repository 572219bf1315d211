"""Transfer learning: the body of a trained model, cut before its classifier, and a new head on it."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from blocks.errors import UserError
from training.layers import AdaptiveConcatPool2d, LinBnDrop, SigmoidRange
from training.models import image_model, model_builder

Cut = int | Callable[[nn.Module], nn.Module]

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def create_body(model: nn.Module, n_in: int = 3, cut: Cut | None = None) -> nn.Module:
    """`model` without its classifier, for pictures of `n_in` channels: (rows, n_in, h, w) -> (rows, features, h', w').

    cut: how many of its children to keep, or a function of the model; None: all before the last pooling and classifier, as
    timm's models know it themselves.
    """
    if n_in != 3:
        model = adapt_first_layer(model, n_in)
    if cut is None and hasattr(model, "reset_classifier"):
        model.reset_classifier(0, "")  # type: ignore[operator]
        return model
    return cut_model(model, _before_classifier(model) if cut is None else cut)


def cut_model(model: nn.Module, cut: Cut) -> nn.Module:
    """The first `cut` children of the model one after the other, or what the function `cut` makes of it."""
    return nn.Sequential(*list(model.children())[:cut]) if isinstance(cut, int) else cut(model)


def _before_classifier(model: nn.Module) -> int:
    children = list(model.children())
    kept = len(children)
    while kept and _is_of_classifier(children[kept - 1]):
        kept -= 1
    dropped = (m for child in children[kept:] for m in child.modules())
    if not kept or any(isinstance(m, nn.MultiheadAttention) for m in dropped):
        raise UserError(f"{type(model).__name__} is not a body of convolutions and a classifier: say where to cut it, cut=...")
    return kept


def _is_of_classifier(child: nn.Module) -> bool:
    *_, last = child.modules()
    if isinstance(last, _POOLS) and not isinstance(child, _POOLS):
        return True  # SqueezeNet's classifier is a convolution that ends in a pooling
    return not any(isinstance(m, _CONVS) for m in child.modules())


def adapt_first_layer(model: nn.Module, n_in: int) -> nn.Module:
    """A copy of `model` whose first convolution takes `n_in` channels instead of 3, what it learned averaged over them.

    One channel has the sum of the three; more have the mean of the three, scaled to the same size of output.
    """
    model = copy.deepcopy(model)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    # In place, because it may be a subclass that pads in a way of its own.
    together = conv.weight.detach().sum(dim=1, keepdim=True) / n_in
    conv.weight = nn.Parameter(together.repeat(1, n_in, 1, 1))
    conv.in_channels = n_in
    return model


def num_features(body: nn.Module, n_in: int = 3) -> int:
    """How many channels a body gives; UserError when it does not give (rows, channels, h, w)."""
    was_training = body.training
    try:
        with torch.no_grad():
            shape = body.eval()(torch.zeros(1, n_in, 64, 96)).shape
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"the body's layers do not fit one after the other ({error}): cut it elsewhere, cut=...") from error
    finally:
        body.train(was_training)
    if len(shape) != 4 or shape[2] > 64 or shape[3] > 96:
        raise UserError(f"the body gives {tuple(shape)} and not (rows, channels, h, w): cut it elsewhere, cut=...")
    return shape[1]


def create_head(
    nf: int,
    n_out: int,
    lin_ftrs: Sequence[int] | None = None,
    ps: float | Sequence[float] = 0.5,
    pool: bool = True,
    concat_pool: bool = True,
    first_bn: bool = True,
    bn_final: bool = False,
    lin_first: bool = False,
    y_range: tuple[float, float] | None = None,
) -> nn.Sequential:
    """A head for a body of `nf` channels: (rows, nf, h, w) -> (rows, n_out).

    Pooling (largest and mean with concat_pool), then BatchNorm, dropout and linear layers over `lin_ftrs` features (512) in
    between. ps: the last layer's dropout, the others having half of it, or one a layer. y_range: squeezes the output into it.
    """
    sizes = [nf * 2 if pool and concat_pool else nf, *([512] if lin_ftrs is None else lin_ftrs), n_out]
    layers_n = len(sizes) - 1
    drops = list(ps) if isinstance(ps, Sequence) else [ps / 2] * (layers_n - 1) + [ps]
    if len(drops) != layers_n:
        raise UserError(f"the head has {layers_n} linear layers, so ps is one number or {layers_n} of them, not {ps!r}")
    layers: list[nn.Module] = [AdaptiveConcatPool2d() if concat_pool else nn.AdaptiveAvgPool2d(1)] if pool else []
    layers.append(nn.Flatten())
    if lin_first and drops[0]:
        layers.append(nn.Dropout(drops[0]))
    for i, (n_in, n_next) in enumerate(pairwise(sizes)):
        last = i == layers_n - 1
        bn = (not last or bn_final) if lin_first else (i > 0 or first_bn)
        drop = (0.0 if last else drops[i + 1]) if lin_first else drops[i]
        layers.append(LinBnDrop(n_in, n_next, bn, drop, None if last else nn.ReLU(), lin_first))
    if bn_final and not lin_first:
        layers.append(nn.BatchNorm1d(n_out, momentum=0.01))
    if y_range is not None:
        layers.append(SigmoidRange(*y_range))
    head = nn.Sequential(*layers)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return head


@model_builder
def vision_model(
    *,
    arch: str,
    n_out: int,
    n_in: int = 3,
    lin_ftrs: Sequence[int] | None = None,
    ps: float = 0.5,
    concat_pool: bool = True,
    y_range: Sequence[float] | None = None,
    cut: int | None = None,
) -> nn.Module:
    """A body of torchvision or timm, by its name there, with random weights, and a head: (rows, n_in, h, w) -> (rows, n_out).

    Two children, body and head: `body_and_head` splits it so, `halves_and_head` in three. fastai's create_vision_model.
    """
    body = create_body(image_model(arch), n_in, cut)
    limits = None if y_range is None else (y_range[0], y_range[1])
    return nn.Sequential(
        body, create_head(num_features(body, n_in), n_out, lin_ftrs, ps, concat_pool=concat_pool, y_range=limits)
    )


def halves_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Three groups of a model of body and head: the first and the second half of the body's stages, and the head.

    A stage is a layer of the body, or of one of its sequences, that has a convolution, with what follows it up to the next.
    """
    body, *rest = model.children()
    layers = layers_of(body)
    stages = [i for i, layer in enumerate(layers) if any(isinstance(m, _CONVS) for m in layer.modules())]
    second = stages[(len(stages) + 1) // 2] if len(stages) > 1 else 0
    first = {id(p) for layer in layers[:second] for p in layer.parameters()}
    groups = [
        [p for p in body.parameters() if id(p) in first],
        [p for p in body.parameters() if id(p) not in first],
        [p for part in rest for p in part.parameters()],
    ]
    return [group for group in groups if group]


def layers_of(body: nn.Module) -> list[nn.Module]:
    """A body's layers in order: its children, and of those that are sequences theirs."""
    children = list(body.children())
    trained = [child for child in children if any(True for _ in child.parameters())]
    if len(trained) == 1 and any(True for _ in trained[0].children()):
        return layers_of(trained[0])
    within = [list(c.children()) if isinstance(c, nn.Sequential | nn.ModuleList) else [c] for c in children]
    return [layer for layers in within for layer in layers]
