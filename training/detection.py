"""Object detection with torchvision's models, whose losses come from the model itself, in the Learner's ordinary loop.

`Detector` is the adapter: a batch's tensors become the lists of pictures and targets that those models want, and what they find
becomes one tensor again. In training its output is the model's losses, which `DetectionLoss` adds up; `GiveTargets` is the
callback that lets the model see the targets as well. So validation has a loss, too; a batch without targets is a prediction.

Found boxes are rows of (left, top, right, bottom, label, score), the corners in -1..1 over width and height as everywhere else,
the best first; rows with score 0 fill up.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blocks.errors import UserError
from training.callback import Callback
from training.losses import LOSSES, BaseLoss
from training.models import image_model, model_builder
from training.transfer import create_body
from training.unet import seen_on_the_way, sizes_of

if TYPE_CHECKING:
    from training.learner import Learner

CORNERS, LABEL, SCORE = slice(0, 4), 4, 5  # the columns of a found box
MOST = 100  # boxes found in a picture
LEVELS = 3  # of the pyramid: the last sizes of the encoder
WIDTH = 64  # channels of the pyramid


class Checked(NamedTuple):
    """What a `Detector` gives for a validation batch: found boxes (rows, n, 6), and the losses."""

    found: Tensor
    losses: dict[str, Tensor]


class Detector(nn.Module):
    """A detection model of torchvision on batches: pictures (rows, channels, h, w), boxes (rows, n, 4) and labels (rows, n).

    Boxes are -1..1; those without area, or of class 0, fill up. Gives the losses in training, `Checked` in evaluation with
    targets, found boxes (rows, n, 6) without.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None) -> Any:
        size = pictures.new_tensor([pictures.shape[-1], pictures.shape[-2]] * 2, dtype=torch.float32)
        if boxes is None or labels is None:
            return _together(self.model(list(pictures)), size)
        targets = [_target(b, n, size) for b, n in zip(boxes, labels, strict=True)]
        if self.training:
            return self.model(list(pictures), targets)
        with _giving_losses(self.model):
            losses = self.model(list(pictures), targets)
        return Checked(_together(self.model(list(pictures)), size), losses)


