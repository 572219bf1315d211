"""What a person gives a Learner, checked where it comes in: an error says what was given and what to write instead."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from training.callback import Callback

# Arguments that fastai has, and what a person who gives one is told.
_FASTAIS = {
    "cbs": "callbacks=",
    "n_epoch": "the first argument, a number of epochs or a schedule",
    "reset_opt": "a new Learner",
    "default_cbs": "learn.remove_cbs, of those that every Learner has",
    "path": "given to what writes: save, load, export, SaveBest, CSVLogger",
    "model_dir": "part of the path that save and load are given",
}
Function = TypeVar("Function", bound=Callable[..., Any])


def in_our_words(function: Function) -> Function:
    """Have `function` say what an argument that only fastai has is called here: TypeError."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in _FASTAIS:
                raise TypeError(f"{name}= is fastai's; here it is {_FASTAIS[name]}")
        return function(*args, **kwargs)

    return cast(Function, checked)


def check_parts(dls: Any, model: Any, loss_func: Any, opt_func: Any) -> None:
    """TypeError unless these are what a Learner is made of."""
    missing = [part for part in ("train", "valid") if getattr(dls, part, None) is None]
    if missing:
        raise TypeError(
            f"dls needs {' and '.join(missing)}, iterables of batches: DataLoaders(train, valid), not a {type(dls).__name__} "
            "(without validation, DataLoaders(train))"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is an nn.Module, not {model!r:.200}")
    if loss_func is not None and (isinstance(loss_func, type) or not callable(loss_func)):
        hint = f"make one, {loss_func.__name__}()" if isinstance(loss_func, type) else "such as CrossEntropyLossFlat()"
        raise TypeError(f"loss_func is a function of (pred, *targets), not {loss_func!r:.200}: {hint}")
    if not callable(opt_func):
        raise TypeError(
            f"opt_func makes an optimizer of parameter groups, such as Adam, partial(SGD, mom=0.9) or torch.optim.AdamW, not "
            f"{opt_func!r:.200}"
        )


def listed(callbacks: Callback | Iterable[Callback]) -> list[Callback]:
    """One callback or several, as a list."""
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks)


def check_has_reduction(loss_func: Any) -> None:
    """TypeError for a loss function that cannot be told to give a loss a row."""
    try:
        inspect.signature(loss_func).bind_partial(reduction="none")
    except (TypeError, ValueError):
        name = getattr(loss_func, "__name__", type(loss_func).__name__)
        raise TypeError(
            f"{name} has no `reduction`, so it gives no loss of each row: give it the argument that torch's loss functions have"
        ) from None


def check_batch(batch: Any, n_inp: int) -> None:
    """TypeError unless it is a tuple or list of the inputs and targets of some rows."""
    if not isinstance(batch, tuple | list) or len(batch) < n_inp:
        what = f"{len(batch)} columns" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise TypeError(f"a batch is a tuple of {n_inp} input{'s' * (n_inp != 1)} and the targets, not {what}")


def check_loss(loss: Any) -> None:
    """TypeError for a loss that is no tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_func gives a tensor, the mean over the rows, not {loss!r:.200}")


def check_differentiable(loss: Tensor) -> None:
    """ValueError for a loss that no gradient can be taken of."""
    if loss.numel() != 1:
        raise ValueError(f"the loss has the shape {tuple(loss.shape)}: to train it is one number, the mean over the rows")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no parameter that trains: unfreeze() the model, or see whether it works without gradients"
        )


def check_groups(groups: Sequence[Any], model: nn.Module) -> list[list[nn.Parameter]]:
    """The groups that a splitter gave, as lists. TypeError for what is none; ValueError for a parameter left out."""
    found = [list(group) if isinstance(group, Iterable) and not isinstance(group, Tensor) else [] for group in groups]
    if not all(isinstance(p, nn.Parameter) for group in found for p in group) or not any(found):
        raise TypeError(
            "a splitter gives groups of parameters, a list each: [list(body.parameters()), list(head.parameters())]"
        )
    grouped = {id(p) for group in found for p in group}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    if left:
        raise ValueError(
            f"the splitter leaves out {len(left)} parameters, which would never train: {', '.join(left[:5])}"
            f"{', ...' if len(left) > 5 else ''}. Put them into a group, which can be frozen"
        )
    return found


def as_number(value: Any, what: str) -> float:
    """A plain float, which a checkpoint may hold. ValueError unless it is a finite number, 0 or more."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, str) or not 0 <= number < float("inf"):
        raise ValueError(f"{what} is a number, 0 or more, not {value!r:.200}")
    return number


def as_rate(lr: Any) -> float | slice:
    """A rate, or the slice of two, of plain floats. ValueError for anything else."""
    if isinstance(lr, slice):
        return slice(*(None if end is None else as_number(end, "a rate") for end in (lr.start, lr.stop, lr.step)))
    return as_number(lr, "lr, unless it is slice(first, last),")
