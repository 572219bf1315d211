"""Images: a classifier in a line, and the recipes `digits` and `folder`."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat

from blocks import (
    IMAGENET_STATS,
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
from blocks.cache import cache_folder
from training import (
    Learner,
    Recipe,
    Schedule,
    accuracy,
    body_and_head,
    one_cycle,
    precision_callbacks,
    recipe,
    torchvision_classifier,
)
from training.distributed import default_device
from training.precision import Precision
from training.recipe import SettingError

BatchSize = Annotated[int, Field(ge=2)]  # BatchNorm, which torchvision's classifiers have, needs two rows


def image_classifier(dls: DataLoaders, arch: str = "resnet18", precision: Precision = "auto") -> Learner:
    """A Learner of torchvision's `arch` from random weights, one output a class, with accuracy; two parameter groups.

    precision: in which it trains, "auto": bfloat16 where the hardware has it, else float32. It predicts in float32.
    """
    model = torchvision_classifier(arch=arch, n_out=len(dls.vocab))
    callbacks = precision_callbacks(precision, default_device())
    return Learner(dls, model, splitter=body_and_head, metrics=accuracy, callbacks=callbacks)


def digits_folder() -> Path:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16) as PNG files in ten class folders, written once to the cache."""
    folder = cache_folder() / "digits"
    if folder.is_dir():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits

    unfinished = folder.with_name(f".digits-{os.getpid()}")
    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        file = unfinished / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(file)
    try:
        unfinished.rename(folder)
    except OSError:  # another process wrote the same meanwhile
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@recipe
def digits(
    *,
    arch: str = "resnet18",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    size: int = 32,
    seed: int = 42,
) -> Recipe:
    """scikit-learn's handwritten digits: 1,797 pictures of ten classes.

    arch: a classifier of torchvision. size: side of the pictures in pixels. seed: of the order and the weights.
    """
    return Recipe(
        block=_classes_in_folders(size),
        source=digits_folder,
        learner=partial(image_classifier, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def folder(
    *,
    path: str = "",
    arch: str = "resnet18",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    size: int = 128,
    seed: int = 42,
    max_bad_rows: int = 0,
) -> Recipe:
    """Your own pictures: a folder with one folder of image files a class.

    path: that folder. arch: a classifier of torchvision. size: side of the pictures in pixels. seed: of the order
    and the weights. max_bad_rows: how many unreadable files may be left out.
    """
    return Recipe(
        block=_classes_in_folders(size),
        source=partial(_given_folder, path),
        learner=partial(image_classifier, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        max_bad_rows=max_bad_rows,
    )


def _given_folder(path: str) -> Path:
    if not path:
        raise SettingError("folder needs path=..., a folder with one folder of image files a class")
    return Path(path).expanduser()


def _classes_in_folders(size: int) -> DataBlock:
    return DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.2, seed=42),
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*IMAGENET_STATS),
    )
