"""The callbacks every Learner has: batch transforms, scheduled rates, the record of the training, its printed lines."""

import html
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from blocks.tensors import TensorImage, as_plain
from training import distributed
from training.callback import Callback
from training.metrics import values_over_ranks
from training.optimizer import own_momentum_again, set_rates
from training.schedule import top_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.learner import Learner


class BatchTransforms(Callback):
    """The device side of the plan: runs `dls.batch_tfms` on each batch."""

    order = -10
    needs_inputs = False  # features have been through them

    def before_batch(self, learn: "Learner") -> None:
        tfms = getattr(learn.fed, "batch_tfms", None)
        if tfms is not None and tfms.transforms:
            batch = tfms((*learn.xb, *learn.yb), split_idx=learn.split_idx, keys=learn.keys)
            learn.xb, learn.yb = batch[: len(learn.xb)], batch[len(learn.xb) :]


class ScheduledRates(Callback):
    """Sets each step's learning rates and momentum from the phase."""

    order = 60
    needs_inputs = False

    def before_batch(self, learn: "Learner") -> None:
        if learn.training:
            phase = learn.phase
            progress = (learn.epoch_in_phase + learn.iter / learn.n_iter) / phase.epochs
            momentum = None if phase.momentum is None else phase.momentum.at(progress)
            top, spread = top_and_spread(learn.run_lr)
            set_rates(learn.opt, top * phase.lr.at(progress), spread * phase.spread, momentum)

    def after_fit(self, learn: "Learner") -> None:
        if learn._opt is not None:
            own_momentum_again(learn._opt)


