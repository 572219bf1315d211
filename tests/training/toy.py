"""A tiny complete case for the tests of the Learner: two classes of points that a plane divides."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from blocks import DataLoaders
from training import Callback, CrossEntropyLossFlat, Learner

Sizes = tuple[int, ...]


def batches(sizes: Sizes, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Two classes of points that a plane divides."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in sizes:
        y = torch.randint(2, (n,), generator=generator)
        x = torch.randn(n, 3, generator=generator)
        x[:, 0] += 6 * y - 3
        made.append((x, y))
    return made


def data(train: Sizes = (4, 4, 3), valid: Sizes = (4, 1)) -> DataLoaders:
    return DataLoaders(batches(train), batches(valid, seed=1))


def deep(dropout: float = 0.0) -> nn.Sequential:
    """Layers with parameters, a BatchNorm, and a Dropout that draws random numbers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(dropout), nn.Linear(5, 2))


def learner(dls: Any = None, model: nn.Module | None = None, **changes: Any) -> Learner:
    defaults: dict[str, Any] = {"loss_func": CrossEntropyLossFlat(), "lr": 0.1}
    learn = Learner(data() if dls is None else dls, model or deep(), **defaults | changes)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    return learn


def doing(event: str, action: Callable[[Learner], Any], order: int = 0) -> Callback:
    """A callback that does one thing at one event."""
    return type("Doing", (Callback,), {event: lambda self, learn: action(learn), "order": order})()


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Both are the same plain data, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{number}")
    else:
        assert one == other, where


def without_times(history: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in values.items() if not k.startswith("time/")} for values in history]
