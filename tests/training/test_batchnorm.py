"""BatchNorm on two ranks with uneven shares is BatchNorm of one process on the global batch: outputs, gradients, buffers."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training import batchnorm, distributed
from training.ranks import Ranks

from .several_ranks import on_ranks

SHARES = [slice(0, 7), slice(7, 10)]
Backward = Callable[[Tensor, float], None]


def data_and_model(timms: bool = False, **norm: Any) -> tuple[Tensor, Tensor, nn.Module]:
    torch.manual_seed(1)
    if timms:
        from timm.layers import BatchNormAct2d

        normalised = [BatchNormAct2d(4, act_layer=nn.GELU, drop_layer=nn.Hardtanh, **norm)]
    else:
        normalised = [nn.BatchNorm2d(4, **norm), nn.ReLU()]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        *normalised,
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.BatchNorm1d(8, affine=False, **norm),
        nn.Linear(8, 3),
    )
    return torch.randn(10, 3, 8, 8), torch.randint(0, 3, (10,)), model


# By name: the layers' settings, the dtype of model and rows, and how near two ranks come to one process.
WAYS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "as it is": ({}, torch.float32, 2e-6),
    "float64": ({}, torch.float64, 1e-12),
    "mean of all batches": ({"momentum": None}, torch.float32, 2e-6),
    "no running statistics": ({"track_running_stats": False}, torch.float32, 2e-6),
    "timm's": ({"timms": True}, torch.float32, 2e-6),
    "bfloat16": ({}, torch.bfloat16, 0.05),
}


def trained(model: nn.Module, x: Tensor, y: Tensor, backward: Backward) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(nn.functional.cross_entropy(model(x), y), len(y))
        optimizer.step()
    return model.state_dict()


class TwoHeads(nn.Module):
    """A BatchNorm, and a head that only some of the rows use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, with_other: int) -> Tensor:
        y = self.body(x)
        return self.head(y) + nn.functional.pad(self.other(y[:with_other]), (0, 0, 0, len(y) - with_other))


def far_from_zero() -> Tensor:
    """Numbers as years or prices are, before anything scales them."""
    return 100_000 + 10 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@on_ranks(2)
def all_ways(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name, (settings, dtype, _) in WAYS.items():
        if settings.get("timms") and find_spec("timm") is None:
            continue
        x, y, model = data_and_model(**settings)
        own = [type(m) for m in model]
        ranks = Ranks(model.to(dtype))
        states[name] = trained(model, x[SHARES[rank]].to(dtype), y[SHARES[rank]], ranks.backward)
        ranks.end()
        assert [type(m) for m in model] == own
    return states


@on_ranks(2)
def two_heads(rank: int, world: int) -> list[Tensor]:
    size, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 60  # one for each head
    heads = TwoHeads()
    ranks = Ranks(heads)
    share = data_and_model()[0][SHARES[rank], 0, 0, :4]
    said = heads(share, len(share)) if rank == 0 else heads.head(heads.body(share))
    ranks.backward(said.square().mean(), len(share))
    ranks.end()
    distributed.BUCKET_BYTES = size
    return gradients(heads)


@on_ranks(2)
def small_spread(rank: int, world: int) -> list[Tensor]:
    norm = nn.Sequential(nn.BatchNorm1d(3))
    ranks = Ranks(norm)
    y = norm(far_from_zero()[SHARES[rank]])
    ranks.end()
    return [y, norm[0].running_var]


@on_ranks(2)
def one_row(rank: int, world: int) -> str:
    """Of all ranks together: rank 1 has a borrowed one."""
    norm = nn.Sequential(nn.BatchNorm1d(3))
    ranks = Ranks(norm)
    ranks.begin_batch(training=True, borrowed=rank == 1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        norm(torch.ones(1, 3))
    ranks.end()
    return str(raised.value)


@on_ranks(2)
def own_rows(rank: int, world: int) -> dict[str, Tensor]:
    """Each rank's own statistics; rank 1 has a single row, and then a borrowed one."""
    norm = nn.Sequential(nn.BatchNorm1d(3))
    ranks = Ranks(norm, sync_bn=False)
    rows = far_from_zero()[:7] if rank == 0 else far_from_zero()[9:]
    ranks.begin_batch(training=True, borrowed=False)
    first = norm(rows)
    ranks.begin_batch(training=True, borrowed=rank == 1)
    norm(far_from_zero()[:7])
    own = {name: b.clone() for name, b in norm.named_buffers()}
    ranks.end()
    distributed.average_buffers(norm)
    return {"first": first, "own": own["0.running_mean"], "averaged": norm[0].running_mean}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_are_as_one_process(way: str, ranks_found: Any) -> None:
    settings, dtype, near = WAYS[way]
    if settings.get("timms"):
        pytest.importorskip("timm")
    x, y, model = data_and_model(**settings)
    expected = trained(model.to(dtype), x.to(dtype), y, lambda loss, count: loss.backward())
    for found in ranks_found(all_ways, 2):
        assert found[way].keys() == expected.keys()
        for name, value in found[way].items():
            torch.testing.assert_close(value, expected[name], atol=near, rtol=5 * near, msg=name)


def test_a_part_that_one_rank_alone_uses(ranks_found: Any) -> None:
    """Its gradients are ready there earlier than on the other one, while BatchNorm's backward pass sums as well."""
    x, model = data_and_model()[0], TwoHeads()
    model(x[:, 0, 0, :4], 7).square().mean().backward()
    for found in ranks_found(two_heads, 2):
        for gradient, expected in zip(found, gradients(model), strict=True):
            torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-5)


def test_a_spread_that_is_small_beside_the_mean(ranks_found: Any) -> None:
    norm = nn.BatchNorm1d(3)
    y = norm(far_from_zero())
    for share, found in zip(SHARES, ranks_found(small_spread, 2), strict=True):
        torch.testing.assert_close(found, [y[share], norm.running_var], atol=5e-3, rtol=1e-3)


def test_one_row_of_all_ranks_is_refused_on_all_of_them(ranks_found: Any) -> None:
    first, other = ranks_found(one_row, 2)
    assert first == other


def test_each_rank_with_statistics_of_its_own(ranks_found: Any) -> None:
    norm = nn.BatchNorm1d(3)
    expected = norm(far_from_zero()[:7])
    norm(far_from_zero()[:7])
    first, other = ranks_found(own_rows, 2)
    torch.testing.assert_close(first["first"], expected)
    torch.testing.assert_close(first["own"], norm.running_mean)
    assert torch.equal(other["own"], torch.zeros(3))  # of one row, and of rows that are not its own, nothing is learnt
    for found in (first, other):
        torch.testing.assert_close(found["averaged"], norm.running_mean / 2)


def test_the_choice_is_said_and_what_it_leaves_out() -> None:
    class Own(nn.BatchNorm1d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(2), Own(2))
    assert batchnorm.over_ranks(model, sync=False)
    said = batchnorm.in_words(model, sync=False).split("; ")
    assert said == [
        "BatchNorm: statistics of each worker's own rows (sync_bn=False)",
        "Own: statistics as its own class takes them on each worker",
    ]
    batchnorm.undo(model)
    assert [type(m) for m in model] == [nn.BatchNorm1d, Own]
    assert batchnorm.in_words(nn.Linear(1, 1), sync=True) == ""
