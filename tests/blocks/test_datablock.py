"""DataBlocks of any number of inputs and targets, of several columns a block, and of random item transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from blocks import (
    CategoryBlock,
    ColReader,
    DataBlock,
    DataError,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    PILImage,
    RandTransform,
    TensorCategory,
    TensorImage,
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
    ids=lambda changes: " ".join(changes) if isinstance(changes, dict) else "",
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


# --- other ways to make and to look at one -----------------------------------------------------------------------------


def test_from_columns() -> None:
    block = DataBlock.from_columns((NUMBER, CategoryBlock()), splitter=evens)
    dls = block.dataloaders([[1, 2, 3, 4], ["a", "a", "b", "b"]], batch_size=2)
    assert columns_of(dls) == {"x": [1, 2, 3, 4], "y": [0, 0, 1, 1]}
    made = DataBlock.from_columns((NUMBER, NUMBER), get_items=lambda n: [range(n), range(n, 2 * n)], splitter=evens)
    assert columns_of(made.dataloaders(4, batch_size=2)) == {"x": [0, 1, 2, 3], "y": [4, 5, 6, 7]}
    with pytest.raises(DataError, match="sequences of one length"):
        block.plan([[1, 2], ["a"]])


def test_from_columns_with_getters() -> None:
    block = DataBlock.from_columns((NUMBER, NUMBER), getters=[lambda item: item[1], lambda item: item[0]], splitter=evens)
    assert columns_of(block.dataloaders([[1, 2, 3], [4, 5, 6]], batch_size=2)) == {"x": [4, 5, 6], "y": [1, 2, 3]}


def test_datasets_are_samples_one_by_one(digits_block: DataBlock, few_digits: Path) -> None:
    sets = digits_block.datasets(few_digits)
    prepared = prepare(digits_block.plan(few_digits))
    parts = prepared.index["parts"]
    assert (len(sets.train), len(sets.valid)) == (parts["train"], parts["valid"])
    assert sets.vocab == ("0", "1", "2")
    image, category = sets.train[0]
    assert type(image) is PILImage
    assert type(category) is TensorCategory
    assert [int(y) for _, y in sets.valid] == [
        y for t in prepared.tables() for y, part in zip(t["y"].to_pylist(), t["part"].to_pylist(), strict=True) if part
    ]
    assert [int(y) for _, y in sets.valid[-3:]] == [int(sets.valid[i][1]) for i in (-3, -2, -1)]
    with pytest.raises(IndexError):
        sets.valid[parts["valid"]]


def test_datasets_of_a_table() -> None:
    frame = pd.DataFrame({"a": range(10), "kind": list("xyxyxyxyxy")})
    block = DataBlock((NUMBER, CategoryBlock()), get_x=ColReader("a"), get_y=ColReader("kind"), splitter=IndexSplitter((2, 7)))
    sets = block.datasets(frame)
    assert [(float(x), int(y)) for x, y in sets.valid] == [(2, 0), (7, 1)]
    assert float(sets.train[-1][0]) == 9


# --- summary -----------------------------------------------------------------------------------------------------------


def test_summary_walks_a_sample_through_every_step(
    digits_block: DataBlock, few_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits_block.summary(few_digits)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"120 files of {few_digits}"
    starts = [
        "",
        "One sample, the row '0/00",
        "  x: the_item gives PosixPath(",
        "    OpenImage(mode='RGB') gives PILImage, 8 wide, 8 high",
        "  y: parent_label gives '0' (str)",
        "    Categorize(vocab=('0', '1', '2'), sort=True, add_na=False) gives TensorCategory, a number of int64 = 0",
        "  Resize(size=(16, 16)",
        "  ToTensor(), once, gives (TensorImage, 3x16x16 of uint8; TensorCategory, a number of int64 = 0)",
        "",
        "A batch of 4: (TensorImage, 4x3x16x16 of uint8; TensorCategory, 4 of int64)",
        "  IntToFloatTensor(",
        "  Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)) gives (TensorImage, 4x3x16x16 of float32; ",
    ]
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.startswith(start)


@dataclass
class Broken(Transform):
    def encodes(self, x: TensorNumber) -> torch.Tensor:
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"get_y": lambda item: item["label"]}, r"<lambda> fails on the row 0, given 0 \(int\): TypeError: 'int'"),
        ({"item_tfms": [Double(), Broken()]}, r"Broken\(\) fails on the row 0, given \(TensorNumber, a number of float32 = 0;"),
        ({"batch_tfms": Broken()}, r"Broken\(\) fails on the row 'first 3', given \(TensorNumber, 3 of float32;"),
        ({"blocks": (NUMBER, TransformBlock())}, "ends up with 0 .int., not with tensors"),
    ],
    ids=["getter", "item", "batch", "no tensor"],
)
def test_summary_names_the_step_and_the_item(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        block_of(**changes).summary(range(6))


def test_summary_shows_what_is_random(capsys: pytest.CaptureFixture[str]) -> None:
    block_of(item_tfms=[Double(), Jitter()]).summary(range(6))
    assert "  Jitter(p=1.0), each epoch, gives (TensorNumber," in capsys.readouterr().out


# --- fitting -----------------------------------------------------------------------------------------------------------


@dataclass
class Total:
    """The sum of what it saw."""

    sum: float = 0.0

    def observe(self, value: Any, row_id: Any) -> None:
        self.sum += float(value)

    def merge(self, other: "Total") -> None:
        self.sum += other.sum

    def to_plain(self) -> dict[str, Any]:
        return {"sum": self.sum}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Total":
        return cls(**plain)


@dataclass
class Share(Transform):
    """Divides by the total of the training part."""

    total: float = 0.0

    summary = Total

    @property
    def fitted(self) -> bool:
        return self.total != 0

    def setups(self, train: Total, valid: Total) -> set[Any]:
        self.total = train.sum
        return set()

    def encodes(self, x: TensorNumber) -> torch.Tensor:
        return x / self.total


def test_what_follows_a_fitted_transform_is_fitted_in_a_pass_of_its_own() -> None:
    block = block_of(blocks=(TransformBlock(type_tfms=(number, Share(), Share())), NUMBER), splitter=IndexSplitter((0,)))
    plan = block.plan([10, 1, 2, 5])
    assert [[f.position for f in fits] for fits in plan.passes()] == [[1], [2]]
    assert "Share on the training part, pass 2" in plan.explain()
    prepared = prepare(plan)
    assert [t.total for t in prepared.encode.columns[0].type_tfms.transforms[1:]] == [8, 1]  # type: ignore[attr-defined]
    assert prepared.tables()[0]["x"].to_pylist() == [1.25, 0.125, 0.25, 0.625]


def test_the_batch_side_learns_from_the_stored_training_rows() -> None:
    block = block_of(batch_tfms=Share(), splitter=IndexSplitter((0,)))
    source = [10, 1, 2, 5]
    dls = block.dataloaders(source, batch_size=4)
    (share,) = dls.batch_tfms.transforms
    assert share == Share(16)  # 8 of each column
    assert [float(v) for v in dls.one_batch()[0]] == [10 / 16]
    assert dls.prepared is not None
    assert len(list(dls.prepared.folder.glob("fitted-*.json"))) == 1
    again = block.dataloaders(source, batch_size=4)
    assert again.prepared is not None
    assert again.prepared.reused
    assert again.batch_tfms == dls.batch_tfms


NO_IDENTITY = object()


@dataclass
class ShareOfAnother(Share):
    """With something in its code that has no fingerprint, as a logger has none."""

    def setups(self, train: Total, valid: Total) -> set[Any]:
        assert NO_IDENTITY is not None
        return super().setups(train, valid)


def test_the_batch_side_learns_anew_what_cannot_be_recognised() -> None:
    block = block_of(batch_tfms=ShareOfAnother(), splitter=IndexSplitter((0,)))
    for _ in range(2):
        dls = block.dataloaders([10, 1, 2, 5], batch_size=4)
        assert dls.batch_tfms.transforms == (ShareOfAnother(16),)
        assert dls.prepared is not None
        assert not list(dls.prepared.folder.glob("fitted-*.json"))


@dataclass
class ShareOfImages(Transform):
    """Of a type that no column has."""

    total: float = 0.0

    summary = Total

    @property
    def fitted(self) -> bool:
        return self.total != 0

    def setups(self, train: Total, valid: Total) -> set[Any]:
        self.total = train.sum
        return set()

    def encodes(self, x: TensorImage) -> torch.Tensor:
        return x / self.total


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="ShareOfImages finds nothing to learn from"):
        block_of(batch_tfms=ShareOfImages()).dataloaders(range(1, 6))
    with pytest.raises(ValueError, match="belongs to a block's type_tfms"):
        block_of(item_tfms=Share()).plan(range(6))
