"""Callbacks on the way of the gradients: accumulate them over batches, clip them, keep BatchNorm of frozen layers still."""

from typing import TYPE_CHECKING

import torch

from training.callback import Callback, CancelBatchException
from training.optimizer import keep_norms_still

if TYPE_CHECKING:
    from training.learner import Learner


class GradientAccumulation(Callback):
    """Steps once `n_acc` rows have been seen, with the gradient of the mean over them; fastai's.

    What is left at the end of an epoch makes a step of its own, with the mean over the rows it has. `n_acc` counts rows of
    the global batch, so each rank steps at the same time.
    """

    order = 9  # before MixedPrecision and GradientClip, which look at the gradients of a step only

    def __init__(self, n_acc: int = 32):
        if n_acc < 1:
            raise ValueError(f"n_acc is a number of rows, at least 1, not {n_acc!r}")
        self.n_acc, self.rows = n_acc, 0

    def before_train(self, learn: "Learner") -> None:
        self.rows = 0

    def before_backward(self, learn: "Learner") -> None:
        learn.loss_grad = learn.loss_grad * learn.global_rows

    def before_step(self, learn: "Learner") -> None:
        self.rows += learn.global_rows
        if self.rows < self.n_acc and learn.iter + 1 < learn.n_iter:
            raise CancelBatchException  # before the step and before the gradients are set to zero
        gradients = [p.grad for p in learn.model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, float(self.rows))
        self.rows = 0

    def after_train(self, learn: "Learner") -> None:
        learn.opt.zero_grad()  # what is left where the part was cut short, by ShortEpoch for one

    def after_cancel_epoch(self, learn: "Learner") -> None:
        learn.opt.zero_grad()  # there was no after_train

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows = state["rows"]


class GradientClip(Callback):
    """Scales the gradients down to a total norm of `max_norm` at most; fastai's. norm_type: 2 is the Euclidean norm."""

    order = 21

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0):
        if not max_norm > 0:
            raise ValueError(f"max_norm is the largest norm that gradients keep, above 0, not {max_norm!r}")
        self.max_norm, self.norm_type = max_norm, norm_type

    def before_step(self, learn: "Learner") -> None:
        torch.nn.utils.clip_grad_norm_(learn.model.parameters(), self.max_norm, self.norm_type)


class BnFreeze(Callback):
    """Keeps the running statistics of frozen normalisation layers as they are; fastai's.

    For layers that `freeze_to(..., train_bn=False)` froze; one without parameters goes with the layer before it. Those of a
    Learner or a phase with `train_bn=False` stand still without it.
    """

    def before_train(self, learn: "Learner") -> None:
        keep_norms_still(learn.model)
