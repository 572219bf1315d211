"""Typed tensors: what a column of numbers means, kept through indexing, arithmetic and stacking.

Transforms, `show_batch` and `decode` choose what to do by these types; the model itself is given plain tensors
(`as_plain`), because dispatch on a subclass costs microseconds for every operation.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch


class TensorBase(torch.Tensor):
    """A tensor whose class says what it means; results of operations keep class and attributes of the first typed argument."""

    ragged: ClassVar[bool] = False  # stored as rows of different lengths, even where some happen to be alike
    pad_value: ClassVar[float] = 0  # what fills a ragged row up to the longest of its batch

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return _typed(result, cls, _first_typed(args))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied


def _first_typed(args: Iterable[Any]) -> TensorBase | None:
    for arg in args:
        if isinstance(arg, TensorBase):
            return arg
        if isinstance(arg, (list, tuple)) and (found := _first_typed(arg)) is not None:
            return found
    return None


def _typed(result: Any, cls: type[TensorBase], first: TensorBase | None) -> Any:
    if type(result) is torch.Tensor:
        typed = result.as_subclass(cls if first is None else type(first))
        if first is not None and first.__dict__:
            typed.__dict__.update(first.__dict__)
        return typed
    if type(result) in (list, tuple):
        return type(result)(_typed(r, cls, first) for r in result)
    return result


class TensorImage(TensorBase):
    """Pixels, (..., channels, height, width); uint8 0..255 when stored, float32 once `IntToFloatTensor` has run."""


class TensorImageBW(TensorImage):
    """Pixels of one channel, (..., 1, height, width)."""


class TensorMask(TensorBase):
    """A class index a pixel, (..., height, width); uint8 when stored, int64 on the batch side."""


class TensorPoint(TensorBase):
    """Points (..., n, 2) as (x, y); float32, in pixels until scaled to -1..1 over the picture's width and height.

    Pixel number i reaches from i to i + 1: the middle of the upper left pixel is (0.5, 0.5). img_size: (width, height) of
    their picture, where that is not in the sample.
    """

    ragged: ClassVar[bool] = True
    coordinates: ClassVar[int] = 2  # numbers in each

    img_size: tuple[int, int] | None

    @classmethod
    def create(cls, values: Any, img_size: tuple[int, int] | None = None) -> Self:
        """Pairs of numbers, as lists, an array or a tensor, as (n, 2) points; boxes of four numbers as (n, 4).

        ValueError when they are not that many.
        """
        numbers = torch.as_tensor(values, dtype=torch.float32).clone()
        if numbers.numel() % cls.coordinates or (numbers.ndim > 1 and numbers.numel() and numbers.shape[-1] != cls.coordinates):
            raise ValueError(f"{cls.__name__} takes rows of {cls.coordinates} numbers, not a shape of {tuple(numbers.shape)}")
        created = numbers.view(-1, cls.coordinates).as_subclass(cls)
        if img_size is not None:
            created.img_size = img_size
        return created


class TensorBBox(TensorPoint):
    """Boxes (..., n, 4) as (left, top, right, bottom); float32, in pixels until scaled to -1..1 as points are.

    A box without area is padding, or has left the picture.
    """

    coordinates: ClassVar[int] = 4


class LabeledBBox(tuple[Any, ...]):
    """The pair (TensorBBox, labels) of one picture, as decoded for showing."""


class TensorCategory(TensorBase):
    """Indices into a vocabulary, int64, (...)."""


class TensorBBoxLabel(TensorCategory):
    """The class of each box of a picture, int64 (..., n); 0 stands for none, and for padding."""

    ragged: ClassVar[bool] = True


class TensorMultiCategory(TensorBase):
    """One number a class, 1 where the class applies, float32, (..., classes)."""


class TensorNumber(TensorBase):
    """Numbers to predict, float32, (...) for one a sample or (..., n)."""


class TensorText(TensorBase):
    """Token ids of a text, int64, (..., length)."""

    ragged: ClassVar[bool] = True
    pad_value: ClassVar[float] = 1  # the id of xxpad in fastai's order of special tokens


class TensorSeries(TensorBase):
    """Values over time, float32, (..., steps, channels): time first, so that windows and padding lie along it.

    In a batch, series of several lengths end in NaN, which nothing else is: so a model can tell padding from zeros.
    """

    ragged: ClassVar[bool] = True
    pad_value: ClassVar[float] = math.nan


class TensorForecast(TensorSeries):
    """What follows a window of a series, (rows, horizon, channels): what a forecast is measured by."""


class TensorKnown(TensorSeries):
    """What is known of the steps of a window and of those that follow it, (..., steps + horizon, covariates)."""


class TensorTabular(TensorBase):
    """The columns of a table's rows of one kind: int64 codes of categories or float32 numbers, (..., columns)."""


def as_plain(x: Any) -> Any:
    """The same tensor without its type, sharing storage; anything else comes back as it is."""
    return x.as_subclass(torch.Tensor) if isinstance(x, TensorBase) else x


def tensor_type(name: str) -> type[torch.Tensor]:
    """The typed tensor called `name`, as a stored column remembers it; ValueError for a name that is not one of ours."""
    kinds: dict[str, type[torch.Tensor]] = {"Tensor": torch.Tensor}
    pending: list[type[TensorBase]] = [TensorBase]
    while pending:
        kind = pending.pop()
        kinds[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    if name not in kinds:
        raise ValueError(f"unknown tensor type {name!r}; known: {', '.join(sorted(kinds))}")
    return kinds[name]
