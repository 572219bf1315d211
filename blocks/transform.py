"""`Transform` and `Pipeline`: fastai's low level, with methods chosen by the type of the argument.

A transform is a dataclass: its fields are its configuration and what it learned from the data. So it prints, compares,
gets a fingerprint, and becomes plain data for an export and back without any code travelling along. That is why fastai's
DisplayedTransform has no counterpart (each one displays its fields), nor has InplaceTransform: a batch is a copy, so any
`encodes` may change its argument and return it.
"""

import dataclasses
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import plum
import torch

from blocks.house import HOUSE

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_REGISTRY: dict[str, type["Transform"]] = {}

# Several methods under one name, chosen by the types of their arguments. A dispatcher of our own: plum's common one knows
# functions by their name alone, so that another library's `show_batch` would meet ours.
dispatch = plum.Dispatcher()


class Summary(Protocol):
    """What a pass over some rows saw; summaries of parts merge, in any order, to the summary of the whole."""

    def observe(self, value: Any, row_id: str) -> None: ...

    def merge(self, other: Self) -> None: ...

    def to_plain(self) -> dict[str, Any]: ...

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self: ...


@runtime_checkable
class ColumnSummary(Protocol):
    """The vectorised face of a Summary: the same as `observe` of each value, for a whole Arrow column."""

    def observe_column(self, values: "pa.Array", row_ids: "pa.Array") -> None: ...


@runtime_checkable
class ColumnTransform(Protocol):
    """The vectorised face of a Transform: the same as `encodes` of each value, for a whole Arrow column.

    Gives an array with a row for each value (of ragged ones a LargeListArray), or a tuple of them; None where the values have
    to be encoded one by one, so that some can be left out. `blocks.testing` holds the two faces equal.
    """

    def encodes_column(self, values: "pa.Array") -> "pa.Array | np.ndarray | tuple[np.ndarray, ...] | None": ...


@dataclasses.dataclass
class Transform:
    """A step that `encodes` a value, and `decodes` it back to something that can be shown.

    Both are chosen by the annotated type of their argument; a value of another type passes through unchanged. Write one
    `encodes`, or several under `@dispatch`. On a tuple the transform acts on each element. Lower `order` runs first;
    `split_idx = 0` means: on training data only. It may have a second face for whole columns, `ColumnTransform`.
    """

    order: ClassVar[int] = 0
    split_idx: ClassVar[int | None] = None
    summary: ClassVar[Callable[..., Summary] | None] = None  # makes what observes the training part; None: nothing to fit
    opens_file: ClassVar[bool] = False  # makes a large value of a small file: a picture of a JPEG
    fixes_size: ClassVar[bool] = False  # makes values of one size of values of any

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in inspect.get_annotations(cls):
            raise TypeError(f"{cls.__name__}: a field cannot be called 'name', which names the transform in plain data")
        for name in ("encodes", "decodes"):
            setattr(cls, name, _dispatched(cls, name))
        if registered:
            _REGISTRY[registered_name(cls)] = cls

    if TYPE_CHECKING:  # so that mypy takes any signature in a subclass: one type of argument, or what was drawn as well
        encodes: ClassVar[Callable[..., Any]]
        decodes: ClassVar[Callable[..., Any]]
    else:

        def encodes(self, x: Any) -> Any:
            return x

        def decodes(self, x: Any) -> Any:
            return x

    def setups(self, train: Any, valid: Any) -> set[Any]:
        """Set the fitted fields from the summaries of the two parts; called once, and only where `summary` is given.

        Returns the ids of validation rows that must train instead.
        """
        return set()

    @property
    def fitted(self) -> bool:
        """Whether nothing is left to learn from the data."""
        return True

    def compose_with(self, other: "Transform") -> "Transform | None":
        """One transform that does this and then `other`, which follows it in a Pipeline; None where there is none."""
        return None

    @property
    def parts(self) -> tuple["Transform", ...]:
        """What `compose_with` made this one of, so that a Pipeline can put something in between; else itself."""
        return (self,)

    def __call__(self, x: Any) -> Any:
        return _each(self, type(self).encodes, x)

    def decode(self, x: Any) -> Any:
        return _each(self, type(self).decodes, x)

    def to_plain(self) -> dict[str, Any]:
        """This transform as plain data: its registered name and its fields. ValueError when a field holds code."""
        fields = {f.name: _plain(getattr(self, f.name), self, f.name) for f in dataclasses.fields(self)}
        return {"name": registered_name(type(self)), **fields}


