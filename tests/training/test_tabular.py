"""Models of table rows: shapes, columns of one kind alone, what they learn, and their making from plain data."""

import pytest
import torch
from torch import nn

from training import CrossEntropyLossFlat, Learner, TabularModel, TabularResNet, emb_sz_rule
from training.models import ModelSpec
from training.tabular import TableInput

SIZES = [(4, 3), (3, 2)]
KINDS = [TabularModel, TabularResNet]


def columns(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(n, (rows,), generator=draw) for n, _ in SIZES], 1), torch.randn(rows, 2, generator=draw)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_a_row(kind: type[nn.Module]) -> None:
    codes, numbers = columns()
    assert kind(SIZES, 2, 5)(codes, numbers).shape == (6, 5)
    assert kind(SIZES, 0, 1)(codes).shape == (6, 1)
    assert kind([], 2, 3)(numbers).shape == (6, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_stay_in_their_range(kind: type[nn.Module]) -> None:
    out = kind(SIZES, 2, 1, y_range=(1.0, 2.0))(*columns())
    assert ((out > 1) & (out < 2)).all()


def test_an_input_row_is_the_embeddings_and_the_numbers() -> None:
    codes, numbers = columns()
    table = TableInput(SIZES, 2, bn_cont=False)
    row = table(codes, numbers)
    assert row.shape == (6, table.width) == (6, 7)
    assert torch.equal(row[:, :3], table.embeds[0].weight[codes[:, 0]])
    assert torch.equal(row[:, 3:5], table.embeds[1].weight[codes[:, 1]])
    assert torch.equal(row[:, 5:], numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_takes_both_kinds_of_columns(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    codes, numbers = columns(256)
    target = ((codes[:, 0] > 1) ^ (numbers[:, 0] > 0)).long()
    batches = [(codes[i : i + 32], numbers[i : i + 32], target[i : i + 32]) for i in range(0, 256, 32)]

    class Data:
        train, valid, n_inp = batches, batches, 2

    learn = Learner(Data(), kind(SIZES, 2, 2), loss_func=CrossEntropyLossFlat(), lr=1e-2)  # type: ignore[arg-type]
    with learn.no_logging():
        learn.fit(12)
    assert learn.validate()["valid/loss"] < 0.15


def test_layers_are_where_fastai_has_them() -> None:
    model = TabularModel(SIZES, 2, 3, layers=(8, 4), ps=(0.1, 0.2))
    kinds = [type(m).__name__ for m in model.layers.modules() if not list(m.children())]
    assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    with pytest.raises(ValueError, match="one dropout a layer: 2, not 1"):
        TabularModel(SIZES, 2, 3, layers=(8, 4), ps=(0.1,))


@pytest.mark.parametrize("builder", ["tabular_model", "tabular_resnet"])
def test_it_is_built_again_from_plain_data(builder: str) -> None:
    spec = ModelSpec(builder, {"emb_szs": [list(s) for s in SIZES], "n_cont": 2, "out_sz": 3})
    model = spec.build()
    assert model.spec == spec
    assert model(*columns()).shape == (6, 3)


def test_the_rule_of_widths() -> None:
    assert [emb_sz_rule(n) for n in (2, 10, 1000, 10**6)] == [2, 6, 77, 600]
