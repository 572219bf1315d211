"""Typed tensors keep their meaning through what is done to them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from blocks import TensorBase, TensorBBox, TensorCategory, TensorImage, TensorImageBW, TensorPoint, TensorText
from blocks.tensors import as_plain, tensor_type


def image() -> TensorImage:
    return torch.arange(24).reshape(2, 3, 4).to(torch.uint8).as_subclass(TensorImage)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[0],
        lambda x: x[..., 1:],
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: torch.ones(2, 3, 4) * x,
        lambda x: -x.float(),
        lambda x: x.to(torch.float64),
        lambda x: x.clamp(0, 3),
        lambda x: torch.stack([x, x]),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.where(x > 3, x, x + 1),
        lambda x: x.unbind()[1],
        lambda x: next(iter(x)),
        lambda x: x.clone().detach(),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301  our own bytes
    ],
)
def test_the_type_stays(operation: Callable[[TensorImage], torch.Tensor]) -> None:
    plain = torch.as_tensor(operation(as_plain(image())))
    result = operation(image())
    assert type(result) is TensorImage
    assert result.dtype == plain.dtype
    assert torch.equal(as_plain(result), plain)


def test_the_first_typed_argument_names_the_type() -> None:
    a, b = torch.ones(2).as_subclass(TensorCategory), torch.ones(2).as_subclass(TensorImage)
    assert type(a * b) is TensorCategory
    assert type(b * a) is TensorImage
    assert type(torch.stack([b, a])) is TensorImage


def test_a_subclass_does_not_win_over_the_first_argument() -> None:
    a, b = torch.ones(2).as_subclass(TensorImage), torch.ones(2).as_subclass(TensorImageBW)
    assert type(a + b) is TensorImage
    assert type(b + a) is TensorImageBW


def test_what_is_no_tensor_stays_what_it_is() -> None:
    assert type(image().shape) is torch.Size
    assert type(image().tolist()) is list
    assert type(image()[0, 0, 1].item()) is int


def test_as_plain_shares_storage() -> None:
    typed = image()
    plain = as_plain(typed)
    assert type(plain) is torch.Tensor
    plain[0, 0, 0] = 99
    assert typed[0, 0, 0] == 99


def test_as_plain_leaves_other_things_alone() -> None:
    tensor = torch.ones(1)
    assert as_plain(tensor) is tensor
    assert as_plain("text") == "text"


@pytest.mark.parametrize("kind", [torch.Tensor, TensorBase, TensorImage, TensorImageBW, TensorCategory])
def test_a_type_is_found_by_its_name(kind: type[torch.Tensor]) -> None:
    assert tensor_type(kind.__name__) is kind


@pytest.mark.parametrize("name", ["TensorNobodyMade", "", "int"])
def test_unknown_type_name(name: str) -> None:
    with pytest.raises(ValueError, match="unknown tensor type"):
        tensor_type(name)


def test_which_types_are_stored_with_their_lengths() -> None:
    assert all(kind.ragged for kind in (TensorPoint, TensorBBox, TensorText))
    assert not any(kind.ragged for kind in (TensorBase, TensorImage, TensorCategory))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[0],
        lambda x: x * 2,
        lambda x: torch.stack([x, x]),
        lambda x: x.to(torch.float64),
        lambda x: x.to("meta"),
        lambda x: x.view(-1),
        lambda x: x.clone(),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301  our own bytes
    ],
)
def test_attributes_stay(operation: Callable[[TensorPoint], torch.Tensor]) -> None:
    result = operation(TensorPoint.create([[1, 2]], img_size=(40, 20)))
    assert type(result) is TensorPoint
    assert result.img_size == (40, 20)


def test_attributes_of_one_tensor_are_its_own() -> None:
    given = TensorPoint.create([[1, 2]], img_size=(40, 20))
    moved = given + 1
    moved.img_size = (1, 1)
    assert given.img_size == (40, 20)
    assert not hasattr(as_plain(given), "img_size")
