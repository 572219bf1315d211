"""What a Learner has learned: predictions for many rows or one item, also over augmented rows, and pictures of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from blocks.splits import TRAIN, VALID
from blocks.tensors import TensorBase, TensorBBox, TensorBBoxLabel, TensorNumber, TensorPoint, as_plain
from blocks.transform import Pipeline
from training.callback import EVENTS, Callback

if TYPE_CHECKING:
    from blocks.dataloaders import DataLoaders
    from training.learner import Learner


class _Collect(Callback):
    """Keeps on the CPU what each batch gave."""

    order = 100  # after what others make of it

    def __init__(self, act: Any, save_preds: str | Path | None, save_targs: str | Path | None):
        self.act, self.save_preds, self.save_targs = act, save_preds, save_targs
        self.inputs: list[Any] = []
        self.preds: list[Any] = []
        self.targets: list[Any] = []
        self.losses: list[Tensor] = []
        self.samples: list[Any] = []

    def before_batch(self, learn: "Learner") -> None:
        self._inputs = _kept(learn.xb)  # after the batch transforms, before the model can change them

    def after_batch(self, learn: "Learner") -> None:
        if learn.pred is None:
            return
        self.inputs.append(self._inputs)
        self._keep(self.preds, _kept(self.act(learn.pred)), self.save_preds)
        self._keep(self.targets, _kept(learn.yb), self.save_targs)
        if learn.loss is not None:
            self.losses.append(learn.loss.float().cpu())
        self.samples.append(getattr(learn.batch, "samples", None))

    def _keep(self, kept: list[Any], values: Any, folder: str | Path | None) -> None:
        if folder is None:
            kept.append(values)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        parts = values if isinstance(values, tuple) else (values,)
        if len(parts) != 1:
            raise ValueError(f"a file holds one tensor of a batch, but here are {len(parts)}: keep them in memory")
        np.save(Path(folder, f"{len(self.samples)}.npy"), parts[0].numpy())

    def in_row_order(self) -> Any:
        """What puts the rows in the order of the store; None where that is not known."""
        if not self.samples or any(s is None for s in self.samples):
            return None
        return torch.from_numpy(np.argsort(np.concatenate(self.samples), kind="stable"))


def get_preds(
    learn: "Learner",
    dl: Iterable[Any] | None = None,
    *,
    ds_idx: int = VALID,
    with_input: bool = False,
    with_decoded: bool = False,
    with_loss: bool = False,
    act: Any = None,
    reorder: bool = True,
    save_preds: str | Path | None = None,
    save_targs: str | Path | None = None,
) -> tuple[Any, ...]:
    """Activations (probabilities, for a classifier) and targets, on the CPU: (inputs,) preds, targets (, decoded) (, losses).

    dl: batches, by default those of part `ds_idx` of the data. with_decoded: what the loss's `decodes` makes of the
    activations. with_loss: a loss a row. act: instead of the loss's `activation`. reorder: rows as in the store, where the
    batches know their place. Several inputs or targets are tuples; without targets there is an empty tensor. Of several
    ranks, each gets its own rows.
    save_preds, save_targs: folders for those that memory would not hold: each batch becomes a file there, `0.npy`,
    `1.npy`, ..., its rows in their order in the batch, and an empty tensor is given instead.
    """
    if save_preds is not None and with_decoded:
        raise ValueError(
            "with_decoded needs the predictions in memory: decode those that save_preds has written, batch by batch"
        )
    batches = dl if dl is not None else (learn.dls.train if ds_idx == TRAIN else learn.dls.valid)
    found = _Collect(act or learn.activation, save_preds, save_targs)
    with learn.validation_context(found):
        if with_loss:
            with learn.loss_not_reduced():
                learn._validate(batches)
        else:
            learn._validate(batches)
    if not found.samples:
        raise ValueError("there are no batches to predict")
    order = found.in_row_order() if reorder else None
    preds = _together(found.preds, order)
    result = [_one_or_all(_together(found.inputs, order))] if with_input else []
    result += [preds, _one_or_all(_together(found.targets, order))]
    if with_decoded:
        result.append(getattr(learn.loss_func, "decodes", lambda p: p)(preds))
    if with_loss:
        losses = [loss.flatten(1).mean(1) if loss.ndim > 1 else loss for loss in found.losses]
        result.append(_together(losses, order) if losses else torch.empty(0))
    return tuple(result)


class Predicted(NamedTuple):
    """What a Learner says of one item: the target as a person reads it, as the model does, and the activations.

    The first is the `label` that an export predicts.
    """

    decoded: Any
    prediction: Tensor
    activations: Tensor


def predict(learn: "Learner", item: Any) -> Predicted:
    """Predict one item, given as `get_x` gives it: `decoded, prediction, activations = learn.predict(path)`.

    Several inputs are a tuple. decoded: the class, those that apply, a number or several in their units, a mask.
    """
    if learn.dls.encode is None:
        raise ValueError("the data was not made from a DataBlock, so an item cannot be read: call get_preds on batches")
    from blocks.dataloaders import input_tensors  # not with the Learner: it takes a while to import

    row = tuple(x[None] for x in input_tensors(learn.dls.encode, item))
    preds, _, decoded = get_preds(learn, [row], with_decoded=True)
    activations, prediction = _first_row(preds), _first_row(decoded)
    targets = targets_of(learn.dls, learn.target_kinds)
    if not targets:  # or several, and what belongs to which is the loss's matter
        return Predicted(prediction, prediction, activations)
    encode = learn.dls.encode
    tfms = encode.item_tfms + encode.each_epoch
    label = as_label(prediction, targets, learn.dls.batch_tfms, tfms, lambda: encode.columns[0].type_tfms(item))
    return Predicted(label, prediction, activations)


def _first_row(x: Any) -> Any:
    return x[0] if isinstance(x, Tensor) else tuple(map(_first_row, x))


class Target(NamedTuple):
    """A target's type in a batch, and the transforms that made it of what a person gave."""

    kind: type[Tensor]
    tfms: Pipeline


