"""Callbacks for recurrent models, whose forward pass gives more than the prediction and whose state lives on between batches.

A recurrent model returns (prediction, raw outputs, outputs after dropout), the outputs (rows, steps, features), and where texts
are padded a mask of them, bool (rows, steps). One whose state lives on has `reset()`, and the state as its attribute `hidden`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.callback import Callback

if TYPE_CHECKING:
    from training.learner import Learner


class ModelResetter(Callback):
    """Calls the model's `reset()` where a new stream of text begins: before each part of an epoch, and at the end.

    What lives on between batches, the model's attribute `hidden` (tensors, or tuples of them), is the callback's state: each
    rank has its own.
    """

    def __init__(self) -> None:
        self._model: Any = None

    def before_train(self, learn: "Learner") -> None:
        self._model = learn.model
        learn.model.reset()  # type: ignore[operator]

    def before_validate(self, learn: "Learner") -> None:
        learn.model.reset()  # type: ignore[operator]

    def after_fit(self, learn: "Learner") -> None:
        self._model = None
        learn.model.reset()  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        return {"hidden": getattr(self._model, "hidden", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._model is not None:
            device = next((p.device for p in self._model.parameters()), None)
            self._model.hidden = _moved(state["hidden"], device)

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return {"hidden": None}  # of other streams than those that this rank reads on


def _moved(hidden: Any, device: torch.device | None) -> Any:
    if isinstance(hidden, Tensor):
        return hidden.to(device)
    return type(hidden)(_moved(part, device) for part in hidden) if isinstance(hidden, tuple | list) else hidden


class RNNRegularizer(Callback):
    """Takes the prediction out of what a recurrent model returns, and adds two penalties to the training loss.

    alpha: of large activations (AR); beta: of activations that change from step to step (TAR) (Merity et al.,
    arXiv:1708.01009). With both 0 it only takes the prediction out: fastai's RNNCallback.
    """

    order = -20  # the others are to see the prediction alone

    def __init__(self, alpha: float = 0.0, beta: float = 0.0):
        self.alpha, self.beta = alpha, beta

    def after_pred(self, learn: "Learner") -> None:
        learn.pred, self._raw, self._dropped, *mask = learn.pred
        self._mask = mask[0] if mask else None

    def after_loss(self, learn: "Learner") -> None:
        if not learn.training:
            return
        if self.alpha:
            learn.loss_grad = learn.loss_grad + self.alpha * _mean_square(self._dropped, self._mask)
        if self.beta and self._raw.shape[1] > 1:
            both = None if self._mask is None else self._mask[:, 1:] & self._mask[:, :-1]
            learn.loss_grad = learn.loss_grad + self.beta * _mean_square(self._raw[:, 1:] - self._raw[:, :-1], both)

    def after_batch(self, learn: "Learner") -> None:
        self._raw = self._dropped = self._mask = None  # they hold the graph


def prediction_of(output: Any) -> Any:
    """The prediction of what a model gives: the first of a recurrent model's outputs, else all of it."""
    return output[0] if isinstance(output, tuple) else output


RNNCallback = RNNRegularizer  # fastai's name of it without penalties


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    squares = x.float().square()
    if mask is None:
        return squares.mean()
    # A mean of rows' means, so that neither padding nor how rows are shared among workers changes it.
    return ((squares.mean(2) * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