class Recorder(Callback):
    """One dict an epoch in `history`: `epoch`, `train/loss`, `valid/loss`, `valid/<metric>`, `hp/...`, `time/...`.

    hp/: rate, momentum and weight decay of the last parameter group. time/stall: seconds of waiting for data, of time/train.

    Losses and metrics are means over all rows of all ranks, reduced once at the end of each part. Step by step there are
    `losses` (of this rank's rows), `rates` and `momenta` (of the last parameter group); `epoch_ends` are the numbers of steps.
    """

    order = -50  # first, so that a callback that cancels a part before it begins does not keep it from hearing so
    remove_on_fetch = True
    needs_inputs = False

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.values: dict[str, float] = {}
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.momenta: list[float] = []
        self.epoch_ends: list[int] = []
        self.unit = "rows"
        # Of the part so far: the batches whose losses were not read yet, and the sums over the others.
        self._unread: list[tuple[torch.Tensor, torch.Tensor | float]] = []
        self._training = False
        self._loss = self._count = 0.0
        self._rows = 0
        self._noted = False  # whether the batch is in already

    def before_epoch(self, learn: "Learner") -> None:
        self._began = self._train_began = time.perf_counter()
        self.values = {"epoch": learn.epoch}

    def before_train(self, learn: "Learner") -> None:
        self._restart()
        self._train_began = time.perf_counter()
        learn.stalled = 0.0

    def before_validate(self, learn: "Learner") -> None:
        self._restart()
        for metric in learn.metrics:
            metric.reset()

    def before_batch(self, learn: "Learner") -> None:
        self._noted = False
        if isinstance(learn.xb[0], TensorImage):
            self.unit = "images"

    def after_step(self, learn: "Learner") -> None:
        # Already here: what is raised after the step does not undo it, and a run that goes on begins with the next one.
        self._note_batch(learn)
        self._noted = True

    def after_batch(self, learn: "Learner") -> None:
        if learn.yb and learn.loss is not None and not self._noted:
            self._note_batch(learn)

    def _note_batch(self, learn: "Learner") -> None:
        # Read later, many at once: to read or to add them at each batch takes a while, and makes the host wait for a GPU.
        self._unread.append((learn.loss.detach(), learn.loss_count if learn.rows else 0.0))
        self._training = learn.training
        self._rows += learn.rows
        if len(self._unread) >= READ_AT_ONCE:
            self._read_losses()
        if learn.training:
            group = learn.opt.param_groups[-1]
            self.rates.append(group["lr"])
            self.momenta.append(_momentum(group))
        elif learn.rows and learn.metrics:  # without rows it is a borrowed one
            targets = tuple(map(as_plain, learn.yb))
            for metric in learn.metrics:
                metric.accumulate(learn.pred, targets if len(targets) > 1 else targets[0], learn.rows)

    def after_train(self, learn: "Learner") -> None:
        total = self._reduced()
        self._note("train/loss", total)
        seconds = time.perf_counter() - self._train_began
        self.values["time/train"] = seconds
        self.values["time/stall"] = learn.stalled
        self.values[f"time/{self.unit}_per_second"] = float(total[2]) / seconds
        group = learn.opt.param_groups[-1]
        self.values |= {
            "hp/lr": group["lr"],
            "hp/momentum": _momentum(group),
            "hp/wd": group.get("wd", group.get("weight_decay", 0.0)),
        }

    def after_validate(self, learn: "Learner") -> None:
        self._note("valid/loss", self._reduced())
        self.values |= {f"valid/{name}": value for name, value in values_over_ranks(learn.metrics).items()}

    def after_epoch(self, learn: "Learner") -> None:
        self.values["time/epoch"] = time.perf_counter() - self._began
        self.history.append(self.values)
        self.epoch_ends.append(len(self.losses))

    def after_fit(self, learn: "Learner") -> None:
        self._read_losses()  # of an epoch that was cut short

    def _read_losses(self) -> None:
        if not self._unread:
            return
        losses = torch.stack([loss for loss, _ in self._unread]).flatten().tolist()
        for loss, (_, count) in zip(losses, self._unread, strict=True):  # one by one: the same bits wherever one stops
            if count:  # without rows it is a borrowed one
                self._loss += loss * float(count)
                self._count += float(count)
        if self._training:
            self.losses += losses
        self._unread = []

    def plot_loss(self, skip_start: int = 5, with_valid: bool = True, smooth: float = 0.98) -> "Figure":
        """A figure of the training loss step by step, smoothed exponentially, and the validation loss of each epoch."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        skip = min(skip_start, max(len(self.losses) - 1, 0))
        axes.plot(range(skip, len(self.losses)), smoothed(self.losses, smooth)[skip:], label="train")
        ends = zip(self.epoch_ends, self.history, strict=True)
        valid = [(end, values["valid/loss"]) for end, values in ends if "valid/loss" in values]
        if with_valid and valid:
            axes.plot(*zip(*valid, strict=True), marker="o", label="valid")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        return figure

    def plot_sched(self) -> "Figure":
        """A figure of the learning rate and the momentum step by step."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3), layout="constrained")
        for axes, name, values in zip(figure.subplots(1, 2), ("lr", "momentum"), (self.rates, self.momenta), strict=True):
            axes.plot(values)
            axes.set(xlabel="step", title=name)
        return figure

    def _repr_html_(self) -> str:
        """The history as a table, a row an epoch: what a notebook shows."""
        names = [n for n in dict.fromkeys(n for values in self.history for n in values) if not n.startswith("time/")]
        names = [n for n in names if n != "epoch"] + ["time/epoch"]
        head = "".join(f"<th>{html.escape(n)}</th>" for n in ("epoch", *names))
        rows = "".join(
            f"<tr><td>{int(values['epoch'])}</td>"
            + "".join(f"<td>{values[n]:.6g}</td>" if n in values else "<td></td>" for n in names)
            + "</tr>"
            for values in self.history
        )
        return f"<table><tr>{head}</tr>{rows}</table>"

    def _restart(self) -> None:
        self._read_losses()  # those of a part that was cut short
        self._loss = self._count = 0.0
        self._rows = 0

    def _reduced(self) -> torch.Tensor:
        self._read_losses()
        return distributed.sum_over_ranks(torch.tensor([self._loss, self._count, self._rows], dtype=torch.float64))

    def _note(self, name: str, total: torch.Tensor) -> None:
        if total[1] > 0:
            self.values[name] = float(total[0] / total[1])

    def state_dict(self) -> dict[str, Any]:
        self._read_losses()
        steps = {name: list(getattr(self, name)) for name in _BY_STEP}
        sums = {"loss": self._loss, "count": self._count, "rows": self._rows}
        history = [dict(values) for values in self.history]
        return {"history": history, "values": dict(self.values), "sums": sums, **steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [dict(values) for values in state["history"]]
        self.values = dict(state["values"])
        sums = state["sums"]
        self._loss, self._count, self._rows = float(sums["loss"]), float(sums["count"]), sums["rows"]
        self._unread = []
        for name in _BY_STEP:
            setattr(self, name, list(state[name]))

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        first = distributed.rank() == 0  # has the sums of all, since they are added up again
        sums = {name: sum(state["sums"][name] for state in states) * first for name in states[0]["sums"]}
        return states[0] | {"sums": sums}


READ_AT_ONCE = 1000  # batches


def _momentum(group: dict[str, Any]) -> float:
    return group["betas"][0] if "betas" in group else group.get("mom", group.get("momentum", 0.0))


_BY_STEP = ("losses", "rates", "momenta", "epoch_ends")


def smoothed(values: list[float], beta: float) -> list[float]:
    """The exponentially weighted means up to each value, without bias to the start."""
    total = weight = 0.0
    means = []
    for value in values:
        total = beta * total + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        means.append(total / weight)
    return means


class Progress(Callback):
    """Prints one line an epoch, on rank 0; in a terminal or notebook also a `bar` of the batches. fastai's ProgressCallback."""

    order = 70
    remove_on_fetch = True

    def __init__(self, bar: bool = True) -> None:
        self.bar = bar
        self._bar: Any = None

    def before_train(self, learn: "Learner") -> None:
        self._start(learn, f"epoch {learn.epoch + 1}/{learn.n_epoch}")

    def before_validate(self, learn: "Learner") -> None:
        self._start(learn, "validation")

    def after_batch(self, learn: "Learner") -> None:
        # True now and then only, when it is time to draw: reading the loss makes the host wait for a GPU.
        if self._bar is not None and self._bar.update() and learn.loss is not None:
            self._bar.set_postfix_str(f"loss {float(learn.loss):.4f}", refresh=False)

    def after_train(self, learn: "Learner") -> None:
        self._close()

    def after_validate(self, learn: "Learner") -> None:
        self._close()

    def after_epoch(self, learn: "Learner") -> None:
        if distributed.rank() == 0:
            print(epoch_line(learn.recorder.values, learn.n_epoch), flush=True)

    def after_fit(self, learn: "Learner") -> None:
        self._close()

    def _start(self, learn: "Learner", what: str) -> None:
        if self.bar and distributed.rank() == 0 and somebody_watches():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=_length(learn.dl), desc=what, unit="batch", leave=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def somebody_watches() -> bool:
    """Whether output goes to a terminal or a notebook, where a bar can be drawn over."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None


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


ProgressCallback = Progress  # fastai's name
