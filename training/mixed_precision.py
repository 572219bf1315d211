"""Callbacks for the precision and the memory layout of the model's work. The loss is always computed in float32."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.callback import Callback, CancelStepException

if TYPE_CHECKING:
    from training.learner import Learner


class MixedPrecision(Callback):
    """Runs the model in half precision where that is safe (torch's autocast); fastai's.

    dtype: torch.bfloat16, on the CPU as well, or torch.float16, whose small gradients need the loss scaled up. A step whose
    scaled gradients overflow is left out, and the scale halved (Micikevicius et al., arXiv:1710.03740).
    """

    order = 10  # its before_step comes before those of the callbacks that look at the gradients
    remove_on_fetch = True
    needs_inputs = False

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"mixed precision works in torch.bfloat16 or torch.float16, not {dtype}")
        self.dtype = dtype
        self.scale: dict[str, Any] = {}  # the scaler's state, between fits
        self._scaler: torch.amp.GradScaler | None = None

    def before_fit(self, learn: "Learner") -> None:
        if self.dtype is torch.float16:
            self._scaler = torch.amp.GradScaler(learn.device.type)
            if self.scale:
                self._scaler.load_state_dict(self.scale)

    def before_batch(self, learn: "Learner") -> None:
        learn.autocast = torch.autocast(learn.device.type, self.dtype)

    def after_pred(self, learn: "Learner") -> None:
        learn.pred = _as_float32(learn.pred)

    def before_backward(self, learn: "Learner") -> None:
        if self._scaler is not None:
            learn.loss_grad = self._scaler.scale(learn.loss_grad)

    def before_step(self, learn: "Learner") -> None:
        if self._scaler is not None and any(p.grad is not None for g in learn.opt.param_groups for p in g["params"]):
            step = _WouldStep(learn.opt)
            self._scaler.unscale_(step)  # type: ignore[arg-type]
            self._scaler.step(step)  # type: ignore[arg-type]
            self._scaler.update()
            self.scale = self._scaler.state_dict()
            if not step.finite:
                raise CancelStepException

    def after_fit(self, learn: "Learner") -> None:
        self._scaler = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scale)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = dict(state)


class _WouldStep:
    """What the scaler takes for the optimizer: it only notes that a step may be made. The loop makes it."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.param_groups = optimizer.param_groups
        self.finite = False

    def step(self) -> None:
        self.finite = True


def _as_float32(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.float() if x.is_floating_point() else x
    if type(x) is dict:
        return {name: _as_float32(part) for name, part in x.items()}
    return type(x)(map(_as_float32, x)) if isinstance(x, tuple | list) else x


class ChannelsLast(Callback):
    """Keeps pictures and convolution weights channels by channels together, which is faster where the hardware likes it.

    Only the layout in memory changes, not a value.
    """

    order = -9  # once the batch transforms have made the pictures
    needs_inputs = False

    def before_fit(self, learn: "Learner") -> None:
        learn.model.to(memory_format=torch.channels_last)

    def before_batch(self, learn: "Learner") -> None:
        learn.xb = tuple(_channels_last(x) for x in learn.xb)

    def after_fit(self, learn: "Learner") -> None:
        learn.model.to(memory_format=torch.contiguous_format)


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x
