"""In pieces, a batch gives the prediction and the gradients that it gives as a whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks import UserError
from training import GradientClip, Learner
from training.in_pieces import in_pieces

from .toy import learner


class Largest(nn.Module):
    """Notes the most rows that came through at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        return x


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 3))


def gradients(model: nn.Module, x: Tensor, y: Tensor, most: int) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(in_pieces(model, model, (x,), most), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("most", [1, 3, 5, 16, 17])
def test_the_gradient_is_that_of_the_whole_batch(most: int) -> None:
    x, y, largest = torch.randn(17, 4), torch.randint(3, (17,)), Largest()
    model = net(largest)
    whole = gradients(model, x, y, 17)
    largest.most = 0
    for a, b in zip(gradients(model, x, y, most), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert largest.most <= most


def test_each_gradient_arrives_once() -> None:
    """On several ranks it is summed when it does."""
    model, arrived = net(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived.append)
    gradients(model, torch.randn(10, 4), torch.randint(3, (10,)), 3)
    assert len(arrived) == len({id(p) for p in arrived}) == 4


def test_dropout_draws_once() -> None:
    """What is computed again for the backward pass is what the prediction came from."""
    seen: list[Tensor] = []
    model = net(nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, inputs, out: seen.append(out != 0))
    F.cross_entropy(in_pieces(model, model, (torch.randn(6, 4),), 3), torch.zeros(6, dtype=torch.int64)).backward()
    first, second, *again = seen
    assert {tuple(t.flatten().tolist()) for t in again} == {tuple(t.flatten().tolist()) for t in (first, second)}


def test_batchnorm_takes_the_statistics_of_each_piece_once() -> None:
    pieced, by_hand = net(nn.BatchNorm1d(8)), net(nn.BatchNorm1d(8))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    found = gradients(pieced, x, y, 4)
    by_hand.zero_grad()
    F.cross_entropy(torch.cat([by_hand(part) for part in x.split(4)]), y).backward()
    for a, p in zip(found, by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-5)
    for (name, a), b in zip(pieced.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_several_predictions_a_row() -> None:
    def both(x: Tensor) -> dict[str, Any]:
        return {"sum": x.sum(1), "parts": (x, [x * 2])}

    x = torch.randn(5, 4, requires_grad=True)
    found, whole = in_pieces(both, nn.Identity(), (x,), 2), both(x)
    assert torch.equal(found["sum"], whole["sum"])
    assert torch.equal(found["parts"][1][0], whole["parts"][1][0])


def test_what_has_no_rows_is_refused() -> None:
    with pytest.raises(UserError, match="max_rows=2 needs a model that gives tensors with a row for each"):
        in_pieces(torch.sum, nn.Identity(), (torch.randn(5, 4),), 2)
    stateful = nn.Identity()
    stateful.hidden = torch.zeros(1)
    with pytest.raises(UserError, match="max_rows=2 cuts batches by rows"):
        in_pieces(stateful, stateful, (torch.randn(5, 4),), 2)


def test_a_learner_trains_the_same() -> None:
    def made() -> Learner:
        torch.manual_seed(0)
        return learner(model=nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), callbacks=[GradientClip(0.1)])

    whole, pieced = made(), made()
    pieced.max_rows = 3
    whole.fit(2)
    pieced.fit(2)
    for a, b in zip(whole.model.parameters(), pieced.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert whole.validate() == pytest.approx(pieced.validate(), abs=1e-5)