def _target(boxes: Tensor, labels: Tensor, size: Tensor) -> dict[str, Tensor]:
    real = (labels > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {"boxes": (boxes[real].float() + 1) * size / 2, "labels": labels[real]}


def _together(found: Sequence[dict[str, Tensor]], size: Tensor) -> Tensor:
    rows = [torch.cat([f["boxes"] * 2 / size - 1, f["labels"][:, None], f["scores"][:, None]], 1)[:MOST] for f in found]
    longest = max((len(row) for row in rows), default=0)
    return torch.stack([nn.functional.pad(row.float(), (0, 0, 0, longest - len(row))) for row in rows])


@contextlib.contextmanager
def _giving_losses(model: nn.Module) -> Iterator[None]:
    # torchvision's detection modules give losses in training only; norms and dropout among them stay in evaluation.
    own = [m for m in model.modules() if type(m).__module__.startswith("torchvision.models.detection")]
    before = [m.training for m in own]
    for module in own:
        module.training = True
    try:
        yield
    finally:
        for module, was in zip(own, before, strict=True):
            module.training = was


class GiveTargets(Callback):
    """Gives the model the targets beside the inputs."""

    order = 110  # after what changes them, and what keeps the inputs

    def before_batch(self, learn: "Learner") -> None:
        learn.xb = (*learn.xb, *learn.yb)

    def after_pred(self, learn: "Learner") -> None:
        learn.xb = learn.xb[: len(learn.xb) - len(learn.yb)]


@dataclass(kw_only=True)
class DetectionLoss(BaseLoss):
    """The sum of a `Detector`'s losses. thresh: the score from which a box is predicted.

    Decoded are boxes (rows, n, 4) and labels (rows, n), 0 where there is none.
    """

    thresh: float = 0.5

    of_each_row: ClassVar[bool] = False

    def __call__(self, pred: Any, *targets: Tensor) -> Tensor:
        if self.reduction != "mean":
            raise ValueError(f"the losses come from the model, as means over a batch: there is no reduction={self.reduction!r}")
        losses: dict[str, Tensor] = pred.losses if isinstance(pred, Checked) else pred
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def count(self, pred: Any, *targets: Tensor) -> Tensor:
        """The number of pictures."""
        return torch.tensor(float(len(targets[0])))

    def activation(self, pred: Any) -> Tensor:
        """The found boxes."""
        return pred.found if isinstance(pred, Checked) else pred

    def decodes(self, pred: Tensor) -> Any:
        """The boxes and labels of those found that are above `thresh`."""
        said = pred[..., SCORE] >= self.thresh
        return pred[..., CORNERS] * said[..., None], pred[..., LABEL].long() * said


LOSSES[DetectionLoss.__name__] = DetectionLoss


# --- models --------------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """The last sizes of an encoder, each with what the smaller ones know (Lin et al., arXiv:1612.03144): maps by name."""

    def __init__(self, encoder: nn.Module, n_in: int):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.encoder, self.out_channels = encoder, WIDTH
        sizes = sizes_of(encoder, n_in)[:LEVELS][::-1]
        self.layers, self.strides = [size.layer for size in sizes], [size.stride for size in sizes]
        self.mix = FeaturePyramidNetwork([size.channels for size in sizes], WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, seen = seen_on_the_way(self.encoder, self.layers, x)
        return self.mix({str(i): seen[layer] for i, layer in enumerate(self.layers)})


class _AsTheyAre(nn.Module):
    """In place of torchvision's own transform, which makes pictures 800 pixels high: a batch's have their size."""

    def forward(self, pictures: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        from torchvision.models.detection.image_list import ImageList

        height, width = pictures[0].shape[-2:]
        return ImageList(torch.stack(pictures), [(height, width)] * len(pictures)), targets

    def postprocess(self, found: Any, sizes: Any, original_sizes: Any) -> Any:
        """What was found is in pixels of these pictures already."""
        return found


def _retinanet(backbone: Pyramid, n_classes: int) -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead

    sizes = tuple(tuple(round(2 * s * 2 ** (i / 3)) for i in range(3)) for s in backbone.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    # With norms, as in torchvision's second version: its small first weights let nothing through a narrow head without them.
    norm = partial(nn.GroupNorm, WIDTH // 4)
    head = RetinaNetHead(WIDTH, anchors.num_anchors_per_location()[0], n_classes, norm_layer=norm)
    return RetinaNet(backbone, n_classes, anchor_generator=anchors, head=head)


def _fcos(backbone: Pyramid, n_classes: int) -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(tuple((s,) for s in backbone.strides), ((1.0,),) * len(backbone.strides))
    return FCOS(backbone, n_classes, anchor_generator=anchors)


def _faster_rcnn(backbone: Pyramid, n_classes: int) -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    anchors = AnchorGenerator(tuple((4 * s,) for s in backbone.strides), ((0.5, 1.0, 2.0),) * len(backbone.strides))
    names = [str(i) for i in range(len(backbone.strides))]
    pool = MultiScaleRoIAlign(featmap_names=names, output_size=7, sampling_ratio=2)
    return FasterRCNN(backbone, n_classes, rpn_anchor_generator=anchors, box_roi_pool=pool)


DETECTORS: dict[str, Callable[..., nn.Module]] = {"retinanet": _retinanet, "fcos": _fcos, "fasterrcnn": _faster_rcnn}


@model_builder
def detection_model(*, detector: str, arch: str, n_classes: int, n_in: int = 3, cut: int | None = None) -> nn.Module:
    """A `Detector` of torchvision over the body of a classifier of torchvision or timm, with random weights.

    detector: retinanet, fcos or fasterrcnn. n_classes: with number 0, which is none. Pictures keep their size, and are
    taken to be normalised. UserError for another detector.
    """
    if detector not in DETECTORS:
        raise UserError(f"there is no detector {detector!r}: one of {', '.join(DETECTORS)}")
    backbone = Pyramid(create_body(image_model(arch), n_in, cut), n_in)
    model = DETECTORS[detector](backbone, n_classes)
    model.transform = _AsTheyAre()
    return Detector(model)


def encoder_of(model: nn.Module) -> nn.Module:
    """The body of a `detection_model`."""
    return next(module for module in model.modules() if isinstance(module, Pyramid)).encoder


def encoder_and_rest(model: nn.Module) -> list[list[nn.Parameter]]:
    """Two groups of the parameters of a `detection_model`: the encoder's, and the others."""
    encoder, parameters = {id(p) for p in encoder_of(model).parameters()}, list(model.parameters())
    groups = [[p for p in parameters if id(p) in encoder], [p for p in parameters if id(p) not in encoder]]
    return [group for group in groups if group]
