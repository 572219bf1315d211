"""Grad-CAM: where in a picture a classifier sees what it says (Selvaraju et al., arXiv:1610.02391), by hooks on one layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocks.errors import UserError
from blocks.splits import VALID
from blocks.tensors import as_plain
from training.hooks import Hooks, hook_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.learner import Learner


@dataclass(frozen=True)
class GradCAM:
    """Where in a picture the class `label` is seen.

    heat: (h, w) float, 0..1, of the layer's own size, which covers the whole picture. picture: as the model sees it, decoded.
    """

    label: str
    heat: Tensor
    picture: Any

    def show(self) -> "Figure":
        """A figure of the picture with the heat over it."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3, 3.2), layout="constrained")
        self.draw(figure.subplots())
        return figure

    def draw(self, axis: Any) -> None:
        """Draw both on matplotlib axes."""
        from blocks.show import draw

        draw(axis, self.picture)
        height, width = self.picture.shape[-2:]
        axis.imshow(
            self.heat.numpy(),
            cmap="inferno",
            alpha=0.5,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="bilinear",
        )
        axis.set_title(self.label, fontsize=9)
        axis.axis("off")


def grad_cam(learn: "Learner", item: Any, label: str | None = None, layer: nn.Module | None = None) -> GradCAM:
    """Where the classifier `learn` sees the class `label`, by default the one it predicts, in the picture `item` (a path).

    layer: whose features are weighed, by default the last one that gives a map of several places. UserError for a class that
    there is not, and for a model without such a layer.
    """
    from blocks.dataloaders import input_tensors  # not with the Learner: it takes a while to import

    if learn.dls.encode is None:
        raise UserError("the data was not made from a DataBlock, so an item cannot be read: call grad_cam_of on a batch's row")
    return grad_cam_of(learn, input_tensors(learn.dls.encode, item)[0], label, layer)


def grad_cam_of(learn: "Learner", x: Tensor, label: str | None = None, layer: nn.Module | None = None) -> GradCAM:
    """The same of one row of a batch, (channels, h, w), before its batch transforms."""
    vocab = learn.dls.vocab
    if label is not None and label not in vocab:
        raise UserError(f"there is no class {label!r}; there are {', '.join(vocab)}")
    device = next(learn.model.parameters()).device
    (batch,) = learn.dls.batch_tfms((x[None].to(device),), split_idx=VALID)
    was_training = learn.model.training
    learn.model.eval()
    try:
        heat, scores = _heat(learn.model, as_plain(batch), None if label is None else vocab.index(label), layer)
    finally:
        learn.model.train(was_training)
    seen = label if label is not None else (vocab[int(scores.argmax())] if vocab else str(int(scores.argmax())))
    return GradCAM(seen, heat, learn.dls.decode_batch((batch,))[0][0])


def _heat(model: nn.Module, x: Tensor, number: int | None, layer: nn.Module | None) -> tuple[Tensor, Tensor]:
    # With the input's own gradient, so that there is one in a frozen body, too.
    with hook_output(layer or _last_with_places(model, x), detach=False) as hook, torch.enable_grad():
        scores = model(x.detach().clone().requires_grad_())[0]
        features = hook.stored
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise UserError(
                f"{type(layer).__name__} gives no map of several places, (rows, channels, h, w): give another layer=..."
            )
        (gradient,) = torch.autograd.grad(scores[int(scores.argmax()) if number is None else number], features)
    weights = gradient.mean((2, 3), keepdim=True)
    heat = (weights * features.detach()).sum(1)[0].relu().float().cpu()
    return heat / heat.max().clamp(min=1e-12), scores.detach()


def _last_with_places(model: nn.Module, x: Tensor) -> nn.Module:
    found: list[nn.Module] = []

    def note(module: nn.Module, given: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.ndim == 4 and result.shape[2] * result.shape[3] > 1:
            found.append(module)

    with Hooks([m for m in model.modules() if m is not model], note), torch.no_grad():
        model(x)
    if not found:
        raise UserError("no layer of the model gives a map of several places: give layer=..., or larger pictures")
    return found[-1]
