"""Accumulating and clipping gradients, frozen BatchNorm."""

import pytest
import torch
from torch import Tensor, nn

from blocks import DataLoaders
from training import (
    BnFreeze,
    Callback,
    CancelEpochException,
    CrossEntropyLossFlat,
    GradientAccumulation,
    GradientClip,
    Learner,
    Phase,
    ShortEpoch,
)
from training.testing import tiny_learner


def linear_learner(sizes: tuple[int, ...], *callbacks: Callback) -> Learner:
    """A linear classifier under plain SGD, of 12 rows in batches of these sizes."""
    torch.manual_seed(1)
    x, y = torch.randn(12, 3), torch.randint(2, (12,))
    dls = DataLoaders(list(zip(x.split(sizes), y.split(sizes), strict=True)))
    return Learner(dls, nn.Linear(3, 2), CrossEntropyLossFlat(), torch.optim.SGD, lr=0.5, callbacks=callbacks)


def weights(learn: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize("small", [(2, 2, 2, 2, 2, 2), (1, 3, 2, 2, 3, 1)])
def test_accumulating_is_a_larger_batch(small: tuple[int, ...]) -> None:
    accumulated, large = linear_learner(small, GradientAccumulation(4)), linear_learner((4, 4, 4))
    accumulated.fit(2)
    large.fit(2)
    torch.testing.assert_close(weights(accumulated), weights(large))


def test_the_rest_of_an_epoch_makes_a_step_of_its_own() -> None:
    accumulated, large = linear_learner((3, 3, 3, 3), GradientAccumulation(9)), linear_learner((9, 3))
    accumulated.fit(2)
    large.fit(2)
    torch.testing.assert_close(weights(accumulated), weights(large))


def test_accumulated_gradients_are_clipped_once_a_step() -> None:
    accumulated = linear_learner((2,) * 6, GradientClip(0.01), GradientAccumulation(4))
    large = linear_learner((4, 4, 4), GradientClip(0.01))
    accumulated.fit(1)
    large.fit(1)
    torch.testing.assert_close(weights(accumulated), weights(large))


def test_the_recorded_loss_is_that_of_the_rows() -> None:
    accumulated, large = linear_learner((2,) * 6, GradientAccumulation(100)), linear_learner((12,))
    accumulated.fit(1)
    large.fit(1)
    assert accumulated.recorder.history[0]["train/loss"] == pytest.approx(large.recorder.history[0]["train/loss"])


def test_the_norm_of_the_gradients_is_limited() -> None:
    norms: list[float] = []

    class Norm(Callback):
        order = 30

        def before_step(self, learn: Learner) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in learn.model.parameters()]).norm()))

    linear_learner((4, 4, 4), Norm()).fit(1)
    largest = max(norms)
    norms.clear()
    linear_learner((4, 4, 4), Norm(), GradientClip(largest / 2)).fit(1)
    assert max(norms) == pytest.approx(largest / 2, rel=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_of_frozen_layers_stay(frozen: bool) -> None:
    learn = tiny_learner(BnFreeze())
    before = {k: b.clone() for k, b in learn.model.named_buffers()}
    learn.fit((Phase(1, freeze_to=-1 if frozen else 0, train_bn=False),))
    stayed = all(torch.equal(before[k], b) for k, b in learn.model.named_buffers())
    assert stayed == frozen


def test_what_a_cut_epoch_leaves_does_not_get_into_the_next() -> None:
    """Two epochs of 3 of 6 batches: one step over the first two each, and the gradient of the third is let go."""
    cut = linear_learner((2,) * 6, GradientAccumulation(4), ShortEpoch(0.5))
    whole = linear_learner((4, 4, 4), ShortEpoch(0.3))
    cut.fit(2)
    whole.fit(2)
    torch.testing.assert_close(weights(cut), weights(whole))


def test_a_cancelled_epoch_leaves_no_gradients_to_the_next() -> None:
    class CancelsFirst(Callback):
        order = 100

        def after_batch(self, learn: Learner) -> None:
            if learn.epoch == 0 and learn.training:
                raise CancelEpochException

    cut, whole = (
        linear_learner((4, 4, 4), GradientAccumulation(8), CancelsFirst()),
        linear_learner((4, 4, 4), GradientAccumulation(8)),
    )
    cut.fit(2)
    whole.fit(1)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=0)


def test_a_norm_layer_without_parameters_is_frozen_with_the_layer_before_it() -> None:
    def learner(*frozen: int) -> Learner:
        torch.manual_seed(0)
        layers = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4, affine=False),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4, affine=False),
            nn.Linear(4, 2),
        )
        learn = Learner(linear_learner((4, 4, 4)).dls, nn.Sequential(*layers), CrossEntropyLossFlat(), callbacks=[BnFreeze()])
        for i in frozen:
            learn.model[i].requires_grad_(False)
        learn.fit(1)
        return learn

    moved = [[bool(learner(*frozen).model[i].running_mean.any()) for i in (1, 3)] for frozen in ((), (0,), (0, 2))]
    assert moved == [[True, True], [False, True], [False, False]]
