"""The penalties of recurrent models' activations, and where their state is reset."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks import DataLoaders
from training import Callback, CrossEntropyLossFlat, Learner, ModelResetter, RNNRegularizer


class Told(nn.Module):
    """Gives outputs that the test knows, and notes when it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.resets = nn.Linear(2, 2), []
        self.raw = torch.tensor([[[1.0], [3.0], [0.0]]])
        self.dropped = torch.tensor([[[2.0], [0.0], [0.0]]])

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), self.raw, self.dropped

    def reset(self) -> None:
        self.resets.append(self.training)


class Losses(Callback):
    order = 100

    def __init__(self) -> None:
        self.extra: list[float] = []

    def after_loss(self, learn: Learner) -> None:
        self.extra.append(float(learn.loss_grad.detach()) - float(learn.loss))


@pytest.mark.parametrize(
    ("alpha", "beta", "extra"), [(0.0, 0.0, 0.0), (3.0, 0.0, 3 * 4 / 3), (0.0, 2.0, 2 * (4 + 9) / 2), (3.0, 2.0, 17.0)]
)
def test_penalties_are_added_in_training_only(alpha: float, beta: float, extra: float) -> None:
    losses = Losses()
    dls = DataLoaders([(torch.randn(3, 2), torch.tensor([0, 1, 0]))], [(torch.randn(3, 2), torch.tensor([0, 1, 0]))])
    learn = Learner(dls, Told(), CrossEntropyLossFlat(), callbacks=[RNNRegularizer(alpha, beta), losses])
    learn.fit(1)
    assert losses.extra == pytest.approx([extra, 0.0], abs=1e-5)
    assert learn.recorder.history[0]["train/loss"] < 2  # without the penalties


def test_the_state_is_reset_before_each_part_and_at_the_end() -> None:
    dls = DataLoaders([(torch.randn(3, 2), torch.tensor([0, 1, 0]))], [(torch.randn(3, 2), torch.tensor([0, 1, 0]))])
    learn = Learner(dls, Told(), CrossEntropyLossFlat(), callbacks=[RNNRegularizer(), ModelResetter()])
    learn.fit(2)
    assert learn.model.resets == [True, False, True, False, False]


def test_a_restored_state_lies_where_the_model_does() -> None:
    resetter, model = ModelResetter(), Told().to("meta")
    resetter._model = model
    resetter.load_state_dict({"hidden": (torch.zeros(2), [torch.ones(1)])})
    assert model.hidden[0].device == model.hidden[1][0].device == torch.device("meta")
