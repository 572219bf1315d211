"""Models by name: a builder is a function whose name and arguments, as data, are enough to build the model again.

An export holds that data and the weights, so that loading it runs nothing but the builders registered here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import nn

from blocks.errors import UserError
from blocks.transform import registered_name

Builder = Callable[..., nn.Module]
BUILDERS: dict[str, Builder] = {}


@dataclass(frozen=True)
class ModelSpec:
    """The builder's registered name and its keyword arguments."""

    builder: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with fresh weights. ValueError when no such builder is registered."""
        if self.builder not in BUILDERS:
            import training

            getattr(training, self.builder, None)  # loads the file of ours that defines it
        if self.builder not in BUILDERS:
            raise ValueError(f"unknown model builder {self.builder!r}; known: {', '.join(sorted(BUILDERS))}")
        return BUILDERS[self.builder](**self.arguments)


def model_builder(function: Builder) -> Builder:
    """Register a function of keyword arguments (plain data) that builds a model; the model remembers them as `.spec`."""

    @wraps(function)
    def build(**arguments: Any) -> nn.Module:
        model = function(**arguments)
        model.spec = ModelSpec(registered_name(function), arguments)  # type: ignore[assignment]
        return model

    BUILDERS[registered_name(function)] = build
    return build


@model_builder
def torchvision_classifier(*, arch: str, n_out: int) -> nn.Module:
    """A classifier of torchvision with random weights, by its name there: (rows, 3, h, w) float -> (rows, n_out) logits.

    UserError when torchvision has no classifier of that name.
    """
    return torchvision_model(arch, num_classes=n_out)


def torchvision_model(arch: str, **arguments: Any) -> nn.Module:
    """torchvision's classifier of that name, with random weights. UserError when it has none, naming some that are near."""
    import difflib

    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=3)
        raise UserError(
            f"torchvision has no classifier {arch!r}" + (f": did you mean {', '.join(map(repr, near))}?" if near else "")
        )
    return torchvision.models.get_model(arch, weights=None, **arguments)