def target_kinds(dls: "DataLoaders") -> tuple[type[Tensor], ...]:
    """The types of a batch's targets."""
    batch = next(iter(dls.valid), None) or next(iter(dls.train))
    return tuple(type(column) for column in batch[dls.n_inp :])


def targets_of(dls: "DataLoaders", kinds: tuple[type[Tensor], ...]) -> tuple[Target, ...]:
    """The targets, of these types, that a prediction can be told as: the one there is, or boxes and their labels; else none."""
    if dls.target is not None:
        return (Target(kinds[-1], dls.target.type_tfms),)
    if list(kinds) == [TensorBBox, TensorBBoxLabel] and dls.encode is not None:
        return tuple(Target(kind, c.type_tfms) for kind, c in zip(kinds, dls.encode.columns[dls.encode.n_inp :], strict=True))
    return ()


def as_label(
    decoded: Any, targets: Sequence[Target], batch_tfms: Pipeline, item_tfms: Pipeline, opened: Callable[[], Any]
) -> Any:
    """One prediction as a person reads it: the transforms of batches and target undone, a tuple where it is of several.

    opened: the item's picture, in whose pixels points and boxes are told; boxes that only fill up are left out.
    """
    values = decoded if isinstance(decoded, tuple) else (decoded,)
    typed = tuple(batch_tfms.decode(_typed(v, target.kind)) for v, target in zip(values, targets, strict=True))
    if issubclass(targets[0].kind, TensorPoint):
        from blocks.points import ClipBoxes  # not with the Learner: these import PIL
        from blocks.resize import in_own_pixels, size_of

        typed = ClipBoxes()(typed) if len(typed) > 1 else (typed[0].view(-1, typed[0].coordinates),)
        size = size_of(opened())
        typed = tuple(in_own_pixels(v, item_tfms, size) if isinstance(v, TensorPoint) and size else v for v in typed)
    labels = tuple(target.tfms.decode(v) for v, target in zip(typed, targets, strict=True))
    return labels if len(labels) > 1 else labels[0]


def _typed(decoded: Tensor, kind: type[Tensor]) -> Tensor:
    typed = decoded.as_subclass(kind) if issubclass(kind, TensorBase) else decoded
    return typed[0] if issubclass(kind, TensorNumber) and typed.shape == (1,) else typed  # of a model with one output


class _Augmented(Callback):
    """Has the batch transforms treat rows as training data, with other draws in each round."""

    order = -100  # before the batch transforms

    def before_batch(self, learn: "Learner") -> None:
        learn.split_idx = TRAIN


def tta(
    learn: "Learner",
    dl: Iterable[Any] | None = None,
    *,
    ds_idx: int = VALID,
    n: int = 4,
    beta: float | None = 0.25,
    use_max: bool = False,
) -> tuple[Any, Any]:
    """Activations and targets over `n` rounds with the training part's batch transforms and one without.

    beta: the share of the round without; None gives the pair (mean of the augmented, plain). use_max: the largest over all
    rounds instead. ValueError for batches of other rows in each round, such as a shuffling torch DataLoader's.
    """
    if n < 1:
        raise ValueError(f"n is the number of rounds with transforms, at least 1, not {n!r}")
    batches = dl if dl is not None else (learn.dls.train if ds_idx == TRAIN else learn.dls.valid)
    if isinstance(getattr(batches, "sampler", None), RandomSampler | WeightedRandomSampler | SubsetRandomSampler):
        raise _shuffles()
    plain, targets = get_preds(learn, batches)
    epoch, drawn = learn.epochs_trained, getattr(batches, "epoch", None)
    rounds = []
    try:
        with learn.added_callbacks(_Augmented()):
            for learn.epochs_trained in range(1, n + 1):
                if drawn is not None:
                    batches.set_epoch(learn.epochs_trained)  # type: ignore[attr-defined]
                again, targets_again = get_preds(learn, batches)
                if not _same(targets, targets_again):
                    raise _shuffles()
                rounds.append(again)
    finally:
        learn.epochs_trained = epoch
        if drawn is not None:
            batches.set_epoch(drawn)  # type: ignore[attr-defined]
    if use_max:
        return _each(lambda *outputs: torch.stack(outputs).amax(0), *rounds, plain), targets
    mean = _each(lambda *outputs: torch.stack(outputs).mean(0), *rounds)
    if beta is None:
        return (mean, plain), targets
    return _each(lambda augmented, once: torch.lerp(augmented, once, beta), mean, plain), targets


