"""What one trial of a sweep runs, in its own process: one after another there, so each begins as if the process were new."""

import gc
import os
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoints import SHARED as STATE
from cluster.failures import as_bytes
from cluster.schedulers import EPOCHS
from cluster.space import Draws, settled
from cluster.spool import SPOOL, follow
from cluster.train import new_learner
from cluster.workers import InFolder, Workers
from training.callback import Callback
from training.failure import failure_of, own_frame
from training.learner import Learner
from training.recipe import Recipe, RecipeFunction
from training.state import seed_all


class TrialError(Exception):
    """A trial's error on its way to the driver: itself, and its last line and its text as they were where it was raised."""

    def __init__(self, content: bytes, line: str, text: str):
        super().__init__(content, line, text)
        self.content, self.line, self.text = content, line, text


@dataclass(frozen=True)
class TrialOf:
    """What all trials of a sweep share.

    resumes: the scheduler pauses trials, which go on from their state. workers: one is the trial's own process, several are
    Ray Train's, which write to `folder`, the sweep's. cache: where the driver has prepared the data.
    """

    make: RecipeFunction
    spaces: Mapping[str, Any]
    resumes: bool
    workers: int
    folder: Path
    cache: str

    def recipe(self, draws: Draws) -> Recipe:
        """The recipe with the drawn settings."""
        return self.make(**settled(self.spaces, draws))

    def training_folder(self, number: int) -> Path:
        """Where the workers of a trial keep their checkpoints and tell of epochs."""
        return self.folder / "trials" / f"{number:04d}" / "workers"


def run_trial(config: dict[str, Any], trial: TrialOf) -> None:
    """Train the draws of `config`, the same as a training run in this process, and report each epoch to Ray Tune."""
    os.environ["FASTRAY_CACHE"] = trial.cache  # the process began with that of whoever started Ray
    try:
        _train(trial.recipe(config["trial"]["draws"]), trial, config["trial"]["number"])
    except Exception as error:  # noqa: BLE001  the driver raises or tells it
        raise TrialError(as_bytes(error), error_line(error), "".join(traceback.format_exception(error))) from None


def _train(recipe: Recipe, trial: TrialOf, number: int) -> None:
    from ray import tune

    forget_the_last(recipe.seed)
    block, source = recipe.data()
    dls = block.dataloaders(source, **recipe.data_settings)
    learn = new_learner(recipe, dls)
    if trial.workers > 1:
        with learn.no_logging():
            _train_on_workers(learn, recipe, trial.workers, trial.training_folder(number))
        return
    state = tune.get_checkpoint()
    with learn.no_logging(), learn.added_callbacks(_Report(whole=trial.resumes)):
        if state is None:
            learn.fit(recipe.schedule, recipe.lr)
        else:
            go_on(learn, Path(state.path), recipe)


def _train_on_workers(learn: Learner, recipe: Recipe, workers: int, folder: Path) -> None:
    # The workers tell of their epochs in a file, which a thread beside the waiting one reads and passes on to Tune.
    from ray import tune

    folder.mkdir(parents=True, exist_ok=True)
    over, errors = threading.Event(), []

    def work() -> None:
        try:
            learn.fit(recipe.schedule, recipe.lr, on=InFolder(Workers.asked(workers), str(folder), resumed=True))
        except Exception as error:  # noqa: BLE001  raised by the thread that waits
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=work, name="fastray-trial", daemon=True).start()
    told = -1
    for records in follow(folder / SPOOL, over):
        for record in records:
            if record["kind"] == "metrics" and record["step"] > told:  # an epoch that is told again after a restart, once
                told = record["step"]
                tune.report(record["values"] | {EPOCHS: told + 1})
    if errors:
        raise errors[0]


def newest_state(folder: Path) -> Path | None:
    """The newest whole checkpoint of a trial's workers."""
    return max((file.parent for file in folder.glob(f"*/*/{STATE}")), default=None, key=lambda path: path.name)


def go_on(learn: Learner, state: Path, recipe: Recipe) -> None:
    """Train on from another trial's or the same one's state, at the rate and the weight decay that `recipe` says now."""
    wd = learn.wd
    learn.load(state / STATE)
    learn.run_lr = recipe.lr
    learn.set_wd(wd)  # in the optimizer as it is, with its averages
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
        return "its process died: killed, perhaps for the memory it took, or crashed; such a trial is not begun again"
    said = next(iter(str(error).strip().splitlines()), "")
    own, found = own_frame(error), failure_of(error)
    where = f"{own.filename}:{own.lineno}" if own else f"{found.file}:{found.line}" if found and found.file else ""
    return f"{type(error).__name__}: {said}" + (f" ({where})" if where else "")
