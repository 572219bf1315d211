"""Killed anywhere, a training ends with the bits of the unbroken one, and its history holds each step once."""

from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch

from blocks import DataBlock, DataLoaders
from cluster import Workers, dataloaders
from training import Learner

from . import killed
from .killed import SCHEDULE, Kills, small_learner

pytestmark = pytest.mark.usefixtures("ray_running")

ray.cloudpickle.register_pickle_by_value(killed)


@pytest.fixture(scope="session")
def unbroken() -> dict[int, Learner]:
    """By number of workers, the Learner that nobody killed."""
    return {}


@pytest.fixture
def dls(digits_block: DataBlock, few_digits: Path) -> DataLoaders:
    return dataloaders(digits_block, few_digits, batch_size=16)


def assert_as_unbroken(learn: Learner, unbroken: dict[int, Learner], world: int, dls: DataLoaders) -> None:
    if world not in unbroken:
        unbroken[world] = small_learner(dls)
        unbroken[world].fit(SCHEDULE, on=Workers(world))
    whole = unbroken[world]
    for (name, a), b in zip(whole.model.state_dict().items(), learn.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert without_times(learn) == without_times(whole)
    assert learn.recorder.losses == whole.recorder.losses


def without_times(learn: Learner) -> list[dict[str, Any]]:
    return [{k: v for k, v in values.items() if not k.startswith("time/")} for values in learn.recorder.history]


def test_one_worker_killed(dls: DataLoaders, unbroken: dict[int, Learner], tmp_path: Path) -> None:
    learn = small_learner(dls, Kills(tmp_path, (1,), epoch=1, batch=3))
    learn.fit(SCHEDULE, on=Workers(2, checkpoint_steps=2))
    assert (tmp_path / "killed-1").exists()
    assert_as_unbroken(learn, unbroken, 2, dls)