def _each(function: Callable[..., Tensor], *outputs: Any) -> Any:
    # Of models with several outputs, output by output.
    match outputs[0]:
        case Tensor():
            return function(*outputs)
        case dict() as named:
            return {name: _each(function, *(o[name] for o in outputs)) for name in named}
    return tuple(_each(function, *parts) for parts in zip(*outputs, strict=True))


def _shuffles() -> ValueError:
    return ValueError(
        "tta averages each row over several rounds, but these batches come in another order each time: give it a loader that "
        "does not shuffle (fastray's own know their rows, and may)"
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(_same, one, other))
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def show_results(learn: "Learner", n: int = 16) -> Any:
    """A matplotlib figure of `n` validation samples with their targets and what the Learner predicts, drawn by their types."""
    from blocks.show import show_results as drawn

    seen = learn.dls.one_batch()
    _, _, decoded = get_preds(learn, [next(iter(learn.dls.valid))], with_decoded=True, reorder=False)
    inputs, targets = seen[: learn.dls.n_inp], seen[learn.dls.n_inp :]
    if isinstance(decoded, tuple):  # of several targets, such as boxes, which need not be as many
        predicted = [d.to(y.dtype).as_subclass(type(y)) for d, y in zip(decoded, targets, strict=True)]
    else:
        (target,) = targets
        predicted = [decoded.to(target.dtype).view(target.shape).as_subclass(type(target))]
    samples, predictions = (learn.dls.decode_batch((*inputs, *ys))[:n] for ys in (targets, predicted))
    said = [sample[-1] if len(targets) == 1 else sample[-len(targets) :] for sample in predictions]
    return drawn(seen[0], targets[0], samples=samples, predictions=said)


def summary(learn: "Learner") -> str:
    """A table of the model's layers on a batch of the data: output shape, parameters, and whether they train."""
    lines = []
    hooks = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            own = list(module.parameters())
            count = f"{sum(p.numel() for p in own):,}" if own else ""
            trains = ("yes" if all(p.requires_grad for p in own) else "no") if own else ""
            lines.append((f"{name} {type(module).__name__}".strip(), _shape(output), count, trains))

        return hook

    for name, module in learn.model.named_modules():
        if not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(note(name)))
    batch = next(iter(learn.dls.train))
    try:
        get_preds(learn, [batch])
    finally:
        for hook in hooks:
            hook.remove()
    parameters = list(learn.model.parameters())
    total, training = (sum(p.numel() for p in parameters if p.requires_grad or everyone) for everyone in (True, False))
    loss = getattr(learn.loss_func, "__name__", None) or repr(learn.loss_func)
    return "\n".join(
        [
            f"{type(learn.model).__name__} on batches of {len(batch[0])} rows",
            *_table([("layer", "output", "parameters", "trains"), *lines]),
            f"{total:,} parameters, {training:,} train",
            f"optimizer {getattr(learn.opt_func, '__name__', learn.opt_func)}, loss {loss}",
            f"callbacks {', '.join(c.name for c in learn.callbacks)}",
        ]
    )


# How the events lie inside each other; the order is that of `EVENTS`.
_DEEPER = {"before_epoch": 1, "before_train": 2, "before_batch": 3, "after_train": 2, "before_validate": 2, "after_epoch": 1}


def show_training_loop(learn: "Learner") -> None:
    """Print the events of a training in their order, each with the callbacks that listen to it, in theirs."""
    depth = 0
    for event in EVENTS[1:]:
        depth = {"after_cancel_train": 2, "after_cancel_epoch": 1, "after_cancel_fit": 0, "after_fit": 0}.get(
            event, _DEEPER.get(event, depth)
        )
        if event == "after_batch":
            depth = 3
        listening = ", ".join(type(m.__self__).__name__ for m in learn._listeners[event])  # type: ignore[attr-defined]
        print(f"{'  ' * depth}{event:<24}{listening}".rstrip())


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_plain(value).detach().cpu()
    if isinstance(value, dict):
        return {name: _kept(part) for name, part in value.items()}
    return tuple(map(_kept, value)) if isinstance(value, tuple | list) else value


def _together(parts: Sequence[Any], order: Tensor | None) -> Any:
    """The parts of all batches as one tensor, tuples of tensors part by part."""
    if not parts:
        return torch.empty(0)
    if isinstance(parts[0], dict):
        return {name: _together([part[name] for part in parts], order) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_together(column, order) for column in zip(*parts, strict=True))
    whole = torch.cat([p.reshape(1) if p.ndim == 0 else p for p in parts])
    return whole if order is None else whole[order]


def _one_or_all(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values
    if not values:
        return torch.empty(0)
    return values[0] if len(values) == 1 else values
