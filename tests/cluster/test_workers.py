"""A Learner on Ray Train workers comes home as if it had trained here; what is too much or goes wrong is said at once."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch
from torch import nn

from blocks import DataBlock, DataLoaders
from blocks.errors import UserError
from cluster import Workers, dataloaders, runtime
from training import Callback, Learner, accuracy, model_builder

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what this file defines travels by value, because workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@model_builder
def tiny_classifier(*, n_out: int) -> nn.Module:
    """One convolution and one linear layer."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_out))


@pytest.fixture
def learner(digits_block: DataBlock, few_digits: Path) -> Callable[[], Learner]:
    dls = dataloaders(digits_block, few_digits, batch_size=16)

    def make(dls: DataLoaders = dls) -> Learner:
        torch.manual_seed(0)
        # SGD, because Adam's first steps turn the rounding of a sum over ranks into steps of full size.
        return Learner(
            dls, tiny_classifier(n_out=3), opt_func=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), lr=0.1, metrics=accuracy
        )

    return make


class CountsSteps(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def after_step(self, learn: Learner) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_two_workers_are_as_one(learner: Callable[[], Learner], capsys: pytest.CaptureFixture[str]) -> None:
    here, there = learner(), learner()
    counts = [CountsSteps(), CountsSteps()]
    here.add_callback(counts[0])
    there.add_callback(counts[1])
    here.fit(2)
    capsys.readouterr()
    there.fit(2, on=Workers(2))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert "accuracy" in printed[-1]
    assert printed[-1].endswith("images/s")
    for a, b in zip(here.recorder.history, there.recorder.history, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-4)
        assert b["valid/loss"] == pytest.approx(a["valid/loss"], abs=1e-4)
        assert b["valid/accuracy"] == pytest.approx(a["valid/accuracy"], abs=1e-12)
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert there.validate()["valid/accuracy"] == pytest.approx(there.recorder.history[-1]["valid/accuracy"], abs=1e-12)
    assert there.epoch == 2
    assert there.opt.state_dict()["param_groups"][0]["lr"] == 0.1
    for a, b in zip(here.opt.state.values(), there.opt.state.values(), strict=True):
        assert torch.allclose(a["momentum_buffer"], b["momentum_buffer"], atol=1e-4)
    assert counts[0].steps == counts[1].steps > 0
    assert there.recorder.rates == here.recorder.rates
    assert len(there.recorder.losses) == len(here.recorder.losses)
    here.fit(1)
    there.fit(1)  # goes on here as if it had been here
    assert there.recorder.history[-1]["train/loss"] == pytest.approx(here.recorder.history[-1]["train/loss"], abs=1e-4)


def test_a_ray_of_ones_own_is_known_from_one_that_was_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, on its workers, and where a script has called `ray.init` before."""
    assert runtime.is_own()
    assert ray.get(ray.remote(num_cpus=0)(runtime.is_own).remote())
    monkeypatch.setattr(runtime, "_start", None)
    assert not runtime.is_own()


def test_workers_are_asked_for() -> None:
    assert Workers.asked(None, default=2) == Workers(2)
    assert Workers.asked(None) == Workers(torch.cuda.device_count(), gpu=torch.cuda.is_available())
    assert Workers.asked(3) == Workers(3, gpu=torch.cuda.device_count() >= 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"number": -1}, r"workers=-1: give 0 .* how many"),
        ({"number": 2.0}, "workers=2.0: "),
        ({"number": True}, "workers=True: "),
        ({"number": (0, 2)}, r"workers=\(0, 2\): .* least >= 1"),
        ({"number": (3, 2)}, r"workers=\(3, 2\): "),
        ({"number": 2, "max_rows": 0}, "max_rows=0: give a whole number, at least 1"),
        ({"number": 2, "max_failures": None}, "max_failures=None: give a whole number, at least 0"),
        ({"number": 2, "checkpoint_steps": 1.5}, "checkpoint_steps=1.5: "),
        ({"number": 2, "checkpoint_minutes": 0}, "checkpoint_minutes=0: give a number of minutes above 0"),
        ({"number": 2, "keep": 0}, "keep=0: "),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Workers(**wrong)


def test_elastic_workers_have_a_least_and_a_most() -> None:
    assert (Workers((1, 8)).least, Workers((1, 8)).most) == (1, 8)
    assert (Workers(3).least, Workers(3).most) == (3, 3)
