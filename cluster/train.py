"""One training run of a recipe, recorded: data prepared, Learner trained here or on workers, model exported and logged."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from blocks.dataloaders import DataLoaders
from cluster.data import dataloaders
from cluster.example import example_in, write_example
from cluster.flush import end_open_runs
from cluster.places import places
from cluster.recording import ONLY_WHAT_ALWAYS_IS, Recording
from cluster.runs import Run, check_data, finish_run, new_run_folder, read_run, words_of, write_run
from cluster.spool import SPOOL, append, name_in
from cluster.tracking import Tracker, start_run
from cluster.workers import InFolder, SpoolReport, Workers
from training.learner import Learner
from training.recipe import Recipe

Say = Callable[[str], None]
BATCH_PICTURE, RESULTS_PICTURE, EXPORT = "batch.png", "predictions.png", "export"


@dataclass(frozen=True)
class Trained:
    """What a run left: the Learner, MLflow's ids (None where nothing could be sent), and where things lie."""

    learn: Learner
    run_id: str | None
    model_uri: str | None
    registered: str | None
    folder: Path
    export: Path
    example: Path
    seconds: float
    trouble: str | None


def train_recipe(recipe: Recipe, workers: Workers, say: Say = print, recording: Recording = ONLY_WHAT_ALWAYS_IS) -> Trained:
    """Train `recipe` on `workers` and record it in MLflow as one run: FINISHED, FAILED, or KILLED when interrupted.

    One that was broken off is gone on with by `resume_recipe`.
    """
    return _train_in(Path(new_run_folder(places().storage, recipe.name)), recipe, workers, say, recording, resumed=False)


def resume_recipe(
    folder: Path, recipe: Recipe, workers: Workers, say: Say = print, recording: Recording = ONLY_WHAT_ALWAYS_IS
) -> Trained:
    """Go on with the run in `folder`, from its newest checkpoint: `train_recipe`, broken off, of the same recipe."""
    return _train_in(folder, recipe, workers, say, recording, resumed=True)


def _train_in(folder: Path, recipe: Recipe, workers: Workers, say: Say, recording: Recording, resumed: bool) -> Trained:
    began = time.perf_counter()
    recipe.located()
    workers.check(recipe.batch_size)
    spool = folder / SPOOL
    run = name_in(spool) or folder.name  # a copy of the folder may have another name
    busy = run if recording.system_metrics else ""
    with Tracker(spool, places().tracking, recipe.name, system_metrics_of=busy) as tracker, none_left_open(spool):
        dls = prepared_data(recipe, on_ray=workers.most > 0, say=say)
        if resumed:
            check_data(folder, read_run(folder), dls.fingerprint)
        learn = new_learner(recipe, dls)
        tracker.opened(say)
        recording.check()
        runner = {"workers": workers.number, **asdict(recording)}
        write_run(folder, Run("train", recipe.found_as, words_of(recipe.settings), runner, dls.fingerprint))
        params = {"recipe": recipe.name, **recipe.settings, "workers": workers.number}
        start_run(spool, run, run, params, tags=tags_of(dls))
        with ending(spool, run):
            record_data(spool, run, folder, dls)
            learn.add_callback(SpoolReport(str(spool), run))
            where = f"on {workers.number} workers" if workers.most else "in this process"
            how = "going on with" if resumed else "run"  # by this name it is gone on with
            say(f"train: {how} {folder.name}, {recipe.epochs} epoch{'s' * (recipe.epochs != 1)} {where}")
            learn.fit(recipe.schedule, recipe.lr, on=InFolder(workers, str(folder), resumed))
            export = record_model(spool, run, folder, learn, recording)
        finish_run(folder)
    return Trained(
        learn=learn,
        run_id=tracker.run_id(run),
        model_uri=tracker.model_uri(run),
        folder=folder,
        registered=tracker.registered(run),
        export=export,
        example=example_in(folder),
        seconds=time.perf_counter() - began,
        trouble=tracker.trouble,
    )


def prepared_data(recipe: Recipe, on_ray: bool, say: Say) -> DataLoaders:
    """The recipe's data, prepared or found prepared; says which, and how many files were decoded or rows prepared."""
    began = time.perf_counter()
    block, source = recipe.data()
    make = partial(dataloaders, block) if on_ray else block.dataloaders
    dls = make(source, **recipe.data_settings)
    prepared = dls.prepared
    assert prepared is not None
    kind = prepared.index["kind"]
    done = "files decoded" if kind == "files" else f"{kind} prepared"
    if prepared.reused:
        say(f"data: prepared data found (plan {prepared.fingerprint}): {prepared.rows} rows, 0 {done}")
    else:
        how = "Ray Data" if on_ray else "this process"
        say(f"data: {prepared.rows} {done} by {how} in {time.perf_counter() - began:.1f} s (plan {prepared.fingerprint})")
    for bad in prepared.index["bad_rows"]:
        say(f"data: left out {bad['id']}: {bad['reason']}")
    return dls


def new_learner(recipe: Recipe, dls: DataLoaders) -> Learner:
    """The recipe's Learner, with weights drawn from its seed."""
    torch.manual_seed(recipe.seed)
    return recipe.learner(dls)


def tags_of(dls: DataLoaders) -> dict[str, str]:
    """What a run is found by in MLflow, beside its parameters."""
    assert dls.prepared is not None
    return {"fastray.fingerprint": dls.prepared.fingerprint, "fastray.data": dls.prepared.where}


def record_data(spool: Path, run: str, folder: Path, dls: DataLoaders) -> None:
    """Record the data set, its plan and a picture of a batch."""
    assert dls.prepared is not None
    found, source = dls.prepared, str(dls.prepared.index["source"])
    append(spool, "data", run, name=Path(source).name, source=source, digest=found.fingerprint, rows=found.rows)
    append(spool, "text", run, file="plan.txt", text=dls.plan_text)
    append(spool, "tag", run, key="mlflow.note.content", value=f"The data, stage by stage:\n\n```\n{dls.plan_text}\n```")
    dls.show_batch().savefig(folder / BATCH_PICTURE)
    append(spool, "artifact", run, path=BATCH_PICTURE, folder="pictures")


def record_model(spool: Path, run: str, folder: Path, learn: Learner, recording: Recording = ONLY_WHAT_ALWAYS_IS) -> Path:
    """Export the model, and record it with an example of its use and a picture of its predictions."""
    from cluster.scoring import signature

    learn.show_results().savefig(folder / RESULTS_PICTURE)
    append(spool, "artifact", run, path=RESULTS_PICTURE, folder="pictures")
    if recording.report:
        _record_report(spool, run, folder, learn)
    export, example = learn.export(folder / EXPORT), write_example(learn.dls, folder)
    names = {"register": recording.register, "alias": recording.alias}
    append(spool, "model", run, path=EXPORT, example=example.name, **signature(export, example), **names)
    return export


def _record_report(spool: Path, run: str, folder: Path, learn: Learner) -> None:
    from training.report import report_of

    found = report_of(learn)
    for name, picture in found.pictures.items():
        picture.savefig(folder / name)
        append(spool, "artifact", run, path=name, folder="report")
    for name, text in found.texts.items():
        append(spool, "text", run, file=f"report/{name}", text=text)


@contextlib.contextmanager
def ending(spool: Path, run: str) -> Iterator[None]:
    """Record how a run ends, whatever ends it."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        append(spool, "end", run, status=status)


@contextlib.contextmanager
def none_left_open(spool: Path) -> Iterator[None]:
    """Whatever ends the block, all runs of the spool have ended then: those, too, that a process before this one began."""
    try:
        yield
    finally:
        end_open_runs(spool)
