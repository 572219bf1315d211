"""The state of a Learner: all that a training needs to go on as if it had not been broken off.

Tensors, numbers, strings, lists and dicts only, so that `torch.load(weights_only=True)` reads it.
"""

import copy
import os
import pickle
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blocks.errors import UserError
from training import distributed
from training.callback import Callback
from training.schedule import Schedule, schedule_from_plain, schedule_to_plain

if TYPE_CHECKING:
    from training.learner import Learner

# A rank's own, "off" the names of callbacks that are switched off; the rest of a state is the same on every rank.
OF_RANK = ("callbacks", "off", "generators", "epoch_generators")


@dataclass
class Position:
    """What comes next in a run: `batch` of the training part of `epoch` of `phase`; validation, when that part is `trained`."""

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    trained: bool = False

    @property
    def opens_epoch(self) -> bool:
        """Whether an epoch begins here."""
        return not self.batch and not self.trained

    def next_epoch(self, schedule: Schedule) -> "Position":
        """The beginning of the epoch after this one."""
        last = self.epoch + 1 == schedule[self.phase].epochs
        return Position(self.phase + 1) if last else Position(self.phase, self.epoch + 1)

    def epochs_before(self, schedule: Schedule) -> int:
        """How many epochs of the run are over."""
        return sum(phase.epochs for phase in schedule[: self.phase]) + self.epoch


def state_dict(learn: "Learner") -> dict[str, Any]:
    """Model, optimizer, schedule, position, what is frozen, callbacks, random generators. Shares the model's tensors."""
    named = list(learn.model.named_parameters())
    lr = learn.run_lr
    return {
        "model": learn.model.state_dict(),
        "optimizer": None if learn._opt is None else learn._opt.state_dict(),
        "trains": [name for name, p in named if p.requires_grad],
        # Those accumulated over batches, not those of a step that was made.
        "gradients": {name: p.grad for name, p in named if p.grad is not None and not learn.stepped},
        "schedule": schedule_to_plain(learn.schedule),
        "lr": [lr.start, lr.stop] if isinstance(lr, slice) else lr,
        "position": asdict(learn.position) | {"epoch_of_run": learn.epoch, "epochs_trained": learn.epochs_trained},
        # Of a run that has stopped, as it was there: callbacks have heard its end since, and dropped what they no longer need.
        **(learn._to_restore or _own_state(learn)),
        "epoch_generators": learn.epoch_generators,
    }


def load_state_dict(learn: "Learner", state: dict[str, Any]) -> None:
    """Take back what `state_dict` gave, of a Learner with the same model and callbacks; `resume` then goes on from there.

    When the number of ranks has changed, give "parts" instead of this rank's own: `OF_RANK` of each that there were, in order.
    """
    if "parts" in state:
        state = state | _own_part(learn, state["parts"])
    learn._to_device()
    learn.model.load_state_dict(state["model"])
    trains, gradients = set(state["trains"]), state["gradients"]
    for name, p in learn.model.named_parameters():
        p.requires_grad_(name in trains)
        p.grad = gradients[name].to(p.device, copy=True) if name in gradients else None
    if state["optimizer"] is None:
        learn._opt = None
    else:
        _check_optimizer(state["optimizer"], learn.opt)
        learn.opt.load_state_dict(state["optimizer"])
    learn.schedule = schedule_from_plain(state["schedule"])
    learn.run_lr = slice(*state["lr"]) if isinstance(state["lr"], list) else state["lr"]
    position = dict(state["position"])
    learn.epoch, learn.epochs_trained = position.pop("epoch_of_run"), position.pop("epochs_trained")
    learn.position = Position(**position)
    learn.epoch_generators = state["epoch_generators"]
    learn._to_restore = {key: state[key] for key in ("callbacks", "off", "generators")}
    restore(learn)


def _check_optimizer(state: dict[str, Any], opt: torch.optim.Optimizer) -> None:
    # Torch takes any state: the hyper-parameters of another optimizer would replace this one's.
    added = {"own_momentum", "initial_lr"}  # by a run, and by torch's schedulers
    saved, here = (sorted(set().union(*groups) - added) for groups in (state["param_groups"], opt.param_groups))
    if saved != here:
        raise UserError(
            f"the state is of another optimizer: its groups have {', '.join(saved)}, those of {type(opt).__name__} here "
            f"{', '.join(here)}"
        )


def _own_part(learn: "Learner", parts: list[dict[str, Any]]) -> dict[str, Any]:
    callbacks = {}
    for key, callback in _keyed(learn.callbacks):
        states = [part["callbacks"][key] for part in parts if key in part["callbacks"]]
        if states:
            callbacks[key] = callback.merged(states)
    now = generators()
    # By the run's numbers at this step and the rank, so that they are the same whenever it goes on from here.
    seed_all((zlib.crc32(parts[0]["generators"]["torch"].numpy().tobytes()) + distributed.rank()) % 2**32)
    own = generators()
    set_generators(now)
    return parts[0] | {"callbacks": callbacks, "generators": own}


def remember(learn: "Learner") -> None:
    """Keep what `restore` needs, of a run that stops here."""
    learn._to_restore = copy.deepcopy(_own_state(learn))


def _own_state(learn: "Learner") -> dict[str, Any]:
    keyed = list(_keyed(learn.callbacks))
    callbacks = {key: c.state_dict() for key, c in keyed}
    return {"callbacks": callbacks, "off": [key for key, c in keyed if not c.run], "generators": generators()}


def restore(learn: "Learner") -> None:
    """Set callbacks and generators to what they were where the run stopped, if that is known."""
    if learn._to_restore is not None:
        for key, callback in _keyed(learn.callbacks):
            if key in learn._to_restore["callbacks"]:
                callback.load_state_dict(learn._to_restore["callbacks"][key])
            if key in learn._to_restore["off"]:
                callback.run = False
        set_generators(learn._to_restore["generators"])


def save(learn: "Learner", path: str | Path) -> Path:
    """Write the state to the file `path`, whole or not at all. Of several ranks the first one writes, its own part."""
    path = Path(path)
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}-{os.getpid()}.part")  # torch refuses a name with nothing before its last dot
        torch.save(learn.state_dict(), unfinished)
        unfinished.replace(path)
    return path


def load(learn: "Learner", path: str | Path) -> "Learner":
    """Take back the state that `save` wrote to `path`, and return the Learner. Runs no code from the file.

    UserError for a file that is none, or of another optimizer.
    """
    with Path(path).open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{str(path)!r} is no file that learn.save wrote, or it is damaged") from error
    if not isinstance(state, dict) or not state.keys() >= {"model", "optimizer", "schedule", "position"}:
        raise UserError(
            f"{str(path)!r} holds no state of a Learner. Weights alone are loaded by "
            "learn.model.load_state_dict(torch.load(path))"
        )
    learn.load_state_dict(state)
    return learn


def _keyed(callbacks: list[Callback]) -> Iterator[tuple[str, Callback]]:
    # By name; the second of a class by name and number.
    seen: Counter[str] = Counter()
    for callback in callbacks:
        seen[callback.name] += 1
        yield callback.name + (f" {seen[callback.name]}" if seen[callback.name] > 1 else ""), callback


def generators() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global random generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(state: dict[str, Any]) -> None:
    """Take back what `generators` gave; those of GPUs where there are as many."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random generators. seed: at least 0, below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
