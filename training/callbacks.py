"""The callbacks every Learner has: batch transforms, scheduled rates, the record of the training, its printed lines."""

import time
from typing import TYPE_CHECKING, Any

import torch

from blocks.splits import TRAIN, VALID
from blocks.tensors import TensorImage, as_plain
from training import distributed
from training.callback import Callback
from training.optimizer import set_rates

if TYPE_CHECKING:
    from training.learner import Learner


class BatchTransforms(Callback):
    """The device side of the plan: runs `dls.batch_tfms` on each batch."""

    order = -10

    def before_batch(self, learn: "Learner") -> None:
        tfms = getattr(learn.dls, "batch_tfms", None)
        if tfms is not None and tfms.transforms:
            batch = tfms((*learn.xb, *learn.yb), split_idx=TRAIN if learn.training else VALID)
            learn.xb, learn.yb = batch[: len(learn.xb)], batch[len(learn.xb) :]


class ScheduledRates(Callback):
    """Sets each step's learning rates and momentum from the phase."""

    order = 60

    def before_batch(self, learn: "Learner") -> None:
        if learn.training:
            phase = learn.phase
            progress = (learn.epoch_in_phase + learn.iter / learn.n_iter) / phase.epochs
            momentum = None if phase.momentum is None else phase.momentum.at(progress)
            set_rates(learn.opt, learn.run_lr * phase.lr.at(progress), phase.spread, momentum)


class Recorder(Callback):
    """One dict an epoch in `history`: `epoch`, `train/loss`, `valid/loss`, `valid/<metric>`, `hp/lr`, `time/...`.

    Losses and metrics are means over all rows of all ranks, reduced once at the end of each part.
    """

    order = -50  # first, so that a callback that cancels a part before it begins does not keep it from hearing so

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.values: dict[str, float] = {}
        self.unit = "rows"

    def before_epoch(self, learn: "Learner") -> None:
        self._began = self._train_began = time.perf_counter()
        self.values = {"epoch": learn.epoch}

    def before_train(self, learn: "Learner") -> None:
        self._restart(learn)
        self._train_began = time.perf_counter()

    def before_validate(self, learn: "Learner") -> None:
        self._restart(learn)
        for metric in learn.metrics:
            metric.reset()

    def before_batch(self, learn: "Learner") -> None:
        if isinstance(learn.xb[0], TensorImage):
            self.unit = "images"

    def after_batch(self, learn: "Learner") -> None:
        if not learn.yb or learn.loss is None:
            return
        # The sum stays on the device: reading it at each batch would make the host wait for a GPU.
        self._loss += learn.loss.detach().to(torch.float64) * learn.rows
        self._rows += learn.rows
        if not learn.training:
            for metric in learn.metrics:
                metric.accumulate(learn.pred, as_plain(learn.yb[0]), learn.rows)

    def after_train(self, learn: "Learner") -> None:
        (total,) = self._reduced([])
        self._note("train/loss", total)
        seconds = time.perf_counter() - self._train_began
        self.values["time/train"] = seconds
        self.values[f"time/{self.unit}_per_second"] = float(total[1]) / seconds
        self.values["hp/lr"] = learn.opt.param_groups[-1]["lr"]

    def after_validate(self, learn: "Learner") -> None:
        loss, *totals = self._reduced([m.total for m in learn.metrics])
        self._note("valid/loss", loss)
        for metric, total in zip(learn.metrics, totals, strict=True):
            if total[1] > 0:
                self.values[f"valid/{metric.name}"] = metric.value(total)

    def after_epoch(self, learn: "Learner") -> None:
        self.values["time/epoch"] = time.perf_counter() - self._began
        self.history.append(self.values)

    def _restart(self, learn: "Learner") -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=learn.device)
        self._rows = 0

    def _reduced(self, totals: list[torch.Tensor]) -> list[torch.Tensor]:
        # One collective for the loss and all metrics.
        mine = torch.stack([self._loss.cpu(), torch.tensor(self._rows, dtype=torch.float64)])
        together = distributed.sum_over_ranks(torch.cat([mine, *totals]))
        return list(together.split([2, *(len(t) for t in totals)]))

    def _note(self, name: str, total: torch.Tensor) -> None:
        if total[1] > 0:
            self.values[name] = float(total[0] / total[1])

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(values) for values in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [dict(values) for values in state["history"]]


class Progress(Callback):
    """Prints one line an epoch, on rank 0."""

    order = 70

    def after_epoch(self, learn: "Learner") -> None:
        if distributed.rank() == 0:
            print(epoch_line(learn.recorder.values, learn.n_epoch), flush=True)


def epoch_line(values: dict[str, Any], epochs: int) -> str:
    """One epoch of a history as a line: losses, metrics, seconds, training speed."""
    shown = [f"epoch {int(values['epoch']) + 1}/{epochs}"]
    shown += [
        f"{name.replace('valid/loss', 'valid loss').replace('train/loss', 'train loss').removeprefix('valid/')} {value:.4f}"
        for name, value in values.items()
        if name.startswith(("train/", "valid/"))
    ]
    shown.append(f"{values['time/epoch']:.1f} s")
    for unit in ("images", "rows"):
        if f"time/{unit}_per_second" in values:
            shown.append(f"{values[f'time/{unit}_per_second']:.0f} {unit}/s")
    return "  ".join(shown)
