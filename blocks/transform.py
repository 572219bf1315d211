"""`Transform` and `Pipeline`: fastai's low level, with methods chosen by the type of the argument.

A transform is a dataclass: its fields are its configuration and what it learned from the data. So it prints, compares,
gets a fingerprint, and becomes plain data for an export and back without any code travelling along.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, Self

import plum
import torch

from blocks.house import HOUSE

_REGISTRY: dict[str, type["Transform"]] = {}


class Summary(Protocol):
    """What a pass over some rows saw; summaries of parts merge, in any order, to the summary of the whole."""

    def observe(self, value: Any, row_id: str) -> None: ...

    def merge(self, other: Self) -> None: ...

    def to_plain(self) -> dict[str, Any]: ...

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self: ...


@dataclasses.dataclass
class Transform:
    """A step that `encodes` a value, and `decodes` it back to something that can be shown.

    Both are chosen by the annotated type of their argument; a value of another type passes through unchanged. Write one
    `encodes`, or several under `@dispatch`. On a tuple the transform acts on each element. Lower `order` runs first;
    `split_idx = 0` means: on training data only.
    """

    order: ClassVar[int] = 0
    split_idx: ClassVar[int | None] = None
    summary: ClassVar[type[Summary] | None] = None  # what to observe of the training part; None: nothing to fit

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("encodes", "decodes"):
            setattr(cls, name, _dispatched(cls, name))
        if registered:
            _REGISTRY[registered_name(cls)] = cls

    def encodes(self, x: Any) -> Any:
        return x

    def decodes(self, x: Any) -> Any:
        return x

    def setups(self, train: Any, valid: Any) -> set[str]:
        """Set the fitted fields from the summaries of the two parts; called once, and only where `summary` is given.

        Returns the ids of validation rows that must train instead.
        """
        return set()

    @property
    def fitted(self) -> bool:
        """Whether nothing is left to learn from the data."""
        return True

    def __call__(self, x: Any) -> Any:
        if type(x) is tuple:
            return tuple(self(e) for e in x)
        return retain_type(self.encodes(x), x)

    def decode(self, x: Any) -> Any:
        if type(x) is tuple:
            return tuple(self.decode(e) for e in x)
        return retain_type(self.decodes(x), x)

    def to_plain(self) -> dict[str, Any]:
        """This transform as plain data: its registered name and its fields."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": registered_name(type(self)), **fields}


def transform_from_plain(plain: dict[str, Any]) -> Transform:
    """The transform that `to_plain` described. ValueError when its class is not among those that are loaded."""
    fields = dict(plain)
    name = fields.pop("name", None)
    if name not in _REGISTRY:
        raise ValueError(f"unknown transform {name!r}: it is not one of fastray's; import the module that defines it first")
    cls = _REGISTRY[name]
    allowed = {f.name for f in dataclasses.fields(cls)}
    if set(fields) != allowed:
        raise ValueError(f"{name} has the fields {sorted(allowed)}, but the file gives {sorted(fields)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def registered_name(thing: Any) -> str:
    """The name of a class or function of ours, module:name of a user's, so that nobody's stands in for ours."""
    own = thing.__module__.partition(".")[0] in HOUSE
    return thing.__name__ if own else f"{thing.__module__}:{thing.__qualname__}"


def _dispatched(cls: type[Transform], name: str) -> plum.Function:
    # One function per class that holds the methods of all its bases: plum's own search through the bases finds a class
    # by its name among the module's globals, which fails for a class defined inside a function.
    methods: dict[Any, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        found = base.__dict__.get(name)
        if found is None:
            continue
        if not isinstance(found, plum.Function):
            function = plum.Function(found)
            function.register(found)
            found = function
        methods.update((m.signature, m.implementation) for m in found.methods)
    own = cls.__dict__.get(name)
    if isinstance(own, plum.Function):  # what @dispatch collected is ours now: a class of the same name starts afresh
        plum.dispatch.classes.pop(f"{cls.__module__}.{cls.__qualname__}", None)
    combined = plum.Function(next(reversed(methods.values())))
    for signature, method in methods.items():
        combined.register(method, signature)
    return combined


def retain_type(new: Any, old: Any) -> Any:
    """`new` as the class of `old` where it lost that class on the way (a result of class Tensor from a TensorImage)."""
    kind = type(old)
    if type(new) is kind or not issubclass(kind, type(new)) or type(new) is object:
        return new
    if isinstance(new, torch.Tensor):
        return new.as_subclass(kind)
    if hasattr(new, "__dict__"):
        new.__class__ = kind
    return new


@dataclasses.dataclass
class FunctionTransform(Transform, registered=False):
    """A plain function used as a transform. It has no registered name, so it can run but not be exported."""

    function: Callable[[Any], Any]

    def __call__(self, x: Any) -> Any:
        return self.function(x)

    def decode(self, x: Any) -> Any:
        return x

    def to_plain(self) -> dict[str, Any]:
        raise ValueError(
            f"the function {getattr(self.function, '__name__', self.function)!r} is code, and an export holds data only: "
            "make it a subclass of Transform whose fields are its settings"
        )


TransformLike = Transform | Callable[[Any], Any]


def as_transform(t: TransformLike) -> Transform:
    """A transform as it is, a class of one made with its defaults, a function wrapped."""
    if isinstance(t, Transform):
        return t
    if isinstance(t, type) and issubclass(t, Transform):
        return t()
    if callable(t):
        return FunctionTransform(t)
    raise TypeError(f"a transform is a Transform or a function, not {t!r}")


def _flat(transforms: Any) -> Iterator[Transform]:
    if isinstance(transforms, Pipeline):
        yield from transforms.transforms
    elif isinstance(transforms, Iterable) and not isinstance(transforms, type):
        for t in transforms:
            yield from _flat(t)
    elif transforms is not None:
        yield as_transform(transforms)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Transforms in order of their `order`; decodes run in reverse."""

    transforms: tuple[Transform, ...] = ()

    @classmethod
    def of(cls, transforms: "TransformLike | Pipeline | Iterable[TransformLike | Pipeline] | None") -> "Pipeline":
        return cls(tuple(sorted(_flat(transforms), key=lambda t: t.order)))

    def __call__(self, x: Any, split_idx: int | None = None) -> Any:
        for t in self.transforms:
            if t.split_idx is None or t.split_idx == split_idx:
                x = t(x)
        return x

    def decode(self, x: Any) -> Any:
        for t in reversed(self.transforms):
            x = t.decode(x)
        return x

    def __add__(self, other: "Pipeline") -> "Pipeline":
        return Pipeline.of((*self.transforms, *other.transforms))

    def __str__(self) -> str:
        return " -> ".join(_short(t) for t in self.transforms) or "nothing"

    def to_plain(self) -> list[dict[str, Any]]:
        return [t.to_plain() for t in self.transforms]

    @classmethod
    def from_plain(cls, plain: Sequence[dict[str, Any]]) -> "Pipeline":
        return cls(tuple(transform_from_plain(p) for p in plain))


def _short(t: Transform) -> str:
    if isinstance(t, FunctionTransform):
        return getattr(t.function, "__name__", repr(t.function))
    text = repr(t)
    return text if len(text) <= 100 else text[:97] + "...)"
