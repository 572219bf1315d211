"""Half precision and the layout in memory."""

from typing import Any

import pytest
import torch
from torch import nn

from training import (
    Callback,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    ChannelsLast,
    GradientAccumulation,
    GradientClip,
    Learner,
    MixedPrecision,
)
from training.testing import tiny_learner


class Looks(Callback):
    """Notes the dtypes on the way of the first batch."""

    order = 100

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def before_batch(self, learn: Learner) -> None:
        if not self.seen:
            self.handle = learn.model[1][2].register_forward_hook(lambda m, x, y: self.seen.update(layer=y.dtype))

    def after_pred(self, learn: Learner) -> None:
        self.handle.remove()
        weights, autocast = learn.model[1][2].weight.dtype, torch.is_autocast_enabled("cpu")
        self.seen.update(pred=learn.pred.dtype, weights=weights, autocast=autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_works_in_half_precision_and_the_loss_in_float32(dtype: torch.dtype) -> None:
    looks = Looks()
    tiny_learner(MixedPrecision(dtype), looks).fit(1)
    assert looks.seen == {"layer": dtype, "pred": torch.float32, "weights": torch.float32, "autocast": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_trains_close_to_float32(dtype: torch.dtype) -> None:
    half, full = tiny_learner(MixedPrecision(dtype)), tiny_learner()
    for learn in (half, full):
        learn.model[1][1] = nn.Identity()
        learn.fit(3)
    losses = [learn.recorder.history[-1]["train/loss"] for learn in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_gradients_are_unscaled_before_they_are_looked_at() -> None:
    norms: dict[str, list[float]] = {"half": [], "full": []}

    def noting(name: str) -> Callback:
        def before_step(self: Callback, learn: Learner) -> None:
            norms[name].append(float(torch.cat([p.grad.flatten() for p in learn.model.parameters()]).norm()))

        return type("Norm", (Callback,), {"before_step": before_step, "order": 15})()

    extra, mixed = [GradientAccumulation(8), GradientClip(100.0)], MixedPrecision(torch.float16)
    mixed.load_state_dict(
        {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
    )
    torch.manual_seed(0)
    tiny_learner(mixed, noting("half"), *extra).fit(1)
    torch.manual_seed(0)
    tiny_learner(noting("full"), *extra).fit(1)
    assert norms["half"] == pytest.approx(norms["full"], rel=0.05)


def test_a_step_with_overflowing_gradients_is_left_out_and_the_scale_halved() -> None:
    class Overflow(Callback):
        order = 9

        def before_step(self, learn: Learner) -> None:
            if learn.iter == 1:
                next(learn.model.parameters()).grad[0] = float("inf")

    class Steps(Callback):
        def __init__(self) -> None:
            self.taken: list[int] = []
            self.left_out: list[int] = []

        def before_step(self, learn: Learner) -> None:
            self.weights = learn.model[1][2].weight.detach().clone()

        def after_step(self, learn: Learner) -> None:
            moved = not torch.equal(self.weights, learn.model[1][2].weight)
            (self.taken if moved else self.left_out).append(learn.iter)

    steps, mixed = Steps(), MixedPrecision(torch.float16)
    tiny_learner(mixed, Overflow(), steps).fit(1)
    assert (steps.taken, steps.left_out) == ([0, 2], [1])
    assert mixed.state_dict()["scale"] == 2.0**15


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 or torch\.float16, not torch\.float64"):
        MixedPrecision(torch.float64)


def test_channels_last_changes_the_layout_and_no_value() -> None:
    layouts: list[bool] = []

    class Layout(Callback):
        def before_batch(self, learn: Learner) -> None:
            weight = learn.model[0][0].weight
            layouts.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (learn.xb[0], weight)))

    torch.manual_seed(0)
    there = tiny_learner(ChannelsLast(), Layout())
    there.fit(1)
    torch.manual_seed(0)
    here = tiny_learner()
    here.fit(1)
    assert all(layouts)
    assert there.recorder.history[0]["valid/loss"] == pytest.approx(here.recorder.history[0]["valid/loss"], rel=1e-4)


@pytest.mark.parametrize("cancel", [CancelTrainException, CancelEpochException, CancelFitException])
def test_nothing_stays_in_half_precision_when_more_than_a_batch_is_cancelled(cancel: type[Exception]) -> None:
    class Cancels(Callback):
        order = 20

        def before_batch(self, learn: Learner) -> None:
            if learn.training:
                raise cancel

    tiny_learner(MixedPrecision(), Cancels()).fit(2)
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_the_model_leaves_no_half_precision_behind() -> None:
    learn = tiny_learner(MixedPrecision())
    learn.model.register_forward_pre_hook(lambda module, given: 1 / 0)
    for run in (learn.validate, lambda: learn.fit(1)):
        with pytest.raises(ZeroDivisionError):
            run()
        assert not torch.is_autocast_enabled("cpu")
