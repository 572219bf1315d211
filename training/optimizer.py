"""Optimizers behind fastai's names, and the parameter groups they are given."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)

OptimizerFunction = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def Adam(  # noqa: N802  fastai's name
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.01,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay and fastai's defaults (Loshchilov & Hutter, arXiv:1711.05101); torch's fused kernel."""
    return torch.optim.AdamW(params, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd, fused=True)


def parameter_groups(layers: Sequence[Sequence[nn.Parameter]], model: nn.Module) -> list[dict[str, Any]]:
    """Torch's parameter groups for our groups of layers: biases and normalisation are kept from weight decay.

    Each has "layer_group", the number of the group of layers it belongs to.
    """
    undecayed = {id(p) for p in _norm_parameters(model)} | {
        id(p) for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2]
    }
    groups = []
    for number, parameters in enumerate(layers):
        decayed = [p for p in parameters if id(p) not in undecayed]
        bare = [p for p in parameters if id(p) in undecayed]
        if decayed:
            groups.append({"params": decayed, "layer_group": number})
        if bare:
            groups.append({"params": bare, "layer_group": number, "weight_decay": 0.0})
    return groups


def _norm_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    return (p for m in model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(recurse=False))


def freeze_to(layers: Sequence[Sequence[nn.Parameter]], model: nn.Module, n: int, train_bn: bool = True) -> None:
    """Only groups from the `n`-th on train (negative: counted from the end); with `train_bn`, normalisation always does."""
    first = n + len(layers) if n < 0 else n
    if not 0 <= first < len(layers):
        raise ValueError(
            f"freeze_to={n}, but the model has {len(layers)} parameter group{'s' * (len(layers) != 1)}: "
            f"from {-len(layers)} to {len(layers) - 1} is possible. Give the Learner a splitter that makes more groups"
        )
    always = {id(p) for p in _norm_parameters(model)} if train_bn else set()
    for number, parameters in enumerate(layers):
        for p in parameters:
            p.requires_grad_(number >= first or id(p) in always)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, spread: float, momentum: float | None) -> None:
    """The rate of each group, from `lr / spread` to `lr`; momentum, None being the optimizer's own, where it has one."""
    last = max(g.get("layer_group", 0) for g in optimizer.param_groups)
    for group in optimizer.param_groups:
        below = 1 - group.get("layer_group", 0) / last if last else 0.0
        group["lr"] = lr / spread**below
        if "betas" in group:
            own = group.setdefault("own_momentum", group["betas"][0])
            group["betas"] = (own if momentum is None else momentum, *group["betas"][1:])
        elif group.get("momentum"):
            own = group.setdefault("own_momentum", group["momentum"])
            group["momentum"] = own if momentum is None else momentum


def one_group(model: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters in one group: the Learner's default splitter."""
    return [list(model.parameters())]


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Two groups: all layers but the last, and the last layer that has parameters (the classifier of torchvision's models)."""
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if not children:
        raise ValueError(f"{type(model).__name__} has no layers to cut into body and head: give the Learner another splitter")
    head = list(children[-1].parameters())
    of_head = {id(p) for p in head}
    return [[p for p in model.parameters() if id(p) not in of_head], head]
