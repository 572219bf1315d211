"""A recipe of a person's own that goes wrong."""

from pathlib import Path

import pytest

FAILING = """
from blocks import CategoryBlock, DataBlock, ImageBlock, RandomSplitter, Resize, get_image_files, parent_label
from torch import nn
from training import Callback, Learner, Recipe, distributed, flat, recipe

class FailsOnce(Callback):
    def after_pred(self, learn):
        mine = learn.pred.shape
        print("looked at", len(mine))
        if learn.iter == 2 and distributed.rank() == distributed.world() - 1:
            raise ValueError(f"no such shape: {tuple(mine)}")

def learner(dls):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))
    return Learner(dls, model, callbacks=[FailsOnce()])

@recipe
def failing(*, size: int = 8) -> Recipe:
    "A callback fails."
    block = DataBlock(blocks=(ImageBlock(), CategoryBlock()), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(0.25), item_tfms=Resize(size))
    return Recipe(block=block, source=%r, learner=learner, lr=0.1, schedule=flat(1), batch_size=16)
"""


@pytest.fixture
def failing_recipe(own_places: Path, few_digits: Path) -> str:
    """The line of a file in the working folder at which its recipe `mine:failing` fails, in the third batch."""
    file = own_places / "mine.py"
    file.write_text(FAILING % str(few_digits))
    line = 1 + next(n for n, text in enumerate(FAILING.splitlines()) if "raise" in text)
    return f"{file}:{line}"