def _each(t: Transform, f: Callable[..., Any], x: Any, *arguments: Any) -> Any:
    # Given the class's function: to bind a dispatched one takes microseconds.
    if type(x) is tuple:
        return tuple(_each(t, f, e, *arguments) for e in x)
    return retain_type(f(t, x, *arguments), x)


def _plain(value: Any, owner: Transform, field: str) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Transform():
            return value.to_plain()
        case tuple():
            return tuple(_plain(v, owner, field) for v in value)
        case dict() if "name" not in value and all(isinstance(k, str) for k in value):
            return {k: _plain(v, owner, field) for k, v in value.items()}
    raise ValueError(
        f"{type(owner).__name__}.{field} holds {value!r:.80} ({type(value).__name__}), which is not plain data: a field is a "
        "number, a text, None, a transform, a tuple of these, or a dict of them by texts other than 'name'"
    )


def _from_plain(value: Any) -> Any:
    match value:
        case list() | tuple():
            return tuple(_from_plain(v) for v in value)
        case {"name": _}:
            return transform_from_plain(value)
        case dict():
            return {k: _from_plain(v) for k, v in value.items()}
    return value


def transform_from_plain(plain: dict[str, Any]) -> Transform:
    """The transform that `to_plain` described. ValueError when its class is not among those that are loaded."""
    fields = dict(plain)
    name = fields.pop("name", None)
    if name not in _REGISTRY and isinstance(name, str):
        import blocks

        getattr(blocks, name, None)  # loads the file of ours that defines it
    if name not in _REGISTRY:
        raise ValueError(f"unknown transform {name!r}: it is not one of fastray's; import the module that defines it first")
    cls = _REGISTRY[name]
    allowed = {f.name for f in dataclasses.fields(cls)}
    if set(fields) != allowed:
        raise ValueError(f"{name} has the fields {sorted(allowed)}, but the file gives {sorted(fields)}")
    return cls(**{k: _from_plain(v) for k, v in fields.items()})


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
        for dispatcher in (dispatch, plum.dispatch):
            dispatcher.classes.pop(f"{cls.__module__}.{cls.__qualname__}", None)
    combined = plum.Function(next(reversed(methods.values())))
    for signature, method in methods.items():
        combined.register(method, signature)
    return combined


def applies(t: Transform, value: Any) -> bool:
    """Whether `t` has an `encodes` for the type of `value`, beyond the one of every transform that lets it pass."""
    signatures = [m.signature for m in type(t).encodes.methods]  # type: ignore[attr-defined]
    return any(s.types[1] not in (Any, object) and s.match((t, value)) for s in signatures)


def retain_type(new: Any, old: Any) -> Any:
    """`new` as the class of `old` where it lost that class on the way (a result of class Tensor from a TensorImage).

    A class may name another one, `retained`, for what is made of its values.
    """
    kind = getattr(type(old), "retained", type(old))
    if type(new) is kind or not issubclass(kind, type(new)) or type(new) is object:
        return new
    if isinstance(new, torch.Tensor):
        return new.as_subclass(kind)
    if hasattr(new, "__dict__"):
        new.__class__ = kind
    return new


@dataclasses.dataclass
class ItemTransform(Transform, registered=False):
    """A transform of a whole sample at once: `encodes` and `decodes` take the tuple, and return one of the same length.

    For what one element must know of another. A value that is no tuple, as in prediction, is given as it is.
    """

    def __call__(self, x: Any) -> Any:
        return _whole(self.encodes, x)

    def decode(self, x: Any) -> Any:
        return _whole(self.decodes, x)


def _whole(f: Callable[[Any], Any], x: Any) -> Any:
    new = f(x)
    if type(x) is tuple and type(new) is tuple and len(new) == len(x):
        return tuple(map(retain_type, new, x))
    return retain_type(new, x)


