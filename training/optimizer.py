"""Optimizers under fastai's names, and the groups of parameters they are given."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from training.composed import Optimizer
from training.hypers import TORCHS_NAMES, group_hyper, set_group_hyper
from training.steppers import (
    adam_step,
    average_grad,
    average_sqr_grad,
    debias_grad,
    debias_sqr,
    l2_reg,
    lamb_step,
    larc_step,
    lookahead_step,
    momentum_step,
    nesterov_step,
    qhadam_step,
    radam_adapts,
    radam_rectification,
    radam_step,
    remember_slow,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)

OptimizerFunction = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


# --- optimizers: each is a list of the functions of training.steppers, under fastai's names and defaults ------------------


def SGD(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.0,
    wd: float = 0.0,
    decouple_wd: bool = True,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, with momentum if `mom` is not 0, Nesterov's on request."""
    if nesterov and not mom:
        raise ValueError(f"Nesterov's momentum looks ahead along the momentum, which is above 0, not mom={mom!r}")
    if mom:
        step = nesterov_step if nesterov else momentum_step
        return Optimizer(params, (_decay(decouple_wd), average_grad, step), lr=lr, mom=mom, wd=wd)
    return Optimizer(params, (_decay(decouple_wd), sgd_step), lr=lr, wd=wd)


def RMSProp(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.0,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
) -> Optimizer:
    """Gradients, or their running sum if `mom` is not 0, over the root of their average square (Hinton 2012)."""
    average, hyper = ((average_grad,), {"mom": mom}) if mom else ((), {})
    functions = (_decay(decouple_wd), *average, average_sqr_grad, rms_prop_step)
    return Optimizer(params, functions, lr=lr, sqr_mom=sqr_mom, eps=eps, wd=wd, **hyper)


def Adam(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.01,
    decouple_wd: bool = True,
) -> Optimizer:
    """Adam, with decoupled weight decay unless told otherwise (Loshchilov & Hutter, arXiv:1711.05101)."""
    return _adaptive(params, (_decay(decouple_wd), *MOMENTS, adam_step), lr, mom, sqr_mom, eps, wd)


AdamW = Adam  # torch's name for the same thing


def RAdam(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.0,
    decouple_wd: bool = True,
) -> Optimizer:
    """Adam that warms itself up (Liu et al., arXiv:1908.03265)."""
    functions = (_decay(decouple_wd), *MOMENTS, radam_adapts, radam_rectification, radam_step)
    return _adaptive(params, functions, lr, mom, sqr_mom, eps, wd)


def QHAdam(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.999,
    sqr_mom: float = 0.999,
    nu_1: float = 0.7,
    nu_2: float = 1.0,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
) -> Optimizer:
    """Adam with averages mixed with the gradient itself (Ma & Yarats, arXiv:1810.06801)."""
    functions = (_decay(decouple_wd), *MOMENTS, qhadam_step)
    return _adaptive(params, functions, lr, mom, sqr_mom, eps, wd, nu_1=nu_1, nu_2=nu_2)


def Larc(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.9,
    clip: bool = True,
    trust_coeff: float = 0.02,
    eps: float = 1e-8,
    wd: float = 0.0,
    decouple_wd: bool = True,
) -> Optimizer:
    """SGD with a rate for each parameter by its norm; `clip`: at most `lr` (You et al., arXiv:1708.03888)."""
    functions = (_decay(decouple_wd), average_grad, larc_step)
    return Optimizer(params, functions, lr=lr, mom=mom, clip=clip, trust_coeff=trust_coeff, eps=eps, wd=wd)


def Lamb(  # noqa: N802
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.0,
    decouple_wd: bool = True,
) -> Optimizer:
    """Adam with each parameter's step scaled to its norm (You et al., arXiv:1904.00962)."""
    return _adaptive(params, (_decay(decouple_wd), *MOMENTS, lamb_step), lr, mom, sqr_mom, eps, wd)


