"""BatchNorm on two ranks with uneven shares is BatchNorm of one process on the global batch: outputs, gradients, buffers."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

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


def be_a_rank(rank: int, port: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y, model = data_and_model()
    ranks = Ranks(model)
    trained(model, x[SHARES[rank]], y[SHARES[rank]], ranks.backward)
    ranks.end()
    assert [type(m) for m in model] == [type(m) for m in data_and_model()[2]]
    torch.save(model.state_dict(), f"{out}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_as_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), port, str(tmp_path / "state")]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    x, y, model = data_and_model()
    trained(model, x, y, lambda loss, count: loss.backward())
    expected = model.state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"state-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


if __name__ == "__main__":
    be_a_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
