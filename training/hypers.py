"""Hyper-parameters of any torch optimizer by fastai's names, for all parameter groups or each one's own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# SGD and RMSprop; those with `betas` have both moments there.
TORCHS_NAMES = {"wd": "weight_decay", "mom": "momentum", "sqr_mom": "alpha"}
_BETAS = {"mom": 0, "momentum": 0, "sqr_mom": 1}


def get_hyper(optimizer: torch.optim.Optimizer, name: str) -> list[float]:
    """A hyper-parameter of each parameter group, by fastai's name. ValueError when the optimizer has no such."""
    return [group_hyper(group, name) for group in optimizer.param_groups]


def set_hyper(optimizer: torch.optim.Optimizer, name: str, value: float | Sequence[float] | slice) -> None:
    """Set a hyper-parameter by fastai's name: one number, one for each group of layers, or spread over these by a slice.

    `slice(a, b)` goes from `a` for the first to `b` for the last in equal ratios; `slice(b)` is `b` for the last and `b / 10`
    for those before. ValueError when the optimizer has no such hyper-parameter.
    """
    number_of = [group.get("layer_group", i) for i, group in enumerate(optimizer.param_groups)]
    values = _spread(value, max(number_of) + 1)
    for group, number in zip(optimizer.param_groups, number_of, strict=True):
        set_group_hyper(group, name, values[number])
        if name in ("mom", "momentum") and "own_momentum" in group:  # in a run, whose phases set it
            group["own_momentum"] = values[number]


def _spread(value: float | Sequence[float] | slice, n: int) -> list[float]:
    match value:
        case slice(start=None, stop=last):
            return [float(last) / 10] * (n - 1) + [float(last)]
        case slice(start=first, stop=last):
            ratio = last / first
            return [float(first * ratio ** (i / (n - 1))) for i in range(n)] if n > 1 else [float(last)]
        case Sequence() | np.ndarray() if np.ndim(value):
            if len(value) != n:
                raise ValueError(f"{len(value)} values were given for {n} groups of layers: give one for each, or a slice")
            return list(map(float, value))
    # NumPy's and torch's numbers, which a checkpoint does not hold, become plain ones.
    return [value if isinstance(value, int) else float(value)] * n  # type: ignore[arg-type]


def group_hyper(group: dict[str, Any], name: str) -> float:
    """A hyper-parameter of one parameter group, by fastai's name or the optimizer's own. ValueError when it has no such."""
    key = _key(group, name)
    return group["betas"][key] if isinstance(key, int) else group[key]


def set_group_hyper(group: dict[str, Any], name: str, value: float) -> None:
    """Set what `group_hyper` gets."""
    value = value.item() if isinstance(value, np.generic | Tensor) else value  # a checkpoint holds plain numbers
    key = _key(group, name)
    if isinstance(key, int):
        betas = list(group["betas"])
        betas[key] = value
        group["betas"] = tuple(betas)
    else:
        group[key] = value


def _key(group: dict[str, Any], name: str) -> str | int:
    """Where a group keeps it: under a key, or at a place of its `betas`."""
    if name in group:
        return name
    if "betas" in group and name in _BETAS:
        return _BETAS[name]
    if TORCHS_NAMES.get(name) in group:
        return TORCHS_NAMES[name]
    has = ", ".join(k for k in group if k != "params")
    raise ValueError(f"the optimizer has no hyper-parameter {name!r}; it has {has}")
