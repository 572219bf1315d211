"""Callbacks that keep or show what passes by: predictions, batches, a file or a graph of the history; dropout that stays on."""

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocks.tensors import as_plain
from training import distributed
from training.callback import Callback
from training.losses import loss_per_row

if TYPE_CHECKING:
    from training.learner import Learner


class GatherPredictions(Callback):
    """Keeps the model's output for the validation part of the last epoch, on the CPU; fastai's GatherPredsCallback.

    preds: what the model gave, (rows, ...) and without the loss's activation. targets: one tensor a target column.
    inputs: one a column, with_input. losses: (rows,), with_loss. Of this rank's rows.
    """

    order = 50
    remove_on_fetch = True

    def __init__(self, with_input: bool = False, with_loss: bool = False):
        self.with_input, self.with_loss = with_input, with_loss
        self.needs_inputs = with_input
        self._batches: list[tuple[Any, ...]] = []

    def before_validate(self, learn: "Learner") -> None:
        self._batches = []

    def after_batch(self, learn: "Learner") -> None:
        if not learn.training and learn.pred is not None:
            targets = tuple(map(as_plain, learn.yb))
            losses = (loss_per_row(learn.loss_func, learn.pred, *targets),) if self.with_loss and targets else ()
            inputs = tuple(map(as_plain, learn.xb)) if self.with_input else ()
            self._batches.append(_on_cpu((inputs, learn.pred, targets, losses)))

    def after_validate(self, learn: "Learner") -> None:
        if self._batches:
            inputs, preds, targets, losses = zip(*self._batches, strict=True)
            self.preds = torch.cat(preds)
            self.inputs, self.targets = _joined(inputs), _joined(targets)
            (self.losses,) = _joined(losses) or (torch.empty(0),)
        self._batches = []


def _joined(columns: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*columns, strict=True))


def _on_cpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return type(x)(map(_on_cpu, x)) if isinstance(x, tuple | list) else x


class FetchPredictions(Callback):
    """After each epoch, has `learn.get_preds(batches)` in `preds`, without `skip`'s callbacks; fastai's FetchPredsCallback.

    batches: None for the validation part. skip: classes of callbacks that do not take part.
    """

    order = 50
    remove_on_fetch = True

    def __init__(self, batches: Iterable[Any] | None = None, skip: tuple[type[Callback], ...] = ()):
        self.batches, self.skip = batches, skip
        self.preds: Any = None

    def after_epoch(self, learn: "Learner") -> None:
        with learn.removed_callbacks(c for c in learn.callbacks if isinstance(c, self.skip)):
            self.preds = learn.get_preds(self.batches)


class CollectData(Callback):
    """Keeps the last epoch's batches in `data`: (inputs, targets, pred, loss) on the CPU; fastai's CollectDataCallback."""

    order = 50
    remove_on_fetch = True
    needs_inputs = True

    def __init__(self) -> None:
        self.data: list[tuple[Any, ...]] = []

    def before_epoch(self, learn: "Learner") -> None:
        self.data = []

    def after_batch(self, learn: "Learner") -> None:
        self.data.append(_on_cpu((tuple(map(as_plain, learn.xb)), tuple(map(as_plain, learn.yb)), learn.pred, learn.loss)))


class MCDropout(Callback):
    """Keeps dropout on while validating and predicting, so that repeated predictions differ as much as the model is unsure.

    Gal & Ghahramani, arXiv:1506.02142.
    """

    def before_validate(self, learn: "Learner") -> None:
        for module in learn.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.train()

    def after_validate(self, learn: "Learner") -> None:
        learn.model.eval()


class CSVLogger(Callback):
    """Writes `learn.recorder.history` to a CSV file after each epoch, one row an epoch; fastai's.

    The file is written anew each time, so that it is whole at any moment and after a restart. On rank 0.
    """

    order = 60

    def __init__(self, path: str | Path = "history.csv"):
        self.path = Path(path)

    def after_epoch(self, learn: "Learner") -> None:
        if distributed.rank() == 0:
            history = learn.recorder.history
            columns = list(dict.fromkeys(name for values in history for name in values))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(history)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(self.path.name + ".part")
            unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
            unfinished.replace(self.path)


class ShowGraph(Callback):
    """Draws the losses of training and validation after each epoch, over the last drawing; fastai's ShowGraphCallback.

    In a notebook; elsewhere it says once that there is nothing to draw on: `learn.recorder.plot_loss()` gives the figure.
    """

    order = 76

    def before_fit(self, learn: "Learner") -> None:
        self._shown: Any = None
        if "ipykernel" not in sys.modules and distributed.rank() == 0:
            print("ShowGraph draws in notebooks only", flush=True)

    def after_epoch(self, learn: "Learner") -> None:
        if "ipykernel" not in sys.modules or distributed.rank() > 0:
            return
        from IPython.display import Image, display

        picture = io.BytesIO()
        learn.recorder.plot_loss(skip_start=0).savefig(picture, format="png")
        image = Image(data=picture.getvalue())
        if self._shown is None:
            self._shown = display(image, display_id=True)
        else:
            self._shown.update(image)

    def after_fit(self, learn: "Learner") -> None:
        self._shown = None


# fastai's names
GatherPredsCallback = GatherPredictions
FetchPredsCallback = FetchPredictions
CollectDataCallback = CollectData
MCDropoutCallback = MCDropout
ShowGraphCallback = ShowGraph