def Lookahead(opt: Optimizer, k: int = 6, alpha: float = 0.5) -> Optimizer:  # noqa: N802
    """`opt` anew; after every `k` steps it only goes the share `alpha` of their way (Zhang et al., arXiv:1907.08610)."""
    functions = (*(() if step_stat in opt.functions else (step_stat,)), remember_slow, *opt.functions, lookahead_step)
    return Optimizer(opt.param_groups, functions, **opt.defaults, k=k, alpha=alpha)


def ranger(
    params: Iterable[Any],
    lr: float = 1e-3,
    mom: float = 0.95,
    wd: float = 0.01,
    eps: float = 1e-6,
    k: int = 6,
    alpha: float = 0.5,
) -> Optimizer:
    """`Lookahead` around `RAdam`."""
    return Lookahead(RAdam(params, lr=lr, mom=mom, wd=wd, eps=eps), k=k, alpha=alpha)


MOMENTS = (average_grad, average_sqr_grad, step_stat, debias_grad, debias_sqr)


def _decay(decoupled: bool) -> Callable[..., Any]:
    return weight_decay if decoupled else l2_reg


def _adaptive(
    params: Iterable[Any],
    functions: Sequence[Callable[..., Any]],
    lr: float,
    mom: float,
    sqr_mom: float,
    eps: float,
    wd: float,
    **more: float,
) -> Optimizer:
    return Optimizer(params, functions, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, dampening=True, **more)


# --- torch's own under fastai's names ------------------------------------------------------------------------------------


def OptimWrapper(params: Iterable[Any], opt: Callable[..., torch.optim.Optimizer], **hypers: Any) -> torch.optim.Optimizer:  # noqa: N802
    """An optimizer of torch's, `opt(params, ...)`, with its settings under fastai's names: `lr`, `mom`, `sqr_mom`, `eps`, `wd`.

    It is torch's own: `get_hyper` and `set_hyper` know its settings by the same names, and a Learner needs no more.
    """
    known = inspect.signature(opt).parameters
    settings: dict[str, Any] = {}
    if "betas" in known and ("mom" in hypers or "sqr_mom" in hypers):
        usual = known["betas"].default
        settings["betas"] = (hypers.pop("mom", usual[0]), hypers.pop("sqr_mom", usual[1]))
    for ours, theirs in TORCHS_NAMES.items():
        if ours in hypers and theirs in known:
            settings[theirs] = hypers.pop(ours)
    return opt(params, **settings, **hypers)


# --- groups of parameters ------------------------------------------------------------------------------------------------


def parameter_groups(layers: Sequence[Sequence[nn.Parameter]], model: nn.Module) -> list[dict[str, Any]]:
    """Torch's parameter groups for our groups of layers: biases and normalisation are kept from weight decay.

    Each has "layer_group", the number of the group of layers it belongs to; those without decay have "decays": False.
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
            groups.append({"params": bare, "layer_group": number, "decays": False, "weight_decay": 0.0})
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


def keep_norms_still(model: nn.Module) -> None:
    """Have frozen normalisation layers use the statistics they have, and keep them, until the next `model.train()`.

    One without parameters goes with the layer before it.
    """
    trains = True
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        trains = any(p.requires_grad for p in own) if own else trains
        if isinstance(module, NORM_LAYERS) and not trains:
            module.eval()


def set_rates(optimizer: torch.optim.Optimizer, lr: float, spread: float, momentum: float | None) -> None:
    """The rate of each group, from `lr / spread` to `lr`; momentum, None being the optimizer's own, where it has one."""
    last = max(g.get("layer_group", 0) for g in optimizer.param_groups)
    for group in optimizer.param_groups:
        below = 1 - group.get("layer_group", 0) / last if last else 0.0
        group["lr"] = lr / spread**below
        if "mom" in group or "betas" in group or group.get("momentum"):
            own = group.setdefault("own_momentum", group_hyper(group, "mom"))
            set_group_hyper(group, "mom", own if momentum is None else momentum)


def own_momentum_again(optimizer: torch.optim.Optimizer) -> None:
    """Give each group back the momentum it had before `set_rates`."""
    for group in optimizer.param_groups:
        if "own_momentum" in group:
            set_group_hyper(group, "mom", group.pop("own_momentum"))


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
