"""DataBlocks of any number of inputs and targets, of several columns a block, and of random item transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    RandTransform,
    TensorNumber,
    Transform,
    TransformBlock,
)
from blocks.encode import encode_sample, finish_sample
from blocks.prepare import prepare


def number(x: Any) -> torch.Tensor:
    return torch.tensor(float(x)).as_subclass(TensorNumber)


def pair(x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return number(x), number(10 * x)


def times(n: int) -> Any:
    def getter(item: int) -> int:
        return item * n

    return getter


def evens(items: Sequence[Any]) -> tuple[list[int], list[int]]:
    return list(range(0, len(items), 2)), list(range(1, len(items), 2))


NUMBER = TransformBlock(type_tfms=(number,))


def block_of(**changes: Any) -> DataBlock:
    settings = {"blocks": (NUMBER, NUMBER), "splitter": evens} | changes
    return DataBlock(**settings)


def columns_of(dls: DataLoaders) -> dict[str, list[float]]:
    assert dls.prepared is not None
    (table,) = dls.prepared.tables()
    return {name: table[name].to_pylist() for name in table.column_names[2:]}


def test_several_inputs_and_targets_each_with_its_getter() -> None:
    block = block_of(blocks=[NUMBER] * 4, n_inp=2, get_x=[times(1), times(2)], get_y=[times(3), times(4)])
    dls = block.dataloaders(range(6), batch_size=4)
    assert columns_of(dls) == {f"{k}": [i * n for i in range(6)] for k, n in (("x0", 1), ("x1", 2), ("y0", 3), ("y1", 4))}
    assert dls.n_inp == 2
    x0, x1, y0, y1 = dls.one_batch()
    assert [float(v) for v in x1] == [2 * float(v) for v in x0]
    assert [float(v) for v in y1] == [4 * float(v) for v in x0]
    assert type(y0) is TensorNumber
    same = block_of(blocks=[NUMBER] * 4, n_inp=2, getters=[times(n) for n in (1, 2, 3, 4)])
    assert columns_of(same.dataloaders(range(6), batch_size=4)) == columns_of(dls)


def test_all_but_the_last_block_are_inputs() -> None:
    dls = block_of(blocks=[NUMBER] * 3).dataloaders(range(6), batch_size=4)
    assert list(columns_of(dls)) == ["x0", "x1", "y"]
    assert dls.n_inp == 2


def test_a_block_without_a_target() -> None:
    dls = block_of(blocks=[NUMBER]).dataloaders(range(6), batch_size=4)
    assert list(columns_of(dls)) == ["x"]
    assert dls.n_inp == 1


def test_a_tuple_becomes_several_columns() -> None:
    dls = block_of(blocks=[TransformBlock(type_tfms=(pair,)), NUMBER]).dataloaders(range(6), batch_size=4)
    assert columns_of(dls) == {"x.0": list(range(6)), "x.1": [10 * i for i in range(6)], "y": list(range(6))}
    assert dls.n_inp == 2
    assert dls.encode is not None
    assert dls.encode.layout == ("x.0", "x.1", "y")
    assert dls.encode.nested((1, 2, 3)) == ((1, 2), 3)
    assert dls.encode.flat(((1, 2), 3)) == {"x.0": 1, "x.1": 2, "y": 3}


def test_rows_that_become_other_columns() -> None:
    def odd(x: Any) -> Any:
        return pair(x) if x == 3 else number(x)

    with pytest.raises(ValueError, match="the row '3' becomes other columns than '0'"):
        block_of(blocks=[TransformBlock(type_tfms=(odd,)), NUMBER]).dataloaders(range(6))


def test_blocks_that_are_no_blocks() -> None:
    with pytest.raises(TypeError, match="call them"):
        DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=list)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_inp": 0}, "1 to 2, not 0"),
        ({"n_inp": 3}, "1 to 2, not 3"),
        ({"get_x": [abs, abs]}, "get_x lists 2 functions, but there are 1 blocks"),
        ({"blocks": [NUMBER] * 3, "get_x": abs}, "get_x is one function, but there are 2 blocks"),
        ({"getters": [abs]}, "one function a block: 2, not 1"),
    ],
    ids=str,
)
def test_a_wrong_number_of_something(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_of(**changes)


@dataclass
class Jitter(RandTransform):
    """Adds what is drawn."""

    def draw(self, x: Any, keys: torch.Tensor) -> Any:
        return keys.float()

    def encodes(self, x: TensorNumber, drawn: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + drawn[0]


@dataclass
class Double(Transform):
    def encodes(self, x: TensorNumber) -> torch.Tensor:
        return x * 2


@dataclass
class TrainOnly(Transform):
    split_idx = 0

    def encodes(self, x: TensorNumber) -> torch.Tensor:
        return x + 1


def test_what_follows_a_random_item_transform_runs_each_epoch() -> None:
    block = block_of(item_tfms=[Double(), Jitter(), Double()])
    plan = block.plan(range(6))
    prepared = prepare(plan)
    assert prepared.tables()[0]["x"].to_pylist() == [0, 2, 4, 6, 8, 10]
    stored = (number(4), number(4))
    assert [float(v) for v in finish_sample(prepared.encode, stored, torch.tensor([5]), 0)] == [18, 18]
    assert [float(v) for v in finish_sample(prepared.encode, stored, torch.tensor([5]), 1)] == [8, 8]
    assert "sample  each epoch  feed    Jitter(p=1.0) -> Double()" in plan.explain()


def test_item_transforms_for_training_only() -> None:
    prepared = prepare(block_of(item_tfms=TrainOnly()).plan(range(4)))
    assert prepared.tables()[0]["x"].to_pylist() == [1, 1, 3, 3]
    assert [float(v) for v in encode_sample(prepared.encode, "new", 7)] == [7, 7]


def test_a_block_with_one_thing_changed() -> None:
    block = block_of()
    assert replace(block, n_inp=2).n_inp == 2
    assert block.n_inp is None
