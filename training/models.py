"""Models by name: a builder is a function whose name and arguments, as data, are enough to build the model again.

An export holds that data and the weights, so that loading it runs nothing but the builders registered here.
"""

import difflib
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


@model_builder
def timm_classifier(*, arch: str, n_out: int) -> nn.Module:
    """A classifier of timm with random weights, by its name there: (rows, 3, h, w) float -> (rows, n_out) logits.

    UserError when timm is not installed or has no classifier of that name.
    """
    return timm_model(arch, num_classes=n_out)


def image_model(arch: str, **arguments: Any) -> nn.Module:
    """torchvision's classifier of that name, else timm's, with random weights. UserError when neither has it."""
    return torchvision_model(arch, **arguments) if arch in torchvision_names() else timm_model(arch, **arguments)


def torchvision_names() -> list[str]:
    """The classifiers that torchvision has."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def torchvision_model(arch: str, **arguments: Any) -> nn.Module:
    """torchvision's classifier of that name, with random weights. UserError when it has none, naming some that are near."""
    import torchvision

    if arch not in torchvision_names():
        raise UserError(f"torchvision has no classifier {arch!r}{_near(arch, torchvision_names())}")
    return torchvision.models.get_model(arch, weights=None, **arguments)


def timm_model(arch: str, **arguments: Any) -> nn.Module:
    """timm's classifier of that name, with random weights. UserError when it has none, or is not installed."""
    try:
        import timm
    except ModuleNotFoundError as missing:
        if missing.name != "timm":
            raise
        raise UserError(
            f"torchvision has no classifier {arch!r}{_near(arch, torchvision_names())}; timm's are in the extra: "
            "pip install 'fastray[vision]'"
        ) from None
    if not timm.is_model(arch):
        known = [*torchvision_names(), *timm.list_models()]
        raise UserError(f"neither torchvision nor timm has a classifier {arch!r}{_near(arch, known)}")
    return timm.create_model(arch, pretrained=False, **arguments)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {', '.join(map(repr, near))}?" if near else ""
