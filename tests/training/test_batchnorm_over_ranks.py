"""BatchNorm on two ranks with uneven shares is BatchNorm of one process on the global batch: outputs, gradients, buffers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import training.ranks
from training import distributed
from training.ranks import Ranks

SHARES = [slice(0, 7), slice(7, 10)]


def data_and_model() -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.BatchNorm1d(8, affine=False),
        nn.Linear(8, 3),
    )
    return torch.randn(10, 3, 8, 8), torch.randint(0, 3, (10,)), model


Backward = Callable[[torch.Tensor, float], None]


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, backward: Backward) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(nn.functional.cross_entropy(model(x), y), len(y))
        optimizer.step()


class TwoHeads(nn.Module):
    """A BatchNorm, and a head that only some of the rows use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, with_other: int) -> torch.Tensor:
        y = self.body(x)
        return self.head(y) + nn.functional.pad(self.other(y[:with_other]), (0, 0, 0, len(y) - with_other))


def far_from_zero() -> torch.Tensor:
    """Numbers as years or prices are, before anything scales them."""
    return 100_000 + 10 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def be_a_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, y, model = data_and_model()
    ranks = Ranks(model)
    trained(model, x[SHARES[rank]], y[SHARES[rank]], ranks.backward)
    ranks.end()
    assert [type(m) for m in model] == [type(m) for m in data_and_model()[2]]

    training.ranks.BUCKET_BYTES = 60  # one for each head
    heads = TwoHeads()
    ranks = Ranks(heads)
    share = x[SHARES[rank], 0, 0, :4]
    said = heads(share, len(share)) if rank == 0 else heads.head(heads.body(share))
    ranks.backward(said.square().mean(), len(share))
    ranks.end()
    norm = nn.Sequential(nn.BatchNorm1d(3))
    ranks = Ranks(norm)
    y = norm(far_from_zero()[SHARES[rank]])
    ranks.end()
    torch.save(
        {"state": model.state_dict(), "heads": gradients(heads), "norm": [y, norm[0].running_var]}, folder / f"{rank}.pt"
    )
    distributed.leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_a_part_that_one_rank_alone_uses(found: list[dict[str, Any]]) -> None:
    """Its gradients are ready there earlier than on the other one, while BatchNorm's backward pass sums as well."""
    x, model = data_and_model()[0], TwoHeads()
    model(x[:, 0, 0, :4], 7).square().mean().backward()
    for of_rank in found:
        for gradient, expected in zip(of_rank["heads"], gradients(model), strict=True):
            torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-5)


def test_a_spread_that_is_small_beside_the_mean(found: list[dict[str, Any]]) -> None:
    norm = nn.BatchNorm1d(3)
    y = norm(far_from_zero())
    for share, of_rank in zip(SHARES, found, strict=True):
        torch.testing.assert_close(of_rank["norm"], [y[share], norm.running_var], atol=5e-3, rtol=1e-3)


def test_two_ranks_are_as_one_process(found: list[dict[str, Any]]) -> None:
    x, y, model = data_and_model()
    trained(model, x, y, lambda loss, count: loss.backward())
    expected = model.state_dict()
    for rank in (0, 1):
        state = found[rank]["state"]
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


if __name__ == "__main__":
    be_a_rank(int(sys.argv[1]), Path(sys.argv[2]))
