"""Every shipped optimizer, torch's wrapped ones, and one of one's own keep the promises of `training.testing`."""

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training import optimizer, testing
from training.composed import EAGER, Optimizer
from training.optimizer import SGD, Adam, Lamb, Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from training.steppers import average_grad, elementwise
from training.testing import MakeOptimizer


@elementwise
def sign_step(p: Tensor, grad_avg: Tensor, lr: float) -> None:
    """A stepper of one's own: only the direction counts."""
    p.sub_(grad_avg.sign() * lr)


def own(params: Iterable[Any], lr: float) -> Optimizer:
    return Optimizer(params, [average_grad, sign_step], lr=lr, mom=0.9)


SETTINGS: dict[str, MakeOptimizer] = {
    "SGD": SGD,
    "SGD, momentum": partial(SGD, mom=0.9, wd=0.1),
    "SGD, nesterov": partial(SGD, mom=0.9, nesterov=True),
    "RMSProp": RMSProp,
    "RMSProp, momentum": partial(RMSProp, mom=0.9),
    "Adam": Adam,
    "Adam, l2": partial(Adam, decouple_wd=False),
    "RAdam": RAdam,
    "QHAdam": partial(QHAdam, wd=0.1),
    "Larc": Larc,
    "Lamb": Lamb,
    "Lookahead": lambda params, lr: Lookahead(SGD(params, lr=lr), k=3),
    "ranger": ranger,
    "AdamW of torch": lambda params, lr: OptimWrapper(params, torch.optim.AdamW, lr=lr, wd=0.1),
    "one's own": own,
}


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_every_optimizer_keeps_its_promises(make: MakeOptimizer) -> None:
    testing.check_optimizer(make)


def test_no_optimizer_is_left_out() -> None:
    made_by = {
        name for name, f in vars(optimizer).items() if inspect.isfunction(f) and f.__annotations__.get("return") is Optimizer
    }
    assert {name for name in made_by if not name.startswith("_")} - {"AdamW"} == {
        name.partition(",")[0] for name in SETTINGS if name.partition(",")[0] in vars(optimizer)
    }


class Broken(torch.optim.SGD):
    """Steps by nothing."""

    def step(self, closure: Any = None) -> Any:
        return closure() if closure else None


class Forgetful(torch.optim.SGD):
    """Loses its momentum in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": {}}


class Thorough(torch.optim.SGD):
    """Decays what is frozen."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[-1]["params"]:
            p.mul_(0.9)
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (Broken, testing.check_it_goes_downhill),
        (Broken, testing.check_groups_and_schedulers),
        (Thorough, testing.check_frozen_parameters_are_untouched),
        (partial(Forgetful, momentum=0.9), testing.check_optimizer_state_round_trip),
    ],
)
def test_the_checks_find_what_is_wrong(make: MakeOptimizer, check: Any) -> None:
    with pytest.raises(AssertionError):
        check(make)


def test_a_restored_run_goes_on_with_its_kernel() -> None:
    """Adam in pieces, where a new one would be fused."""
    opt = Adam([nn.Parameter(torch.ones(2))])
    opt.kernel = EAGER
    other = Adam([nn.Parameter(torch.ones(2))])
    other.load_state_dict(opt.state_dict())
    assert other.kernel == EAGER
