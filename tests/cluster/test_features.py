"""Features of a frozen phase where several train: on workers, and ahead of a sweep's trials."""

import sys
from pathlib import Path

import pytest
import ray.cloudpickle
import torch
from torch import nn

from blocks import DataBlock
from blocks.errors import UserError
from cluster import Workers, dataloaders
from cluster.ahead import features_ahead
from training import Learner, Phase, Recipe, Schedule, accuracy, body_and_head, create_head, flat, recipe
from training.features import compute_ahead

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what this file defines travels by value, because workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

FROZEN = Phase(2, freeze_to=-1)
CACHED = Phase(2, freeze_to=-1, cache_features=True)


def learner(dls: object, width: int = 4, train_bn: bool = False) -> Learner:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
    return Learner(
        dls,  # type: ignore[arg-type]
        nn.Sequential(body, create_head(width, 3, [8], ps=0.0)),
        opt_func=lambda p: torch.optim.SGD(p, lr=0.1),
        lr=0.1,
        metrics=accuracy,
        splitter=body_and_head,
        train_bn=train_bn,
    )


def test_workers_share_the_features_that_were_computed_ahead(
    digits_block: DataBlock, few_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers with features are as one process without; both find what Ray Data's tasks have computed."""
    dls = dataloaders(digits_block, few_digits, batch_size=16)
    here, there = learner(dls), learner(dls)
    here.fit((FROZEN,))
    capsys.readouterr()
    there.fit((CACHED,), on=Workers(2))
    assert capsys.readouterr().out.count("features: computed once for 120 rows") == 1
    for a, b in zip(here.recorder.history, there.recorder.history, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-4)
        assert b["valid/loss"] == pytest.approx(a["valid/loss"], abs=1e-4)
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    found = compute_ahead(there, (CACHED,), map)
    assert found is not None
    assert found.reused


def test_trials_find_the_features_of_each_body(
    digits_block: DataBlock, few_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @recipe
    def head_only(
        *, width: int = 4, lr: float = 0.1, schedule: Schedule = (CACHED,), train_bn: bool = False, batch_size: int = 16
    ) -> Recipe:
        """A tiny body whose width and normalisation are settings."""

        def made(dls: object) -> Learner:
            return learner(dls, width, train_bn)

        return Recipe(digits_block, few_digits, made, lr, schedule, batch_size)

    choices = {"width": [4, 6], "schedule": [flat(1), (CACHED,)], "batch_size": [8, 16], "lr": [0.1, 0.2]}
    features_ahead(head_only, {name: values[0] for name, values in choices.items()}, choices)
    assert capsys.readouterr().out.count("features: computed once") == 2
    features_ahead(head_only, {"schedule": flat(1)}, {"width": [4, 8]})
    assert "features" not in capsys.readouterr().out
    with pytest.raises(UserError, match="train_bn=False"):
        features_ahead(head_only, {"train_bn": True}, {})
