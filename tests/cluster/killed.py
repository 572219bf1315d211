"""A small training for the tests that kill it: dropout, frozen phases, batch statistics, metrics.

Run as a script it trains on two workers, until it is killed: STORAGE PICTURES NOTES.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Normalize,
    RandomSplitter,
    Resize,
    get_image_files,
    parent_label,
)
from training import Callback, Learner, accuracy, body_and_head, distributed, fine_tune, flat, model_builder

SCHEDULE = (*fine_tune(1), *flat(1))
BATCHES = 6  # an epoch
EPOCHS = 3


@model_builder
def small_mlp(*, n_out: int) -> nn.Module:
    """A body with dropout and batch statistics, and a head."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(body, nn.Linear(16, n_out))


def digits_block() -> DataBlock:
    """Reads folders of pictures as 16x16 colour ones."""
    return DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(16),
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )


def small_learner(dls: DataLoaders, *callbacks: Callback) -> Learner:
    """A Learner over `dls` with the weights of seed 0."""
    torch.manual_seed(0)
    return Learner(dls, small_mlp(n_out=3), lr=0.01, splitter=body_and_head, metrics=accuracy, callbacks=callbacks)


class Kills(Callback):
    """Ends the process of each of `ranks`, or process `other` instead: once, by SIGKILL, in training batch `batch` of `epoch`.

    Leaves notes: who did so, and the place (epoch, batch) at which each start began.
    """

    def __init__(self, notes: Path, ranks: tuple[int, ...], epoch: int, batch: int, other: int | None = None):
        self.notes, self.ranks, self.epoch, self.batch, self.other = notes, ranks, epoch, batch, other

    def before_fit(self, learn: Learner) -> None:
        if distributed.rank() == 0:
            with open(self.notes / "began", "a") as notes:
                print(learn.epoch, learn.position.batch, os.getpid(), file=notes)

    def after_backward(self, learn: Learner) -> None:
        note = self.notes / f"killed-{distributed.rank()}"
        if (learn.epoch, learn.iter) == (self.epoch, self.batch) and distributed.rank() in self.ranks and not note.exists():
            note.touch()
            os.kill(os.getpid() if self.other is None else self.other, signal.SIGKILL)
            time.sleep(60)  # an orphan ends soon, but a training as short as this would end before


def began(notes: Path) -> list[tuple[int, int]]:
    """The places at which the starts began."""
    return [(int(line.split()[0]), int(line.split()[1])) for line in (notes / "began").read_text().splitlines()]


if __name__ == "__main__":
    from cluster import Workers

    storage, pictures, notes = sys.argv[1:]
    dls = digits_block().dataloaders(pictures, batch_size=16)
    learn = small_learner(dls, Kills(Path(notes), (0,), epoch=1, batch=3, other=os.getpid()))
    learn.fit(SCHEDULE, on=Workers(2, storage=storage, checkpoint_steps=2))
