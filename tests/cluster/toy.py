"""A recipe for sweeps in tests: a linear model on a handful of digits, in milliseconds, that fails where it is told to."""

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pydantic import NonNegativeFloat
from torch import nn

from blocks import CategoryBlock, DataBlock, ImageBlock, Normalize, RandomSplitter, Resize, get_image_files, parent_label
from training import Callback, Learner, Recipe, Schedule, accuracy, flat, recipe


@dataclass(frozen=True)
class Noted:
    """Leaves a picture as it is, and adds a dot to the file `log`: one for each that is decoded."""

    log: str

    def __call__(self, x: Any) -> Any:
        if self.log and isinstance(x, Image.Image):
            with open(self.log, "a") as file:
                file.write(".")
        return x


class Mischief(Callback):
    """Fails, or ends the process, in the middle of the second epoch."""

    order = 50

    def __init__(self, how: str):
        self.how = how

    def before_batch(self, learn: Learner) -> None:
        if learn.training and learn.epoch == 1:
            if self.how == "raise":
                raise KeyError("a mistake of the user's")
            if self.how == "die":
                os._exit(1)


def toy_learner(dls: Any, wd: float, how: str, log: str) -> Learner:
    """Its first weights depend on Python's and NumPy's generators, its steps on torch's."""
    layer = nn.Linear(3 * 8 * 8, 3)
    nn.init.constant_(layer.bias, random.random() + float(np.random.rand()))
    if log:
        with open(f"{log}.pids", "a") as file:
            file.write(f"{os.getpid()}\n")
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), layer)
    return Learner(dls, model, metrics=accuracy, wd=wd, callbacks=[Mischief(how)])


@recipe
def toy(
    *,
    path: str = "",
    log: str = "",
    lr: float = 1e-2,
    schedule: Schedule = flat(3),
    wd: NonNegativeFloat = 0.01,
    how: str = "well",
    size: int = 8,
    batch_size: int = 30,
) -> Recipe:
    """Digits of three classes. how: "raise" and "die" end it in the second epoch."""
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=[Noted(log), Resize(size)],
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )

    def learner(dls: Any) -> Learner:
        return toy_learner(dls, wd, how, log)

    return Recipe(
        block=block,
        source=path,
        learner=learner,
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=7,
    )
