"""Losses that also know what the model's output means: `activation` makes it probabilities, `decodes` a prediction."""

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks.tensors import TensorCategory


class CrossEntropyLossFlat(nn.CrossEntropyLoss):
    """Cross entropy of (rows, classes, *) logits and (rows, *) int64 targets; mean over rows."""

    name = "cross_entropy"

    def activation(self, pred: Tensor) -> Tensor:
        """Logits (rows, classes) to probabilities."""
        return F.softmax(pred, dim=1)

    def decodes(self, pred: Tensor) -> Tensor:
        """The most probable class of each row, int64."""
        return pred.argmax(dim=1)


LOSSES: dict[str, type[nn.Module]] = {CrossEntropyLossFlat.name: CrossEntropyLossFlat}


def loss_for(target: type[Tensor]) -> nn.Module:
    """The usual loss for targets of this type. ValueError when there is none: give the Learner a `loss_func`."""
    if issubclass(target, TensorCategory):
        return CrossEntropyLossFlat()
    raise ValueError(
        f"no usual loss is known for targets of type {target.__name__}: pass loss_func=... to the Learner "
        f"(known: TensorCategory -> {CrossEntropyLossFlat.__name__})"
    )
