"""A small training for the tests that kill it: dropout, frozen phases, metrics, and callbacks that end processes."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

from blocks import DataLoaders
from training import Callback, Learner, accuracy, body_and_head, distributed, fine_tune, flat, model_builder

SCHEDULE = (*fine_tune(1), *flat(1))


@model_builder
def small_mlp(*, n_out: int) -> nn.Module:
    """A body with dropout and batch statistics, and a head."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(body, nn.Linear(16, n_out))


def small_learner(dls: DataLoaders, *callbacks: Callback) -> Learner:
    """A Learner over `dls` with the weights of seed 0."""
    torch.manual_seed(0)
    return Learner(dls, small_mlp(n_out=3), lr=0.01, splitter=body_and_head, metrics=accuracy, callbacks=callbacks)


class Kills(Callback):
    """Ends the process of each of `ranks`, or process `other`, once, with SIGKILL: in training batch `batch` of `epoch`."""

    def __init__(self, notes: Path, ranks: tuple[int, ...], epoch: int, batch: int, other: int | None = None):
        self.notes, self.ranks, self.epoch, self.batch, self.other = notes, ranks, epoch, batch, other

    def after_backward(self, learn: Learner) -> None:
        note = self.notes / f"killed-{distributed.rank()}"
        if (learn.epoch, learn.iter) == (self.epoch, self.batch) and distributed.rank() in self.ranks and not note.exists():
            note.touch()
            os.kill(os.getpid() if self.other is None else self.other, signal.SIGKILL)
