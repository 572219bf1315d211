"""What one trial of a sweep runs, in its own process: one after another there, so each begins as if the process were new."""

import gc
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.failures import as_bytes
from cluster.schedulers import EPOCHS
from cluster.space import Draws, settled
from cluster.train import new_learner
from training.callback import Callback
from training.failure import own_frame
from training.learner import Learner
from training.recipe import Recipe, RecipeFunction
from training.state import seed_all

STATE = "learner.pt"


class TrialError(Exception):
    """A trial's error on its way to the driver: itself, and its last line and its text as they were where it was raised."""

    def __init__(self, content: bytes, line: str, text: str):
        super().__init__(content, line, text)
        self.content, self.line, self.text = content, line, text


@dataclass(frozen=True)
class TrialOf:
    """What all trials of a sweep share. resumes: the scheduler pauses trials, which go on from their state."""

    make: RecipeFunction
    spaces: Mapping[str, Any]
    resumes: bool

    def recipe(self, draws: Draws) -> Recipe:
        """The recipe with the drawn settings."""
        return self.make(**settled(self.spaces, draws))


def run_trial(config: dict[str, Any], trial: TrialOf) -> None:
    """Train the draws of `config`, the same as a training run in this process, and report each epoch to Ray Tune."""
    try:
        _train(trial.recipe(config["trial"]["draws"]), trial)
    except Exception as error:  # noqa: BLE001  the driver raises or tells it
        raise TrialError(as_bytes(error), error_line(error), "".join(traceback.format_exception(error))) from None


def _train(recipe: Recipe, trial: TrialOf) -> None:
    from ray import tune

    forget_the_last(recipe.seed)
    block, source = recipe.data()
    dls = block.dataloaders(source, **recipe.data_settings)
    learn = new_learner(recipe, dls)
    state = tune.get_checkpoint()
    with learn.no_logging(), learn.added_callbacks(_Report(whole=trial.resumes)):
        if state is None:
            learn.fit(recipe.schedule, recipe.lr)
        else:
            go_on(learn, Path(state.path), recipe)


def go_on(learn: Learner, state: Path, recipe: Recipe) -> None:
    """Train on from another trial's or the same one's state, at the rate and the weight decay that `recipe` says now."""
    wd = learn.wd
    learn.load(state / STATE)
    learn.run_lr = recipe.lr
    learn.wd = wd
    learn._set_weight_decay()  # in the optimizer as it is, with its averages
    learn.resume()


def forget_the_last(seed: int) -> None:
    """Set what a trial could leave to the next one in the process to what it is in a new process, and seed all generators."""
    gc.collect()  # a Learner and its callbacks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(1)  # a trial has one CPU
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.set_grad_enabled(True)
    seed_all(seed % 2**32)


class _Report(Callback):
    """Reports each epoch of a trial to Ray Tune, with its state: the weights, or all that going on from there takes."""

    order = 90

    def __init__(self, whole: bool):
        self.whole = whole

    def after_epoch(self, learn: Learner) -> None:
        from ray import tune

        values = dict(learn.recorder.values) | {EPOCHS: learn.epoch + 1}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(learn.state_dict() if self.whole else {"model": learn.model.state_dict()}, Path(folder, STATE))
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


def error_line(error: BaseException) -> str:
    """An error in a line: its type, its message, and the innermost line of the person's own code on its way."""
    from ray.exceptions import RayActorError

    if isinstance(error, RayActorError):
        return "its process died"
    said = next(iter(str(error).strip().splitlines()), "")
    own = own_frame(error)
    return f"{type(error).__name__}: {said}" + (f" ({own.filename}:{own.lineno})" if own else "")
