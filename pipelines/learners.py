"""Learners of pictures in a line, from random or trained weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from blocks.category import NA, Categorize
from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from blocks.pixels import Normalize
from blocks.tensors import (
    TensorBBox,
    TensorBBoxLabel,
    TensorCategory,
    TensorMask,
    TensorMultiCategory,
    TensorNumber,
    TensorPoint,
)
from blocks.transform import Pipeline
from pipelines.weights import imagenet_classes, stats_of, trained_model
from training import (
    Callback,
    DetectionLoss,
    GiveTargets,
    JaccardCoeffMulti,
    Learner,
    MeanAP,
    accuracy,
    accuracy_multi,
    body_and_head,
    create_body,
    detection_model,
    encoder_and_rest,
    encoder_of,
    halves_and_head,
    precision_callbacks,
    rmse,
    timm_classifier,
    torchvision_classifier,
    unet_model,
    vision_model,
)
from training.checks import listed
from training.distributed import default_device
from training.learner import target_type
from training.models import torchvision_names
from training.precision import Precision
from training.results import target_kinds


def image_classifier(
    dls: DataLoaders, arch: str = "resnet18", precision: Precision = "auto", wd: float | None = None
) -> Learner:
    """A Learner of torchvision's `arch` from random weights, one output a class, with accuracy; two parameter groups.

    precision: in which it trains, "auto": bfloat16 where the hardware has it, else float32. It predicts in float32.
    wd: weight decay, None: the optimizer's own.
    """
    model = torchvision_classifier(arch=arch, n_out=len(dls.vocab))
    callbacks = precision_callbacks(precision, default_device())
    return Learner(dls, model, splitter=body_and_head, metrics=accuracy, callbacks=callbacks, wd=wd)


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
    callbacks: Callback | Iterable[Callback] = (),
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
    dls, n_in, trained = _as_trained(dls, arch, weights)
    if head == "imagenet":
        if trained is None or n_in != 3:
            raise UserError('head="imagenet" is the classifier that weights=... were trained with, on pictures of 3 channels')
        dls = _named(dls, imagenet_classes())
        model = (torchvision_classifier if arch in torchvision_names() else timm_classifier)(arch=arch, n_out=1000)
        model.load_state_dict(trained.state_dict())
        return _learner(dls, model, None, precision, metrics, callbacks, {"splitter": body_and_head} | learner)
    model = vision_model(
        arch=arch,
        n_out=n_out or n_outputs(dls),
        n_in=n_in,
        lin_ftrs=lin_ftrs,
        ps=ps,
        concat_pool=concat_pool,
        y_range=y_range,
        cut=cut,
    )
    body = None if trained is None else create_body(trained, n_in, cut)
    return _learner(dls, model, body, precision, metrics, callbacks, learner)


def unet_learner(
    dls: DataLoaders,
    arch: str = "resnet18",
    *,
    weights: str | None = None,
    n_out: int | None = None,
    cut: int | None = None,
    self_attention: bool = False,
    blur: bool = False,
    y_range: tuple[float, float] | None = None,
    precision: Precision = "auto",
    metrics: Any = None,
    callbacks: Callback | Iterable[Callback] = (),
    **learner: Any,
) -> Learner:
    """A Learner of a U-Net (`training.unet`) over the body of `arch`, for masks, or for pictures with a `loss_func` for them.

    n_out: how many channels, by default one a class of the mask or a channel of the target. metrics: by default the mean
    intersection over union of the masks' classes. The rest is as in `vision_learner`.
    """
    dls, n_in, trained = _as_trained(dls, arch, weights)
    model = unet_model(
        arch=arch,
        n_out=n_out or _channels(dls),
        n_in=n_in,
        cut=cut,
        self_attention=self_attention,
        blur=blur,
        y_range=y_range,
    )
    body = None if trained is None else create_body(trained, n_in, cut)
    return _learner(dls, model, body, precision, metrics, callbacks, learner)


def detection_learner(
    dls: DataLoaders,
    arch: str = "resnet18",
    *,
    detector: str = "retinanet",
    weights: str | None = None,
    cut: int | None = None,
    precision: Precision = "fp32",
    metrics: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
    **learner: Any,
) -> Learner:
    """A Learner of one of torchvision's detection models over the body of `arch`, for boxes and their labels.

    detector: retinanet, fcos or fasterrcnn (which samples by chance, so that several workers do not repeat one's numbers).
    metrics: by default mean average precision at an overlap of a half. The rest is as in `vision_learner`; the parameters are
    in two groups, the body's and the others. UserError for other targets, and for labels that have no number for none.
    """
    if target_kinds(dls) != (TensorBBox, TensorBBoxLabel) or dls.vocab[:1] != (NA,):
        raise UserError(
            "a detection model learns boxes and their labels: blocks=(ImageBlock(), BBoxBlock(), BBoxLblBlock()), n_inp=1"
        )
    dls, n_in, trained = _as_trained(dls, arch, weights)
    model = detection_model(detector=detector, arch=arch, n_classes=len(dls.vocab), n_in=n_in, cut=cut)
    settings = {"loss_func": DetectionLoss(), "splitter": encoder_and_rest} | learner
    metrics = MeanAP() if metrics is None else metrics
    learn = _learner(dls, model, None, precision, metrics, [GiveTargets(), *listed(callbacks)], settings)
    if trained is not None:
        encoder_of(model).load_state_dict(create_body(trained, n_in, cut).state_dict())
        learn.freeze()
    return learn


def _as_trained(dls: DataLoaders, arch: str, weights: str | None) -> tuple[DataLoaders, int, nn.Module | None]:
    # The data normalised as the weights were trained, how many channels it has, and the trained classifier.
    n_in = dls.one_batch()[0].shape[1]
    if weights is None:
        return dls, n_in, None
    trained = trained_model(arch, weights)
    return normalised_as(dls, *stats_of(trained), n_in), n_in, trained


def _learner(
    dls: DataLoaders,
    model: nn.Module,
    body: nn.Module | None,
    precision: Precision,
    metrics: Any,
    callbacks: Callback | Iterable[Callback],
    settings: dict[str, Any],
) -> Learner:
    # body: the trained one, which the model's first child becomes.
    if body is not None:
        next(model.children()).load_state_dict(body.state_dict())
    callbacks = [*precision_callbacks(precision, default_device()), *listed(callbacks)]
    settings = {
        "splitter": halves_and_head,
        "metrics": usual_metrics(dls) if metrics is None else metrics,
        "callbacks": callbacks,
    } | settings
    learn = Learner(dls, model, **settings)
    if body is not None:
        learn.freeze()
    return learn


def usual_metrics(dls: DataLoaders) -> Any:
    """The metric that people ask for first where the target is of this type; none where none is usual."""
    usual = _USUAL_METRICS.get(target_type(dls))
    return usual() if usual else ()


_USUAL_METRICS: dict[type[Tensor], Callable[[], Any]] = {
    TensorCategory: lambda: accuracy,
    TensorMultiCategory: lambda: accuracy_multi,
    TensorNumber: lambda: rmse,
    TensorPoint: lambda: rmse,
    TensorMask: JaccardCoeffMulti,
}


def _channels(dls: DataLoaders) -> int:
    if dls.vocab:
        return len(dls.vocab)
    target = dls.one_batch()[dls.n_inp]
    if not target.is_floating_point():
        raise UserError("how many classes the masks have is not known: give MaskBlock(codes=...), or n_out=...")
    return target.shape[1]


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