@dataclasses.dataclass
class RandTransform(Transform, registered=False):
    """A random transform of training data. What is random about it is drawn once a sample, by the sample's key.

    `draw` makes the parameters for some samples from their keys (`blocks.draws`), the decision by the probability `p` among
    them, and is pure: the same keys give the same parameters, on any device, alone or in a batch. `encodes(x, drawn)` is
    chosen by the type of x and uses them; the elements of a tuple (picture, mask, points, boxes) all get the same ones,
    so they move together. On the item side there is one key, on the batch side one a row.
    """

    p: float = dataclasses.field(default=1.0, kw_only=True)

    split_idx: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"{type(self).__name__}: p is a probability from 0 to 1, not {self.p!r}")

    def draw(self, x: Any, keys: torch.Tensor) -> Any:
        """The parameters for the samples whose `keys`, int64 (rows,), are given; x: the value or tuple they are for."""
        raise NotImplementedError(f"{type(self).__name__} must say what it draws: def draw(self, x, keys)")

    def encodes(self, x: Any, drawn: Any) -> Any:
        return x

    def __call__(self, x: Any, keys: torch.Tensor | None = None) -> Any:
        if keys is None:
            raise ValueError(
                f"{type(self).__name__} draws by the keys of the samples, and none are given: call it as t(x, keys=keys), a "
                "Pipeline as pipeline(x, split_idx=0, keys=batch.keys) (blocks.draws.sample_keys makes keys)"
            )
        return _each(self, type(self).encodes, x, self.draw(x, keys))

    def steady(self, x: Any) -> Any:
        """The parameters outside training, where nothing is random; None leaves `x` as it is.

        A transform that gives its results a size does so for validation, too: with `split_idx = None` and this.
        """
        return None

    def outside_training(self, x: Any) -> Any:
        """What a Pipeline makes of `x` on another part than training."""
        drawn = self.steady(x)
        return x if drawn is None else _each(self, type(self).encodes, x, drawn)


AnyTransform = TypeVar("AnyTransform", bound=Transform)


def with_own_keys(tfms: Iterable[AnyTransform], keys: torch.Tensor | None) -> Iterator[tuple[AnyTransform, Any]]:
    """Each transform with the keys it draws by: the second of a kind draws other numbers than the first."""
    if keys is None:
        yield from ((t, None) for t in tfms)
        return
    seen: Counter[type] = Counter()
    for t in tfms:
        yield t, keys + seen[type(t)] if seen[type(t)] else keys
        seen[type(t)] += 1


@dataclasses.dataclass
class FunctionTransform(Transform, registered=False):
    """A plain function used as a transform, of values of the type its first parameter is annotated with, if it is.

    It has no registered name, so it can run but not be exported.
    """

    function: Callable[[Any], Any]

    def encodes(self, x: Any) -> Any:
        return self.function(x) if isinstance(x, self._takes) else x

    @cached_property
    def _takes(self) -> Any:
        try:
            first = next(iter(inspect.signature(self.function).parameters))
            takes = typing.get_type_hints(self.function).get(first, object)
            isinstance(None, takes)
        except (TypeError, ValueError, StopIteration, NameError):  # a builtin, or a hint that is no class or union of some
            return object
        return takes

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
        yield from _flat(transforms.transforms)
    elif isinstance(transforms, Iterable) and not isinstance(transforms, type):
        for t in transforms:
            yield from _flat(t)
    elif transforms is not None:
        yield from as_transform(transforms).parts


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Transforms in order of their `order`, neighbours composed where they can be; decodes run in reverse."""

    transforms: tuple[Transform, ...] = ()

    @classmethod
    def of(cls, transforms: "TransformLike | Pipeline | Iterable[TransformLike | Pipeline] | None") -> "Pipeline":
        composed: list[Transform] = []
        for t in sorted(_flat(transforms), key=lambda t: t.order):
            both = composed[-1].compose_with(t) if composed else None
            if both is None:
                composed.append(t)
            else:
                composed[-1] = both
        return cls(tuple(composed))

    def __call__(self, x: Any, split_idx: int | None = None, keys: torch.Tensor | None = None) -> Any:
        """`x` through all transforms; through those of one part only where `split_idx` names it (0: training).

        keys: int64 (rows,), by which random transforms draw; ValueError when one has to and there are none.
        """
        for t, own in with_own_keys(self.transforms, keys):
            if t.split_idx is None or t.split_idx == split_idx:
                if not isinstance(t, RandTransform):
                    x = t(x)
                elif split_idx == 0:
                    x = t(x, keys=own)
                else:
                    x = t.outside_training(x)
        return x

    def decode(self, x: Any) -> Any:
        for t in reversed(self.transforms):
            x = t.decode(x)
        return x

    def show(self, x: Any) -> Any:
        """A matplotlib figure of what `x` is decoded to; how a type is drawn, a method of `blocks.show.draw` says."""
        from blocks.show import show

        return show(self.decode(x))

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
    if len(t.parts) > 1:
        return "+".join(type(part).__name__ for part in t.parts)
    text = repr(t)
    return text if len(text) <= 100 else text[:97] + "...)"
